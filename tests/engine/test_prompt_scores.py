"""The probabilities of a prompt's tokens, against transformers' own logits."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from modules.engine.engine import Engine, EngineConfig
from modules.engine.generate_engine import GenerateEngine
from modules.engine.logprobs import compute_logprobs
from modules.engine.outputs import FinishReason, TokenOutput
from tests.engine.conftest import CONFIGS, build_model, request, run, token_ids
from tests.engine.test_engine import generate, random_prompts
from tests.engine.test_families import ALONE, build

MakeEngine = Callable[[PreTrainedModel], Engine | GenerateEngine]

SCORES = {"prompt_logprobs": True, "num_logprobs": 3}


def make_alone(model: PreTrainedModel) -> GenerateEngine:
    return GenerateEngine(model, EngineConfig(max_model_len=512, num_cache_tokens=512))


@torch.inference_mode()
def expect_scores(model: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    """[len(prompt), vocab_size]: what the model says comes after each of the tokens."""
    ids = torch.tensor([prompt])
    logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


def assert_scored(outputs: list[TokenOutput], model: PreTrainedModel, prompt: list[int]) -> None:
    """That `outputs` begin with those of the prompt, once each, with the right numbers."""
    scored = outputs[: len(prompt)]
    assert token_ids(scored) == prompt
    assert [output.is_prompt for output in outputs] == [
        i < len(prompt) for i in range(len(outputs))
    ]
    assert scored[0].logprob is None
    assert scored[0].top_logprobs == ()
    expected = expect_scores(model, prompt)
    for place, output in enumerate(scored[1:], 1):
        row = expected[place - 1]
        assert output.logprob == pytest.approx(row[prompt[place]].item(), abs=1e-3)
        top = row.topk(3)
        assert [logprob for _, logprob in output.top_logprobs] == pytest.approx(
            top.values.tolist(), abs=1e-3
        )
        for token_id, logprob in output.top_logprobs:
            assert logprob == pytest.approx(row[token_id].item(), abs=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_chunked_prompts_in_company(name: str, make_engine) -> None:
    model = build_model(name)
    engine = make_engine(model, max_num_batched_tokens=128, max_num_seqs=5)
    prompts = random_prompts(9, 200)
    for number, prompt in enumerate(prompts):
        wishes = SCORES if number % 2 == 0 else {}
        engine.add(request(str(number), prompt, **wishes, max_tokens=6))
    outputs = run(engine)
    for number, prompt in enumerate(prompts):
        expected = generate(model, prompt, max_new_tokens=6)
        if number % 2 == 0:
            assert_scored(outputs[str(number)], model, prompt)
            outputs[str(number)] = outputs[str(number)][len(prompt) :]
        assert token_ids(outputs[str(number)]) == expected
        assert not any(output.is_prompt for output in outputs[str(number)])


@pytest.mark.parametrize("kind", ["batched", "alone", "mamba"])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_a_prompt_that_is_only_scored(kind: str, length: int, make_engine, tiny_model) -> None:
    model = build("mamba", ALONE["mamba"]) if kind == "mamba" else tiny_model
    make = {"batched": make_engine}.get(kind, make_alone)
    prompt = [number * 7 % 290 + 5 for number in range(length)]
    engine = make(copy.deepcopy(model))
    engine.add(request("a", prompt, **SCORES, max_tokens=0))
    outputs = run(engine)["a"]
    assert len(outputs) == length
    assert_scored(outputs, model, prompt)
    assert [output.finish_reason for output in outputs] == [None] * (length - 1) + ["length"]


def test_by_generate_with_a_reply(tiny_model: PreTrainedModel) -> None:
    engine = make_alone(copy.deepcopy(tiny_model))
    prompt = random_prompts(1, 60)[0]
    for name in ("a", "b"):
        engine.add(request(name, prompt, **SCORES, max_tokens=5))
    for outputs in run(engine).values():
        assert_scored(outputs, tiny_model, prompt)
        assert token_ids(outputs[len(prompt) :]) == generate(tiny_model, prompt, max_new_tokens=5)


def test_a_preempted_prompt_is_reported_once(make_engine, tiny_model) -> None:
    engine = make_engine(max_num_batched_tokens=128, num_cache_tokens=512, max_num_seqs=6)
    prompts = [prompt * 4 for prompt in random_prompts(6, 30)]
    for number, prompt in enumerate(prompts):
        engine.add(request(str(number), prompt, **SCORES, max_tokens=100))
    preempted = []
    preempt = engine.scheduler._preempt
    engine.scheduler._preempt = lambda unit: (preempted.append(unit), preempt(unit))[1]
    outputs = run(engine)
    assert preempted
    for number, prompt in enumerate(prompts):
        assert_scored(outputs[str(number)], tiny_model, prompt)
        expected = generate(tiny_model, prompt, max_new_tokens=100)
        assert token_ids(outputs[str(number)][len(prompt) :]) == expected


def test_preempted_amid_its_prompt(make_engine, tiny_model) -> None:
    engine = make_engine(max_num_batched_tokens=128)
    prompt = random_prompts(1, 400, seed=8)[0] * 2
    assert len(prompt) > 3 * 64
    engine.add(request("a", prompt, **SCORES, max_tokens=2))
    outputs = [output for _ in range(2) for output in engine.step()]
    engine.scheduler._preempt(engine.scheduler.running[0].unit)
    outputs += run(engine)["a"]
    assert_scored(outputs, tiny_model, prompt)


def test_what_is_cached_is_read_again_and_kept(make_engine, tiny_model) -> None:
    engine = make_engine()
    prompt = [number % 290 + 5 for number in range(300)]
    cached = []
    for number, wishes in enumerate(({}, SCORES, {})):
        engine.add(request(str(number), prompt, **wishes, max_tokens=1))
        outputs = run(engine)[str(number)]
        cached.append(outputs[-1].num_cached_tokens)
        if wishes:
            assert_scored(outputs, tiny_model, prompt)
    assert cached == [0, 0, 256]


def test_scores_do_not_depend_on_company(make_engine) -> None:
    prompts = random_prompts(6, 150)
    together = make_engine(max_num_batched_tokens=128)
    alone = {}
    for number, prompt in enumerate(prompts):
        wish = request(str(number), prompt, **SCORES, max_tokens=0)
        together.add(wish)
        engine = make_engine(max_num_batched_tokens=128)
        engine.add(wish)
        alone |= run(engine)
    outputs = run(together)
    for name, expected in alone.items():
        assert [o.logprob for o in outputs[name][1:]] == pytest.approx(
            [o.logprob for o in expected[1:]], abs=1e-4
        )


@pytest.mark.parametrize("rows", [64, 65])
def test_abort_amid_a_prompt_frees_all(make_engine, rows: int) -> None:
    engine = make_engine(max_num_batched_tokens=128)
    engine.add(request("a", list(range(5, 5 + rows)) * 3, **SCORES, max_tokens=0))
    engine.step()
    engine.abort("a")
    engine.cache_manager.check_integrity()
    assert not engine.has_unfinished
    assert engine.cache_manager.num_free_blocks == engine.cache_manager.num_blocks


def test_what_is_no_number_is_a_fault() -> None:
    logits = torch.zeros(2, 5)
    logits[1, 3] = float("nan")
    with pytest.raises(FloatingPointError):
        compute_logprobs(logits, [0, 0], [1, 1])


def test_the_end_of_a_scored_prompt_is_its_length(make_engine) -> None:
    """Also where a token of it would end a reply."""
    engine = make_engine(eos_token_ids=frozenset({7}))
    engine.add(request("a", [5, 7, 6, 7], **SCORES, max_tokens=0))
    assert [output.finish_reason for output in run(engine)["a"]] == [
        None,
        None,
        None,
        FinishReason.LENGTH,
    ]
