"""The bridge between the event loop and the inference thread, over a tiny real model."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from contextlib import aclosing
from dataclasses import replace

import pytest
import torch

from modules.engine.async_engine import MAX_FAILED_STEPS, AsyncEngine
from modules.engine.low_rank import LowRank
from modules.engine.model_runner import ModelRunner
from modules.engine.outputs import FinishReason
from modules.engine.scheduler import ScheduledBatch, StepResult
from modules.errors import EngineDeadError, GenerationAbortedError
from tests.engine.conftest import request, run, token_ids

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def engine(make_engine):
    engine = AsyncEngine(make_engine())
    yield engine
    engine.stop()


async def collect(engine: AsyncEngine, *requests) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    async with aclosing(engine.generate(requests)) as steps:
        async for outputs in steps:
            for output in outputs:
                tokens.setdefault(output.request_id, []).append(output.token_id)
    return tokens


async def until_idle(engine: AsyncEngine) -> None:
    """A command that is answered: everything put in before it has been carried out."""
    await collect(engine, request("probe", [5], max_tokens=1))


async def test_many_callers_get_what_one_gets(engine, make_engine) -> None:
    wishes = [request(str(n), list(range(5, 6 + n)), max_tokens=10) for n in range(32)]
    results = await asyncio.gather(*(collect(engine, wish) for wish in wishes))
    for wish, result in zip(wishes, results, strict=True):
        alone = make_engine()
        alone.add(wish)
        assert result == {k: token_ids(v) for k, v in run(alone).items()}


async def test_several_sequences_in_one_call(engine) -> None:
    names = [str(n) for n in range(5)]
    result = await collect(engine, *(request(n, [5, 6], max_tokens=3 + int(n)) for n in names))
    assert {name: len(tokens) for name, tokens in result.items()} == {n: 3 + int(n) for n in names}


async def test_leaving_frees_its_memory(engine) -> None:
    steps = engine.generate([request("a", [5, 6], max_tokens=400)])
    await anext(steps)
    await steps.aclose()
    await until_idle(engine)
    assert not engine._engine.has_unfinished
    engine._engine.cache_manager.check_integrity()
    assert not engine._streams


async def test_cancelled_while_waiting_frees_its_memory(engine) -> None:
    task = asyncio.create_task(collect(engine, request("a", [5, 6], max_tokens=500)))
    while not engine._engine.has_unfinished:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_idle(engine)
    assert not engine._engine.has_unfinished


async def test_abort_of_one_lets_the_other_go_on(engine) -> None:
    wishes = [request("a", [5], max_tokens=300), request("b", [6], max_tokens=20)]
    counts = {"a": 0, "b": 0}
    async with aclosing(engine.generate(wishes)) as steps:
        async for outputs in steps:
            for output in outputs:
                counts[output.request_id] += 1
            engine.abort("a")
            engine.abort("a")
    assert counts["b"] == 20
    assert counts["a"] < 300


class Faulty:
    """A runner that fails whenever a sequence with one of these ids is in the batch."""

    def __init__(self, runner: ModelRunner, *request_ids: str) -> None:
        self.runner = runner
        self.request_ids = request_ids

    def run(self, batch: ScheduledBatch) -> StepResult:
        if any(item.seq.request_id in self.request_ids for item in batch.items):
            raise ValueError("the secret prompt")
        return self.runner.run(batch)


async def test_a_fault_in_one_request_ends_that_request(engine, make_engine, caplog) -> None:
    engine._engine.runner = Faulty(engine._engine.runner, "bad")
    wishes = [request(name, [5, 6, 7], max_tokens=20) for name in ("a", "bad", "b")]
    reasons: dict[str, FinishReason] = {}
    tokens: dict[str, list[int]] = {}
    async with aclosing(engine.generate(wishes)) as steps:
        async for outputs in steps:
            for output in outputs:
                tokens.setdefault(output.request_id, []).append(output.token_id)
                if output.finish_reason is not None:
                    reasons[output.request_id] = output.finish_reason
    assert reasons == {"a": "length", "b": "length", "bad": "error"}
    alone = make_engine()
    alone.add(wishes[0])
    assert tokens["a"] == tokens["b"] == token_ids(run(alone)["a"])
    engine.check_health()
    engine._engine.cache_manager.check_integrity()
    assert "secret" not in caplog.text


async def test_an_abort_from_elsewhere_ends_the_generation(engine) -> None:
    task = asyncio.create_task(collect(engine, request("a", [5, 6], max_tokens=500)))
    while not engine._engine.has_unfinished:
        await asyncio.sleep(0)
    engine.abort("a")
    await asyncio.wait_for(task, 30)


async def test_a_model_that_always_fails_counts_as_dead(engine, caplog) -> None:
    class Broken:
        def run(self, batch: object) -> list:
            raise ValueError("the secret prompt")

    streams = [engine.generate([request(str(n), [5], max_tokens=400)]) for n in range(2)]
    for stream in streams:
        await anext(stream)
    with caplog.at_level(logging.ERROR):
        engine._engine.runner = Broken()
        for stream in streams:
            async for outputs in stream:
                last = outputs[-1]
            assert last.finish_reason is FinishReason.ERROR
        for number in range(MAX_FAILED_STEPS):
            with contextlib.suppress(EngineDeadError):
                await collect(engine, request(f"next-{number}", [5]))
    with pytest.raises(EngineDeadError):
        engine.check_health()
    with pytest.raises(EngineDeadError):
        await collect(engine, request("late", [5]))
    assert "ValueError" in caplog.text
    assert "secret" not in caplog.text


async def test_a_broken_adapter_is_not_the_models_fault(engine) -> None:
    layers = engine._engine.runner.layers
    path, (num_inputs, num_outputs) = next(iter(layers.shapes.items()))
    broken = LowRank(torch.full((1, num_inputs), torch.inf), torch.ones(num_outputs, 1))
    adapter = layers.prepare("broken", {path: broken})
    expected = await collect(engine, request("before", [5, 6]))
    for number in range(2 * MAX_FAILED_STEPS):
        wish = replace(request(str(number), [5, 6]), adapters=(adapter,))
        steps = engine.generate([wish])
        outputs = [output for outputs in [o async for o in steps] for output in outputs]
        assert [output.finish_reason for output in outputs] == [FinishReason.ERROR]
    assert (await collect(engine, request("after", [5, 6])))["after"] == expected["before"]


async def test_stop_ends_what_is_running(make_engine) -> None:
    engine = AsyncEngine(make_engine())
    stream = engine.generate([request("a", [5], max_tokens=500)])
    await anext(stream)
    await asyncio.to_thread(engine.stop)
    with pytest.raises(GenerationAbortedError):
        async for _ in stream:
            pass
    assert "inference" not in {thread.name for thread in threading.enumerate()}
    engine.stop()
    with pytest.raises(EngineDeadError):
        await collect(engine, request("late", [5]))


async def test_everything_can_be_ended_at_once(engine) -> None:
    """Each caller keeps what it has, and others may come."""
    began = asyncio.Event()

    async def collect_until_ended(name: str) -> int:
        num_steps = 0
        async with aclosing(engine.generate([request(name, [5], ignore_eos=True)])) as steps:
            async for _ in steps:
                num_steps += 1
                began.set()
        return num_steps

    callers = [asyncio.create_task(collect_until_ended(str(n))) for n in range(3)]
    await asyncio.wait_for(began.wait(), 30)
    engine.abort_all()
    counts = await asyncio.wait_for(asyncio.gather(*callers), 30)
    assert max(counts) >= 1
    assert sum(counts) < 3 * 511, "the context was filled"
    await until_idle(engine)


async def test_requests_that_leave_no_token_are_not_the_models_fault(engine) -> None:
    wishes = {"allowed_token_ids": (6,), "no_repeat_ngram_size": 1}
    for number in range(2 * MAX_FAILED_STEPS):
        steps = engine.generate([request(str(number), [5, 6], **wishes)])
        outputs = [output for outputs in [o async for o in steps] for output in outputs]
        assert [output.finish_reason for output in outputs] == [FinishReason.ERROR]
    await collect(engine, request("good", [5, 6]))


async def test_a_prompt_that_would_never_fit_ends_at_once(engine) -> None:
    for prompt in ([], [5] * 513):
        steps = [outputs async for outputs in engine.generate([request("long", prompt)])]
        assert [o.finish_reason for outputs in steps for o in outputs] == [FinishReason.ERROR]
    await collect(engine, request("good", [5, 6]))


async def test_the_background_is_not_ended_with_all_others(engine) -> None:
    behind = replace(request("behind", [5, 6], max_tokens=30), is_background=True)
    task = asyncio.create_task(collect(engine, behind))
    steps = engine.generate([request("asked", [7], max_tokens=400)])
    await anext(steps)
    engine.abort_all()
    assert [outputs async for outputs in steps] == []
    assert len((await task)["behind"]) == 30
