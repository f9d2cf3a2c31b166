"""A worker: loading late, one job after the other, streams, and what ends them."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from modules.errors import CapabilityError, MissingPackageError
from modules.optional_packages import import_package
from modules.worker import LEAST_PRIORITY, NICENESS, Worker

pytestmark = pytest.mark.anyio

WAIT_SECONDS = 5


async def test_it_is_loaded_once_and_only_when_it_is_needed() -> None:
    loaded: list[str] = []

    def load() -> list[str]:
        loaded.append(threading.current_thread().name)
        return loaded

    worker = Worker("numbers", load)
    assert loaded == []
    assert await worker.run(len) == 1
    assert await worker.run(len) == 1
    assert loaded == ["numbers"]


async def test_loading_is_tried_again_after_a_failure() -> None:
    faults = [MissingPackageError("Numbers", "numbers")]

    def load() -> str:
        if faults:
            raise faults.pop()
        return "ready"

    worker = Worker("numbers", load)
    with pytest.raises(MissingPackageError, match="pip install numbers"):
        await worker.run(str)
    assert await worker.run(str) == "ready"


async def test_jobs_run_one_after_the_other_in_a_thread_that_ends_with_them() -> None:
    worker = Worker("numbers", int)
    running = 0

    def work(resource: int) -> tuple[int, threading.Thread]:
        nonlocal running
        running += 1
        count = running
        running -= 1
        return count, threading.current_thread()

    results = await asyncio.gather(*[worker.run(work) for _ in range(50)])
    assert {count for count, _ in results} == {1}
    for thread in {thread for _, thread in results}:
        await asyncio.to_thread(thread.join, WAIT_SECONDS)
        assert not thread.is_alive()


@pytest.mark.skipif(sys.platform != "linux", reason="niceness is the whole process' elsewhere")
async def test_it_gives_way_to_the_other_threads() -> None:
    nice = await Worker("numbers", int).run(lambda _: os.getpriority(os.PRIO_PROCESS, 0))
    assert nice == min(os.getpriority(os.PRIO_PROCESS, 0) + NICENESS, LEAST_PRIORITY)


@pytest.mark.skipif(sys.platform != "linux", reason="niceness is the whole process' elsewhere")
@pytest.mark.parametrize("nice", [15, 19])
async def test_who_has_little_priority_keeps_it(nice: int) -> None:
    """Nobody but root may ask for more of it again."""

    def start_worker() -> int:
        os.setpriority(os.PRIO_PROCESS, 0, nice)
        worker = Worker("numbers", int)
        return worker.submit(lambda _: os.getpriority(os.PRIO_PROCESS, 0)).result(WAIT_SECONDS)

    with ThreadPoolExecutor(1) as executor:
        assert executor.submit(start_worker).result(WAIT_SECONDS) == nice


async def test_a_stream_arrives_item_by_item() -> None:
    taken = threading.Event()

    def work(resource: int) -> Iterator[int]:
        yield 1
        assert taken.wait(WAIT_SECONDS)  # the second one waits until the first has been taken
        yield 2

    items = []
    async for item in Worker("numbers", int).stream(work):
        items.append(item)
        taken.set()
    assert items == [1, 2]


async def test_a_stream_says_what_has_ended_it() -> None:
    def work(resource: int) -> Iterator[int]:
        yield 1
        raise CapabilityError("out of numbers")

    items = []
    with pytest.raises(CapabilityError, match="out of numbers"):
        async for item in Worker("numbers", int).stream(work):
            items.append(item)
    assert items == [1]


async def test_who_leaves_a_stream_ends_it() -> None:
    worker = Worker("numbers", int)
    made: list[int] = []
    left = threading.Event()

    def work(resource: int) -> Iterator[int]:
        for number in range(1000):
            made.append(number)
            yield number
            assert left.wait(WAIT_SECONDS)

    stream = worker.stream(work)
    assert await anext(stream) == 0
    await stream.aclose()
    left.set()
    await worker.run(str)  # whose turn comes after the stream has ended
    assert made == [0, 1]


async def test_a_job_that_nobody_waits_for_any_more_is_left_out() -> None:
    worker = Worker("numbers", int)
    go = threading.Event()
    first = worker.submit(lambda _: go.wait(WAIT_SECONDS))
    second = worker.submit(lambda _: 2)
    assert second.cancel()
    go.set()
    assert await asyncio.wrap_future(first) is True
    with pytest.raises(CancelledError):
        second.result(WAIT_SECONDS)


async def refuse(worker: Worker[int]) -> None:
    """Until it does: it is being closed in another thread."""
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            worker.submit(str).cancel()
            await asyncio.sleep(0)


async def test_a_closed_worker_refuses_work() -> None:
    worker = Worker("numbers", int)
    begun, go = threading.Event(), threading.Event()

    def work(resource: int) -> bool:
        begun.set()
        return go.wait(WAIT_SECONDS)

    first = worker.submit(work)
    waiting = worker.submit(str)
    assert await asyncio.to_thread(begun.wait, WAIT_SECONDS)
    closing = asyncio.create_task(asyncio.to_thread(worker.close))
    with pytest.raises(CapabilityError, match="shutting down"):
        await refuse(worker)
    go.set()
    assert await asyncio.wrap_future(first) is True
    await closing
    with pytest.raises(CapabilityError, match="shutting down"):
        await asyncio.wrap_future(waiting)
    with pytest.raises(CapabilityError, match="shutting down"):
        worker.submit(str)


def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(MissingPackageError, match="Numbers need the package py-numbers"):
        import_package("no_such_module", "Numbers", "py-numbers")


async def test_closing_waits_for_the_job_that_runs() -> None:
    worker = Worker("numbers", int)
    is_started, is_over = threading.Event(), threading.Event()
    finished: list[int] = []

    def work(resource: int) -> None:
        is_started.set()
        assert is_over.wait(WAIT_SECONDS)
        finished.append(resource)

    future = worker.submit(work)
    assert await asyncio.to_thread(is_started.wait, WAIT_SECONDS)
    closing = asyncio.create_task(asyncio.to_thread(worker.close))
    with pytest.raises(CapabilityError, match="shutting down"):
        await refuse(worker)
    assert not closing.done()
    is_over.set()
    await closing
    assert finished == [0]
    assert future.done()


async def test_closing_ends_a_stream_at_its_next_item() -> None:
    worker = Worker("numbers", int)
    is_closing = threading.Event()
    made: list[int] = []

    def work(resource: int) -> Iterator[int]:
        for number in range(1000):
            made.append(number)
            yield number
            assert is_closing.wait(WAIT_SECONDS)

    stream = worker.stream(work)
    assert await anext(stream) == 0
    closing = asyncio.create_task(asyncio.to_thread(worker.close))
    with pytest.raises(CapabilityError, match="shutting down"):
        await refuse(worker)
    is_closing.set()
    with pytest.raises(CapabilityError, match="shutting down"):
        await anext(stream)
    await closing
    assert made == [0, 1]
