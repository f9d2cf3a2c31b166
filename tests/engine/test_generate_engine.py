"""One sequence at a time: as the engine in all that callers see, and what it holds afterwards."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from transformers import LlamaConfig, PreTrainedModel

from modules.engine.async_engine import AsyncEngine
from modules.engine.engine import EngineConfig
from modules.engine.generate_engine import GenerateEngine
from modules.engine.outputs import FinishReason
from tests.engine.conftest import SHAPE, build_model, request, run, token_ids
from tests.engine.test_async_engine import collect, until_idle
from tests.engine.test_engine import generate, random_prompts
from tests.engine.test_families import ALONE, build

PROMPT = random_prompts(1, 60)[0]


def make(model: PreTrainedModel, max_model_len: int = 512, **options: Any) -> GenerateEngine:
    config = EngineConfig(max_model_len=max_model_len, num_cache_tokens=max_model_len, **options)
    return GenerateEngine(model, config)


def build_alone(kind: str) -> PreTrainedModel:
    return build(kind, ALONE[kind])


@pytest.mark.parametrize(
    "wish",
    [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9, "ignore_eos": True},
        {"temperature": 1.3, "top_k": 20, "min_p": 0.05, "num_logprobs": 0},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"repetition_penalty": 1.3, "stop_token_ids": tuple(range(100, 150))},
        {"max_tokens": None},
    ],
    ids=lambda wish: next(iter(wish)),
)
def test_every_wish_is_met_as_by_the_engine(wish: dict, make_engine, tiny_model) -> None:
    options = {"max_model_len": 100, "eos_token_ids": frozenset(range(200, 220))}
    outputs = []
    for engine in (make(build_model("llama"), **options), make_engine(**options)):
        engine.add(request("a", PROMPT, seed=7, **{"max_tokens": 30, **wish}))
        outputs.append([(o.token_id, o.finish_reason, o.logprob) for o in run(engine)["a"]])
    alone, batched = ([(i, reason) for i, reason, _ in output] for output in outputs)
    assert alone == batched
    for (*_, alone_logprob), (*_, batched_logprob) in zip(*outputs, strict=True):
        assert alone_logprob == pytest.approx(batched_logprob, abs=1e-3)


def test_first_come_first_served() -> None:
    engine = make(build_alone("mamba"))
    for name in ("a", "b", "c"):
        engine.add(request(name, PROMPT, max_tokens=3))
    with pytest.raises(ValueError, match="a is running already"):
        engine.add(request("a", PROMPT))
    order = []
    while engine.has_unfinished:
        order += [output.request_id for output in engine.step()]
    assert order == list("aaabbbccc")
    assert not engine._decoding


@pytest.mark.parametrize("kind", ["mamba", "t5"])
def test_the_background_gives_way_and_says_the_same(kind: str) -> None:
    wishes = [
        replace(request("behind", PROMPT, max_tokens=8), is_background=True),
        replace(request("next", PROMPT[5:], max_tokens=3), is_background=True),
        request("asked", PROMPT[2:], max_tokens=4),
    ]
    alone = {}
    for wish in wishes:
        engine = make(build_alone(kind))
        engine.add(wish)
        alone |= {name: token_ids(outputs) for name, outputs in run(engine).items()}
    engine = make(build_alone(kind))
    for wish in wishes[:2]:
        engine.add(wish)
    steps = [*engine.step(), *engine.step()]
    engine.add(wishes[2])
    while engine.has_unfinished:
        steps += engine.step()
        assert len(engine._decoding) <= 1
    order = ["behind"] * 2 + ["asked"] * 4 + ["behind"] * 6 + ["next"] * 3
    assert [output.request_id for output in steps] == order
    for name, expected in alone.items():
        assert token_ids([o for o in steps if o.request_id == name]) == expected


def test_where_nothing_may_be_read_twice_the_background_goes_on_to_its_end() -> None:
    engine = make(build_alone("mamba"), is_deterministic=True)
    for name in ("behind", "next"):
        engine.add(replace(request(name, PROMPT, max_tokens=2), is_background=True))
    order = [output.request_id for output in engine.step()]
    engine.add(request("asked", PROMPT, max_tokens=1))
    while engine.has_unfinished:
        order += [output.request_id for output in engine.step()]
    assert order == ["behind", "behind", "asked", "next", "next"]


@pytest.mark.parametrize("kind", ["mamba", "t5"])
def test_abort_frees_at_once(kind: str) -> None:
    engine = make(build_alone(kind))
    for name in ("running", "waiting", "next"):
        engine.add(request(name, PROMPT, max_tokens=50))
    engine.step()
    state = [weakref.ref(decoding) for pair in engine._decoding.values() for decoding in pair]
    assert state
    for name in ("waiting", "running", "running", "unknown"):
        engine.abort(name)
    assert not any(ref() for ref in state)
    assert [output.request_id for output in engine.step()] == ["next"]
    assert engine.fail("next").finish_reason is FinishReason.ERROR
    assert not engine.has_unfinished
    assert not engine._decoding


@pytest.mark.parametrize("kind", ["mamba", "t5", "bloom"])
@pytest.mark.parametrize("bad_call", [1, 4])
def test_a_step_that_failed_can_be_tried_again(kind: str, bad_call: int) -> None:
    model = build_alone(kind)
    expected = generate(model, PROMPT)
    engine = make(model)
    engine.add(request("a", PROMPT))
    fail_once(model, bad_call)
    tokens: list[int] = []
    failures = 0
    while engine.has_unfinished:
        batch = engine.schedule()
        try:
            tokens += token_ids(engine.execute(batch))
        except RuntimeError:
            failures += 1
    assert (tokens, failures) == (expected, 1)


def fail_once(model: PreTrainedModel, bad_call: int) -> None:
    """In the head: the layers have changed their state by then."""
    calls: list[int] = []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) == bad_call:
            raise RuntimeError

    model.get_output_embeddings().register_forward_hook(fail)


def test_prompt_and_reply_have_a_context_each_with_an_encoder() -> None:
    engine = make(build_alone("bart"), max_model_len=64)
    engine.add(request("a", (PROMPT * 4)[:63], max_tokens=None))
    outputs = run(engine)["a"]
    assert len(outputs) == 63
    assert outputs[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("kind", ["mamba", "bloom", "t5", "bart"])
def test_padding_in_a_prompt_is_a_token_like_others(kind: str) -> None:
    model = build_alone(kind)
    prompt = [0, *PROMPT[:5], 0, 0, *PROMPT[5:10], 0]
    expected = generate(model, prompt)
    engine = make(model)
    engine.add(request("a", prompt))
    assert token_ids(run(engine)["a"]) == expected


def test_a_models_own_taste_is_not_asked_but_its_format_is_kept() -> None:
    model = build_alone("bart")
    model.generation_config.forced_bos_token_id = 77
    expected = generate(model, PROMPT)
    tastes: dict[str, Any] = {
        "num_beams": 4,
        "do_sample": True,
        "min_length": 50,
        "no_repeat_ngram_size": 1,
        "repetition_penalty": 3.0,
        "max_length": 5,
        "suppress_tokens": expected[1:4],
    }
    model.generation_config.update(**tastes)
    engine = make(model)
    engine.add(request("a", PROMPT))
    assert token_ids(run(engine)["a"]) == expected
    assert expected[0] == 77


def test_positions_that_follow_the_length_forget_the_last_sequence() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    config = LlamaConfig(**{**SHAPE, "max_position_embeddings": 32}, rope_parameters=rope)

    def build_dynamic() -> PreTrainedModel:
        return build_model("llama", {"llama": config})

    medium, long = PROMPT * 3, PROMPT * 9
    assert len(medium) > 32
    expected = generate(build_dynamic(), medium)
    engine = make(build_dynamic())
    engine.add(request("long", long))
    engine.add(request("medium", medium))
    assert token_ids(run(engine)["medium"]) == expected


# Behind the bridge


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def make_async() -> Any:
    engines = []

    def make_one(model: PreTrainedModel) -> AsyncEngine:
        engines.append(AsyncEngine(make(model)))
        return engines[-1]

    yield make_one
    for engine in engines:
        engine.stop()


@pytest.mark.anyio
async def test_who_leaves_makes_room(make_async: Callable[..., AsyncEngine]) -> None:
    engine = make_async(build_alone("mamba"))
    steps = engine.generate([request("a", PROMPT, max_tokens=400)])
    await anext(steps)
    await steps.aclose()
    await until_idle(engine)
    assert not engine._engine.has_unfinished


@pytest.mark.anyio
async def test_a_fault_that_passes_is_not_noticed(make_async: Callable[..., AsyncEngine]) -> None:
    model = build_alone("t5")
    expected = generate(model, PROMPT)
    engine = make_async(model)
    fail_once(model, 4)
    assert await collect(engine, request("a", PROMPT)) == {"a": expected}
    engine.check_health()
