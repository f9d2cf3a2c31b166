"""Common batches in threads: who shares them, who fails, and what it leaves of torch's threads."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from modules.batch_queue import BatchLimits, Prepared
from modules.batch_worker import BatchWorker
from modules.errors import CapabilityError, MissingPackageError
from modules.worker import LEAST_PRIORITY, NICENESS

pytestmark = pytest.mark.anyio

WAIT_SECONDS = 5


@dataclass
class Lengths:
    """The row of a text is its length. Blocks at the text "wait", and fails at "fail"."""

    limits: BatchLimits = BatchLimits(max_items=8, max_tokens=1000, max_padding=1000)
    is_on_card: bool = True
    """One thread."""
    batches: list[list[str]] = field(default_factory=list)
    began: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def prepare(self, inputs: Sequence[str]) -> list[Prepared]:
        return [Prepared({"text": text}, len(text), text == "long") for text in inputs]

    def compute(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        texts = [prepared.features["text"] for prepared in batch]
        self.batches.append(texts)
        if "wait" in texts:
            self.began.set()
            assert self.go_on.wait(WAIT_SECONDS)
        if "fail" in texts:
            raise RuntimeError("no")
        return np.array([[len(text)] for text in texts], np.float32)


async def block(worker: BatchWorker[str], model: Lengths) -> asyncio.Task[object]:
    """A request that is being computed, until `model.go_on`."""
    task: asyncio.Task[object] = asyncio.create_task(worker.run(["wait"]))
    assert await asyncio.to_thread(model.began.wait, WAIT_SECONDS)
    return task


async def start(worker: BatchWorker[str], *texts: str, **options: bool) -> asyncio.Task[object]:
    """A request that waits in the queue."""
    before = len(worker._queue.requests)
    task: asyncio.Task[object] = asyncio.create_task(worker.run(texts, **options))
    await asyncio.sleep(0)
    assert len(worker._queue.requests) == before + 1
    return task


async def test_rows_come_in_the_order_of_the_inputs() -> None:
    worker = BatchWorker("lengths", Lengths)
    texts = ["x" * (i * 7 % 50 + 1) for i in range(200)]
    computed = await worker.run([*texts, "long"])
    assert computed.rows.ravel().tolist() == [*map(len, texts), 4]
    assert computed.num_tokens == (*map(len, texts), 4)
    assert computed.num_truncated == 1
    worker.close()


async def test_nothing_is_loaded_for_nothing() -> None:
    def load() -> Lengths:
        raise AssertionError

    assert (await BatchWorker("lengths", load).run([])).num_tokens == ()


async def test_clients_share_batches() -> None:
    model = Lengths()
    worker = BatchWorker("lengths", lambda: model)
    first = await block(worker, model)
    others = [await start(worker, "ab", "cd") for _ in range(3)]
    model.go_on.set()
    await asyncio.gather(first, *others)
    assert len(model.batches) < 4
    assert any(len(batch) > 2 for batch in model.batches)
    worker.close()


async def test_the_background_comes_last() -> None:
    model = Lengths()
    worker = BatchWorker("lengths", lambda: model)
    first = await block(worker, model)
    tasks = [await start(worker, "back", is_background=True), await start(worker, "front")]
    model.go_on.set()
    await asyncio.gather(first, *tasks)
    assert model.batches == [["wait"], ["front"], ["back"]]
    worker.close()


async def test_who_leaves_takes_his_texts_out() -> None:
    model = Lengths()
    worker = BatchWorker("lengths", lambda: model)
    first = await block(worker, model)
    leaver, stayer = await start(worker, "leaver"), await start(worker, "stayer")
    leaver.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaver
    first.cancel()  # whose text is being computed: nobody gets it
    model.go_on.set()
    await stayer
    assert model.batches == [["wait"], ["stayer"]]
    worker._queue.check_integrity()
    assert worker._queue.requests == ()
    worker.close()


async def test_a_fault_is_only_that_of_the_request_that_made_it() -> None:
    model = Lengths()
    worker = BatchWorker("lengths", lambda: model)
    first = await block(worker, model)
    tasks = [await start(worker, text) for text in ("good", "fail", "fine")]
    model.go_on.set()
    good, fail, fine = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(fail, RuntimeError)
    assert not isinstance(good, Exception) and not isinstance(fine, Exception)
    await first
    assert worker._queue.requests == ()
    worker.close()


async def test_a_fault_of_preparing_ends_the_request() -> None:
    class Picky(Lengths):
        def prepare(self, inputs: Sequence[str]) -> list[Prepared]:
            if "bad" in inputs:
                raise ValueError("bad")
            return super().prepare(inputs)

    worker = BatchWorker("lengths", Picky)
    with pytest.raises(ValueError, match="bad"):
        await worker.run(["bad"])
    assert (await worker.run(["good"])).num_tokens == (4,)
    worker.close()


async def test_loading_is_tried_again_after_a_failure() -> None:
    faults = [MissingPackageError("Lengths", "lengths")]

    def load() -> Lengths:
        if faults:
            raise faults.pop()
        return Lengths()

    worker = BatchWorker("lengths", load)
    with pytest.raises(MissingPackageError, match="pip install lengths"):
        await worker.run(["x"])
    assert (await worker.run(["x"])).num_tokens == (1,)
    worker.close()


async def test_closing_fails_what_waits() -> None:
    model = Lengths()
    worker = BatchWorker("lengths", lambda: model)
    first = await block(worker, model)
    waiting = await start(worker, "waiting")
    worker.close()
    for task in (first, waiting):
        with pytest.raises(CapabilityError, match="shutting down"):
            await task
    with pytest.raises(CapabilityError, match="shutting down"):
        await worker.run(["x"])
    model.go_on.set()


class Observer(Lengths):
    """Several threads; each waits for the others, and says how it is."""

    def __init__(self, num_threads: int) -> None:
        super().__init__(limits=BatchLimits(1, 1000, 0), is_on_card=False)
        self.barrier = threading.Barrier(num_threads)
        self.seen: list[tuple[int, int]] = []

    def compute(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        self.barrier.wait(WAIT_SECONDS)
        niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        self.seen.append((torch.get_num_threads(), niceness))
        return super().compute(batch)


@pytest.mark.skipif(sys.platform != "linux", reason="niceness is the whole process' elsewhere")
async def test_as_many_threads_as_cores_each_on_one_and_the_others_keep_theirs() -> None:
    """Also those that are yet to come: torch hands them the number that was set last."""
    own = torch.get_num_threads()
    expected = max(own, 2)
    torch.set_num_threads(expected)
    try:
        model = Observer(expected)
        worker = BatchWorker("lengths", lambda: model)
        await worker.run(["x"] * expected)
        nice = min(os.getpriority(os.PRIO_PROCESS, 0) + NICENESS, LEAST_PRIORITY)
        assert model.seen == [(1, nice)] * expected
        assert torch.get_num_threads() == expected
        assert await asyncio.to_thread(_ask_new_thread) == expected
        worker.close()
    finally:
        torch.set_num_threads(own)


def _ask_new_thread() -> int:
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join(WAIT_SECONDS)
    return seen[0]
