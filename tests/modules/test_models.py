"""Which models are loaded, and who uses which, over loads that the test ends."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from modules import models
from modules.engine.sampling_params import SamplingParams
from modules.engine.sequence import SequenceRequest
from modules.errors import (
    AdapterNotFoundError,
    GenerationAbortedError,
    ModelLoadError,
    ModelNotFoundError,
    NoModelLoadedError,
    ServerError,
    SettingsError,
)
from modules.load_progress import LoadProgress, LoadStage
from modules.loaded_model import LoadedModel
from modules.models import ModelManager
from modules.settings import Settings
from tests.fakes import BegunLoad, FakeEngine, FakeLoading

pytestmark = pytest.mark.anyio

Make = Callable[..., ModelManager]


@pytest.fixture
def loading() -> FakeLoading:
    return FakeLoading()


@pytest.fixture
def make(loading: FakeLoading, tmp_path: Path) -> Make:
    """A manager with settings; of the names given by `there`, models are in its folder."""

    def make(there: str = "", **settings: Any) -> ModelManager:
        for name in there.split():
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text("{}")
        known = Settings(model_dir=tmp_path, **settings)
        return ModelManager(known, loading, loading.look_for_room)

    return make


async def load(manager: ModelManager, loading: FakeLoading, name: str) -> FakeEngine:
    """From beginning to end."""
    task = asyncio.create_task(manager.load(name))
    engine = (await loading.next()).finish()
    await task
    return engine


async def load_two(make: Make, loading: FakeLoading) -> ModelManager:
    """a and b; there is no place for another one."""
    manager = make(max_loaded_models=2)
    for name in "ab":
        await load(manager, loading, name)
    return manager


async def settle() -> None:
    """Let everything go on that can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def settle_until(is_so: Callable[[], bool]) -> None:
    """What threads have to do with it cannot be awaited."""
    async with asyncio.timeout(10):
        while not is_so():
            await asyncio.sleep(0.005)


def begin(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    return asyncio.create_task(work)


def names(manager: ModelManager) -> list[str]:
    return [model.name for model in manager.loaded]


async def generate(model: LoadedModel) -> None:
    request = SequenceRequest("r", (1,), SamplingParams())
    async for _ in model.engine.generate([request]):
        pass


# Loading


async def test_a_loaded_model_is_the_default_and_the_one_before_goes(
    make: Make, loading: FakeLoading
) -> None:
    manager = make()
    with pytest.raises(NoModelLoadedError):
        _ = manager.current
    first = await load(manager, loading, "a")
    assert (manager.current.name, names(manager)) == ("a", ["a"])
    await load(manager, loading, "b")
    assert (manager.current.name, names(manager)) == ("b", ["b"])
    await settle_until(lambda: first.is_stopped)


async def test_where_there_is_no_memory_for_both_the_old_one_goes_first(
    make: Make, loading: FakeLoading
) -> None:
    manager = make()
    first = await load(manager, loading, "a")
    loading.has_room = False
    with manager.lease() as lease:
        await lease.get()
        task = begin(manager.load("b"))
        await settle()
        assert (names(manager), loading.names) == ([], ["a"])  # it waits for the request
    begun = await loading.next()
    assert (begun.name, first.is_stopped) == ("b", True)
    begun.future.set_exception(ModelLoadError("It is damaged."))
    again = await loading.next()
    assert again.name == "a"
    again.finish()
    with pytest.raises(ModelLoadError):
        await task
    assert manager.current.name == "a"


async def test_overrides_hold_for_one_loading_only(make: Make, loading: FakeLoading) -> None:
    manager = make(dtype="bfloat16")
    for overrides, dtype, length in (
        ({"max_model_len": 64}, "bfloat16", 64),
        ({"dtype": "float32"}, "float32", None),
        (None, "bfloat16", None),
    ):
        task = begin(manager.load("a", overrides))
        begun = await loading.next()
        begun.finish()
        assert (await task).settings is begun.settings
        assert (begun.settings.dtype, begun.settings.max_model_len) == (dtype, length)


async def test_loads_take_turns_in_the_order_they_were_asked_for(
    make: Make, loading: FakeLoading
) -> None:
    manager = make(max_loaded_models=3)
    tasks = [begin(manager.load(name)) for name in "abc"]
    for name in "abc":
        begun = await loading.next()
        assert begun.name == name
        await settle()
        assert loading.begun.empty()
        begun.finish()
    await asyncio.gather(*tasks)
    assert names(manager) == ["c", "a", "b"]


async def test_a_load_that_fails_leaves_everything_as_it_was(
    make: Make, loading: FakeLoading
) -> None:
    manager = make()
    engine = await load(manager, loading, "a")
    task = begin(manager.load("b"))
    (await loading.next()).future.set_exception(ModelLoadError("It is damaged."))
    with pytest.raises(ModelLoadError, match="damaged"):
        await task
    assert (manager.current.name, engine.is_stopped) == ("a", False)
    await load(manager, loading, "c")  # and the next one has its turn
    assert manager.current.name == "c"


async def test_a_load_goes_on_when_whoever_asked_for_it_has_left(
    make: Make, loading: FakeLoading
) -> None:
    manager = make()
    task = begin(manager.load("a"))
    begun = await loading.next()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    begun.finish()
    await settle_until(lambda: manager.is_loaded)


async def test_each_model_that_comes_or_goes_is_told_of_once(
    make: Make, loading: FakeLoading, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "modules.models")
    manager = make()
    first = await load(manager, loading, "/somewhere/a")
    await load(manager, loading, "b")
    await settle_until(lambda: first.is_stopped)
    await manager.unload()
    await manager.unload()
    lines = [re.sub(r"\d\.\d s", "0.0 s", line) for line in caplog.messages]
    assert lines == [
        "Loaded a in 0.0 s (cpu, float32, context length 1024 tokens)",
        "Loaded b in 0.0 s (cpu, float32, context length 1024 tokens)",
        "Unloaded a",
        "Unloaded b",
    ]


async def test_progress_is_handed_on(make: Make, loading: FakeLoading) -> None:
    told: list[LoadProgress] = []
    task = begin(make().load("a", report=told.append))
    begun = await loading.next()
    begun.report(LoadProgress(LoadStage.DOWNLOADING, 0.5))
    begun.finish()
    await task
    assert told == [LoadProgress(LoadStage.FINDING), LoadProgress(LoadStage.DOWNLOADING, 0.5)]


async def test_where_there_are_too_many_the_longest_unused_goes(
    make: Make, loading: FakeLoading
) -> None:
    manager = await load_two(make, loading)
    with manager.lease() as lease:
        assert (await lease.get("a")).name == "a"
    await load(manager, loading, "c")
    assert set(names(manager)) == {"a", "c"}


async def test_models_of_the_start(make: Make, loading: FakeLoading) -> None:
    manager = make(model=("a", "b"))
    task = begin(manager.load_all(("a", "b")))
    for _ in "ab":
        (await loading.next()).finish()
    await task
    assert (manager.current.name, names(manager)) == ("a", ["a", "b"])


# Requests


async def test_a_request_keeps_its_model_until_it_has_ended(
    make: Make, loading: FakeLoading
) -> None:
    manager = make()
    engine = await load(manager, loading, "a")
    with manager.lease() as lease:
        assert (await lease.get()).name == "a"
        await load(manager, loading, "b")
        with manager.lease() as other:
            assert (await other.get("a")).name == "b"  # no new one gets it
        await settle()
        assert not engine.is_stopped
    await settle_until(lambda: engine.is_stopped)


async def test_the_next_load_waits_for_the_memory_of_one_that_goes(
    make: Make, loading: FakeLoading
) -> None:
    manager = make()
    await load(manager, loading, "a")
    with manager.lease() as lease:
        await lease.get()
        await load(manager, loading, "b")
        await load(manager, loading, "c")  # there is memory for it beside the others
        loading.has_room = False
        task = begin(manager.load("d"))
        await settle()
        assert loading.begun.empty()
    (await loading.next()).finish()
    await task


async def test_those_that_make_room_can_be_unloaded_before_others_that_wait_for_it(
    make: Make, loading: FakeLoading
) -> None:
    manager = make()
    await load(manager, loading, "a")
    with manager.lease() as lease:
        await lease.get()
        await load(manager, loading, "b")
        loading.has_room = False
        task = begin(manager.load("c"))
        await settle()
        unloading = begin(manager.unload("a"))
        (await loading.next()).finish()
        await task
        await unloading


async def test_what_cannot_come_back_does_not_hide_why_it_had_to_go(
    make: Make, loading: FakeLoading
) -> None:
    manager = await load_two(make, loading)
    loading.has_room = False
    task = begin(manager.load("c", {"max_model_len": 64}))
    (await loading.next()).future.set_exception(ModelLoadError("It is damaged."))
    (await loading.next()).future.set_exception(ModelLoadError("It has gone."))
    with pytest.raises(ModelLoadError, match="damaged"):
        await task
    assert names(manager) == ["b"]


async def test_all_generations_are_ended_also_of_models_that_go(
    make: Make, loading: FakeLoading
) -> None:
    manager = make()
    engine = await load(manager, loading, "a")
    engine.enqueue("x", blocks=True)
    with manager.lease() as lease:
        running = begin(generate(await lease.get()))
        await load(manager, loading, "b")
        await settle_until(engine.blocked.is_set)
        manager.abort_all()
        await running
    assert engine.aborted == ["r"]


async def test_at_the_end_those_that_wait_are_told(make: Make, loading: FakeLoading) -> None:
    manager = make("b", model_autoload=True)
    await load(manager, loading, "a")
    with manager.lease() as lease:
        task = begin(lease.get("b"))
        await loading.next()
        await asyncio.to_thread(manager.close)
        with pytest.raises(GenerationAbortedError, match="shutting down"):
            await task
    with pytest.raises(GenerationAbortedError):
        await manager.load("b")


async def test_no_model_is_loaded_for_an_adapter_that_it_has_not(
    make: Make, loading: FakeLoading
) -> None:
    manager = make("b", model_autoload=True)
    await load(manager, loading, "a")
    with manager.lease() as lease, pytest.raises(AdapterNotFoundError):
        await lease.get("b:red")
    assert names(manager) == ["a"]


async def test_one_that_is_used_for_too_long_is_stopped(
    make: Make, loading: FakeLoading, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "MAX_LEAVING_SECONDS", 0.01)
    manager = make()
    engine = await load(manager, loading, "a")
    engine.enqueue("x", blocks=True)
    with manager.lease() as lease:
        running = begin(generate(await lease.get()))
        await load(manager, loading, "b")
        with pytest.raises(GenerationAbortedError):
            await running


@pytest.mark.parametrize(
    ("asked", "name"), [("b", "b"), ("gpt-4", "b"), ("gpt-3.5-turbo", "a"), (None, "a"), ("", "a")]
)
async def test_which_model_answers(
    make: Make, loading: FakeLoading, asked: str | None, name: str
) -> None:
    manager = make(there="other", max_loaded_models=2, model_aliases={"gpt-4": "b"})
    await load(manager, loading, "b")
    await load(manager, loading, "a")
    with manager.lease() as lease:
        assert not lease.must_wait(asked)
        assert (await lease.get(asked)).name == name
    assert loading.begun.empty()


async def test_a_listed_model_is_loaded_for_a_request_if_that_is_allowed(
    make: Make, loading: FakeLoading
) -> None:
    manager = make(there="a b", model_autoload=True)
    await load(manager, loading, "a")
    with manager.lease() as lease, manager.lease() as other:
        assert lease.must_wait("b")
        both = [begin(lease.get("b")), begin(other.get("b"))]
        (await loading.next()).finish()
        assert [(await task).name for task in both] == ["b", "b"]
    assert loading.names == ["a", "b"]  # once for both
    assert manager.current.name == "b"  # it has taken a's place
    with manager.lease() as lease:
        assert not lease.must_wait("no-such")
        assert (await lease.get("no-such")).name == "b"


async def test_a_model_for_a_request_does_not_become_the_default(
    make: Make, loading: FakeLoading
) -> None:
    manager = make(there="a b", model_autoload=True, max_loaded_models=2)
    await load(manager, loading, "a")
    with manager.lease() as lease:
        task = begin(lease.get("b"))
        (await loading.next()).finish()
        assert (await task).name == "b"
    assert (manager.current.name, names(manager)) == ("a", ["a", "b"])


@pytest.mark.parametrize(
    "error", [ModelLoadError("/x is damaged."), ModelNotFoundError("/x?"), SettingsError("/x!")]
)
async def test_a_request_whose_model_cannot_be_loaded_says_why_to_whom_that_concerns(
    make: Make, loading: FakeLoading, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    manager = make(there="a b", model_autoload=True)
    await load(manager, loading, "a")
    with manager.lease(tells_all=True) as lease, manager.lease() as other:
        for each, told in ((lease, "/x"), (other, "^The model b cannot be loaded.")):
            caplog.clear()
            task = begin(each.get("b"))
            (await loading.next()).future.set_exception(error)
            with pytest.raises(ServerError, match=told):
                await task
            assert caplog.messages == [f"b could not be loaded: {error}"]
    assert manager.current.name == "a"


async def test_a_client_that_leaves_while_its_model_is_loaded_holds_nothing(
    make: Make, loading: FakeLoading
) -> None:
    manager = make(there="a", model_autoload=True)
    with manager.lease() as lease:
        task = begin(lease.get("a"))
        begun = await loading.next()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    engine = begun.finish()
    await settle_until(lambda: manager.is_loaded)
    await load(manager, loading, "b")
    await settle_until(lambda: engine.is_stopped)


async def test_the_folder_is_not_looked_through_for_every_request(
    make: Make, loading: FakeLoading, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = make(there="a", model_autoload=True)
    await load(manager, loading, "a")
    num_listings = 0

    def list_names() -> list[str]:
        nonlocal num_listings
        num_listings += 1
        return ["a", "b"]

    monkeypatch.setattr(manager, "list_names", list_names)
    assert not any(manager.must_load("gpt-3.5-turbo") for _ in range(100))
    assert num_listings <= 2
    monkeypatch.setattr(models, "LISTING_SECONDS", -1)
    assert manager.must_load("b")


# Unloading


async def test_unloading_ends_what_runs_with_a_typed_error(
    make: Make, loading: FakeLoading
) -> None:
    manager = make(max_loaded_models=2)
    engines = {name: await load(manager, loading, name) for name in "ab"}
    for engine in engines.values():
        engine.enqueue("x", blocks=True)
    with ExitStack() as leases:
        runs = {}
        for name in "ab":
            lease = leases.enter_context(manager.lease())
            runs[name] = begin(generate(await lease.get(name)))
        await settle()
        await manager.unload("b")
        with pytest.raises(GenerationAbortedError):
            await runs["b"]
        assert (manager.current.name, runs["a"].done()) == ("a", False)
        await manager.unload()
        with pytest.raises(GenerationAbortedError):
            await runs["a"]
    with manager.lease() as lease, pytest.raises(NoModelLoadedError):
        lease.must_wait("a")


async def test_unloading_ends_those_that_had_to_make_room_too(
    make: Make, loading: FakeLoading
) -> None:
    manager = make()
    engine = await load(manager, loading, "a")
    with manager.lease() as lease:
        await lease.get()
        await load(manager, loading, "b")
        await manager.unload()
        assert engine.is_stopped


async def test_unloading_by_another_name_and_of_what_is_not_loaded(
    make: Make, loading: FakeLoading
) -> None:
    manager = make(model_aliases={"gpt-4": "a"})
    await manager.unload()  # nothing is loaded, and nothing is wrong
    await load(manager, loading, "a")
    with pytest.raises(ModelNotFoundError, match="b is not loaded"):
        await manager.unload("b")
    await manager.unload("gpt-4")
    assert not manager.is_loaded


async def test_unloading_waits_for_its_turn(make: Make, loading: FakeLoading) -> None:
    manager = make()
    loads = begin(manager.load("a"))
    begun = await loading.next()
    unloads = begin(manager.unload())
    await settle()
    assert not unloads.done()
    engine = begun.finish()
    await asyncio.gather(loads, unloads)
    assert engine.is_stopped and not manager.is_loaded


# Models that nobody uses


@pytest.fixture
async def idle(make: Make, loading: FakeLoading) -> AsyncIterator[tuple[ModelManager, BegunLoad]]:
    """A manager that lets models go at once; one was loaded by its path."""
    manager = make(idle_timeout=0.0001)
    task = begin(manager.load("/somewhere/a", {"max_model_len": 64}))
    begun = await loading.next()
    begun.finish()
    await task
    service = begin(manager.unload_idle())
    yield manager, begun
    service.cancel()


async def test_what_nobody_uses_is_let_go_and_comes_back_as_it_was(
    idle: tuple[ModelManager, BegunLoad], loading: FakeLoading
) -> None:
    manager, begun = idle
    await settle_until(lambda: manager.asleep != ())
    assert not manager.is_loaded
    with manager.lease() as lease:
        assert lease.must_wait(None)
        task = begin(lease.get())
        again = await loading.next()
        assert (again.name, again.settings) == (begun.name, begun.settings)
        again.finish()
        assert (await task).max_model_len
        assert manager.asleep == ()
        await asyncio.sleep(0.05)
        assert manager.is_loaded  # it is used
    await settle_until(lambda: manager.asleep != ())


async def test_what_sleeps_can_be_unloaded(idle: tuple[ModelManager, BegunLoad]) -> None:
    manager, _ = idle
    await settle_until(lambda: manager.asleep != ())
    await manager.unload("a")
    assert manager.asleep == ()
    with pytest.raises(NoModelLoadedError):
        manager.must_load(None)
