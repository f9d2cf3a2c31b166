"""Several engines on one thread: turns, faults, leaving; scripted engines, and tiny real ones."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace

import pytest

from modules.engine.async_engine import MAX_FAILED_STEPS, AsyncEngine
from modules.engine.inference_thread import InferenceThread
from modules.errors import EngineDeadError, GenerationAbortedError
from tests.engine.conftest import EngineFactory, request
from tests.engine.test_async_engine import collect

TIMEOUT = 30


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    yield
    assert "inference" not in {thread.name for thread in threading.enumerate()}


class Scripted:
    """Steps as often as it is told to, and writes down each step."""

    def __init__(self, name: str, journal: queue.SimpleQueue[str], fails: bool = False) -> None:
        self.name = name
        self.journal = journal
        self.fails = fails
        self.num_steps = 0
        self.has_foreground = True
        self.error: BaseException | None = None

    @property
    def has_unfinished(self) -> bool:
        return self.num_steps > 0

    def obey(self, command: object) -> None:
        if isinstance(command, threading.Event):
            assert command.wait(TIMEOUT)
        elif isinstance(command, int):
            self.num_steps = command

    def step(self) -> None:
        self.num_steps -= 1
        self.journal.put(self.name)
        if self.fails:
            raise SystemExit("broken")

    def fail(self, error: BaseException) -> None:
        self.num_steps = 0
        self.error = error

    def let_go(self) -> None:
        self.journal.put(f"{self.name} let go")


def run_all(*engines: Scripted, steps: int) -> list[str]:
    """The journal of engines that begin at the same time, up to their last step."""
    thread = InferenceThread()
    may_begin = threading.Event()
    for engine in engines:
        thread.add(engine)
    thread.send(engines[0], may_begin)
    for engine in engines:
        thread.send(engine, steps)
    may_begin.set()
    num_steps = sum(1 if engine.fails else steps for engine in engines)
    journal = [engines[0].journal.get(timeout=TIMEOUT) for _ in range(num_steps)]
    for engine in engines:
        thread.remove(engine)
    return journal


def test_engines_step_in_turn() -> None:
    journal: queue.SimpleQueue[str] = queue.SimpleQueue()
    engines = [Scripted(name, journal) for name in "abc"]
    assert run_all(*engines, steps=3) == ["a", "b", "c"] * 3


def test_the_background_of_one_waits_for_the_other() -> None:
    journal: queue.SimpleQueue[str] = queue.SimpleQueue()
    behind, asked = Scripted("behind", journal), Scripted("asked", journal)
    behind.has_foreground = False
    assert run_all(behind, asked, steps=2) == ["asked", "asked", "behind", "behind"]


def test_a_broken_engine_leaves_the_other_running() -> None:
    journal: queue.SimpleQueue[str] = queue.SimpleQueue()
    broken, good = Scripted("broken", journal, fails=True), Scripted("good", journal)
    assert run_all(broken, good, steps=3) == ["broken", "good", "good", "good"]
    assert isinstance(broken.error, SystemExit)
    assert good.error is None


def test_the_thread_ends_with_its_last_engine_and_begins_again() -> None:
    journal: queue.SimpleQueue[str] = queue.SimpleQueue()
    thread = InferenceThread()
    for name in ("a", "b"):
        engine = Scripted(name, journal)
        thread.add(engine)
        thread.send(engine, 1)
        assert journal.get(timeout=TIMEOUT) == name
        thread.remove(engine)
        thread.remove(engine)
        assert journal.get(timeout=TIMEOUT) == f"{name} let go"
        assert "inference" not in {each.name for each in threading.enumerate()}
        thread.send(engine, 5)  # comes too late: the next engine's thread drops it
    assert journal.empty()


@pytest.fixture
def pair(make_engine: EngineFactory) -> Iterator[tuple[AsyncEngine, AsyncEngine]]:
    thread = InferenceThread()
    engines = AsyncEngine(make_engine(), thread), AsyncEngine(make_engine(), thread)
    yield engines
    for engine in engines:
        engine.stop()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_two_engines_generate_side_by_side(pair: tuple[AsyncEngine, AsyncEngine]) -> None:
    wish = request("same id", [5, 6, 7], max_tokens=40)
    (alone,) = (await collect(pair[0], wish)).values()
    both = await asyncio.gather(*(collect(engine, wish) for engine in pair))
    assert both == [{"same id": alone}] * 2
    assert [thread.name for thread in threading.enumerate()].count("inference") == 1


@pytest.mark.anyio
async def test_stopping_one_leaves_the_other_generating(
    pair: tuple[AsyncEngine, AsyncEngine],
) -> None:
    stopped, other = pair
    wish = request("a", [5], max_tokens=400, ignore_eos=True)
    async with aclosing(stopped.generate([wish])) as ended, aclosing(other.generate([wish])) as on:
        await anext(ended)
        await anext(on)
        await asyncio.to_thread(stopped.stop)
        with pytest.raises(GenerationAbortedError):
            async for _ in ended:
                pass
        assert len([outputs async for outputs in on]) == 399
    other.check_health()
    with pytest.raises(EngineDeadError):
        stopped.check_health()


@pytest.mark.anyio
async def test_a_dead_model_leaves_the_other_generating(
    pair: tuple[AsyncEngine, AsyncEngine],
) -> None:
    class Broken:
        def run(self, batch: object) -> list[object]:
            raise MemoryError

    dead, other = pair
    dead._engine.runner = Broken()  # type: ignore[assignment,union-attr]
    task = asyncio.create_task(collect(other, request("a", [5], max_tokens=200, ignore_eos=True)))
    for number in range(MAX_FAILED_STEPS - 1):
        await collect(dead, request(str(number), [5]))
    with pytest.raises(EngineDeadError, match="loaded again"):
        await collect(dead, request("last", [5]))
    with pytest.raises(EngineDeadError):
        dead.check_health()
    assert len((await task)["a"]) == 200
    dead.abort("last")
    await collect(other, replace(request("b", [6], max_tokens=3), is_background=True))


@pytest.mark.anyio
async def test_no_model_is_held_by_a_bridge_that_was_stopped(make_engine: EngineFactory) -> None:
    import weakref

    thread = InferenceThread()
    other, engine = AsyncEngine(make_engine(), thread), AsyncEngine(make_engine(), thread)
    await collect(engine, request("a", [5]))
    runner = weakref.ref(engine._engine.runner)  # type: ignore[union-attr]
    await asyncio.to_thread(engine.stop)
    assert runner() is None, "the thread, which waits for the other, or the bridge holds it"
    other.stop()
