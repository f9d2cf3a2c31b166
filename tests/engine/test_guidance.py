"""Guidance by a negative prompt against transformers' own, alone and beside others."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from modules.engine.engine import Engine
from modules.engine.guidance import apply_guidance
from modules.engine.outputs import FinishReason
from modules.engine.sequence import SequenceRequest
from tests.engine.conftest import CONFIGS, build_model, request, run, token_ids
from tests.engine.test_engine import generate, random_prompts
from tests.engine.test_generate_engine import build_alone
from tests.engine.test_generate_engine import make as make_alone

SCALES = (1.5, 3.0, 0.5, -1.0)


def guided(
    name: str, prompt: list[int], negative: list[int], scale: float, **params: object
) -> SequenceRequest:
    wish = request(name, prompt, guidance_scale=scale, **params)
    return replace(wish, negative_prompt_token_ids=tuple(negative))


def generate_guided(
    model: PreTrainedModel, prompt: list[int], negative: list[int], scale: float, **options: object
) -> list[int]:
    ids = torch.tensor([negative])
    return generate(
        model,
        prompt,
        guidance_scale=scale,
        negative_prompt_ids=ids,
        negative_prompt_attention_mask=torch.ones_like(ids),
        **options,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_guided_beside_others_equals_generate(name: str, make_engine) -> None:
    model = build_model(name)
    engine = make_engine(model, max_num_batched_tokens=24, max_num_seqs=5)
    prompts, negatives = random_prompts(8), random_prompts(8, seed=9)
    negatives[0] = prompts[0][-1:]  # what an empty negative prompt means
    outputs: dict[str, list] = {}
    for number, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        engine.add(guided(str(number), prompt, negative, SCALES[number % 4]))
        engine.add(request(f"plain {number}", prompt))
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    for name_, rest in run(engine).items():
        outputs.setdefault(name_, []).extend(rest)
    differing = 0
    for number, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        expected = generate_guided(model, prompt, negative, SCALES[number % 4])
        plain = generate(model, prompt)
        assert token_ids(outputs[str(number)]) == expected, f"prompt {number}"
        assert token_ids(outputs[f"plain {number}"]) == plain
        differing += expected != plain
    assert differing >= 6


def test_a_pair_runs_where_only_one_may(make_engine, tiny_model) -> None:
    engine = make_engine(max_num_seqs=1, max_num_batched_tokens=1)
    wishes = {number: random_prompts(2, seed=number) for number in range(3)}
    for number, (prompt, negative) in wishes.items():
        engine.add(guided(str(number), prompt, negative, 2.0))
    outputs = run(engine)
    for number, (prompt, negative) in wishes.items():
        expected = generate_guided(tiny_model, prompt, negative, 2.0)
        assert token_ids(outputs[str(number)]) == expected


def test_both_count_as_running(make_engine) -> None:
    engine = make_engine(max_num_seqs=3)
    for number in range(3):
        engine.add(guided(str(number), [5, 6, number], [7, 8], 2.0))
    engine.step()
    assert len(engine.scheduler.running) == 2


def test_the_longer_prompt_bounds_the_reply(make_engine) -> None:
    engine = make_engine(max_model_len=128, num_cache_tokens=128)
    engine.add(guided("a", [5, 6, 7], [*range(5, 55)], 2.0, max_tokens=None))
    outputs = run(engine)["a"]
    assert len(outputs) == 64 - 50  # of the cache, each has a half
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_an_end_of_sequence_token_ends_both(make_engine, tiny_model) -> None:
    expected = generate_guided(tiny_model, [5, 6, 7], [8, 9], 2.0)
    engine = make_engine(eos_token_ids=frozenset({expected[5]}))
    engine.add(guided("a", [5, 6, 7], [8, 9], 2.0))
    assert token_ids(run(engine)["a"]) == expected[: expected.index(expected[5]) + 1]
    assert engine.cache_manager.num_free_blocks == engine.cache_manager.num_blocks


def test_seeded_guidance_is_the_same_in_company(make_engine) -> None:
    prompts = random_prompts(8)
    wishes = [
        guided(str(i), prompt, prompts[i - 1], 1.5, temperature=1.0, seed=i)
        for i, prompt in enumerate(prompts)
    ]
    together, alone = make_engine(), {}
    for wish in wishes:
        together.add(wish)
        engine = make_engine()
        engine.add(wish)
        alone |= {name: token_ids(outputs) for name, outputs in run(engine).items()}
    assert {name: token_ids(outputs) for name, outputs in run(together).items()} == alone


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_pairs_stay_together(seed: int, make_engine, tiny_model) -> None:
    draw = random.Random(seed)
    engine = make_engine(
        max_model_len=256,
        num_cache_tokens=512,
        max_num_seqs=7,
        max_num_batched_tokens=draw.choice((16, 64)),
    )
    preempted = count_preemptions(engine)
    wishes: dict[str, SequenceRequest] = {}
    outputs: dict[str, list[int]] = {}
    while engine.has_unfinished or len(wishes) < 24:
        if len(wishes) < 24 and draw.random() < 0.2:
            wish = draw_wish(draw, str(len(wishes)))
            wishes[wish.request_id] = wish
            engine.add(wish)
        if wishes and draw.random() < 0.02:
            name = draw.choice([*wishes])
            engine.abort(name)
            outputs.setdefault(name, []).append(-1)
        for output in engine.step() if engine.has_unfinished else ():
            outputs.setdefault(output.request_id, []).append(output.token_id)
        check_pairs(engine)
    assert preempted
    assert engine.cache_manager.num_free_blocks == engine.cache_manager.num_blocks
    for name, wish in wishes.items():
        if -1 not in outputs[name]:
            assert outputs[name] == expect(tiny_model, wish)


def draw_wish(draw: random.Random, name: str) -> SequenceRequest:
    shared = [7] * draw.randrange(0, 100)
    prompt, negative = (
        [*shared, *(draw.randrange(3, 300) for _ in range(draw.randrange(1, 40)))] for _ in range(2)
    )
    if draw.random() < 0.3:
        return request(name, prompt, max_tokens=50)
    return guided(name, prompt, negative, 2.0, max_tokens=50)


def expect(model: PreTrainedModel, wish: SequenceRequest) -> list[int]:
    prompt = list(wish.prompt_token_ids)
    if wish.negative_prompt_token_ids is None:
        return generate(model, prompt, max_new_tokens=50)
    negative = list(wish.negative_prompt_token_ids)
    return generate_guided(model, prompt, negative, 2.0, max_new_tokens=50)


def count_preemptions(engine: Engine) -> list[tuple]:
    preempted = []
    preempt = engine.scheduler._preempt
    engine.scheduler._preempt = lambda unit: (preempted.append(unit), preempt(unit))[1]
    return preempted


def check_pairs(engine: Engine) -> None:
    engine.cache_manager.check_integrity()
    running = engine.scheduler.running
    for seq in running:
        assert all(member in running for member in seq.unit)
        assert len({member.num_output_tokens for member in seq.unit}) == 1
    assert all(seq.primary is None for seq in engine.scheduler.waiting)


@pytest.mark.parametrize("kind", ["mamba", "bloom"])
def test_models_that_run_alone_are_guided_too(kind: str) -> None:
    model = build_alone(kind)
    prompt, negative = random_prompts(2)
    # Its own cache of the negative prompt does not work with every model.
    expected = generate_guided(model, prompt, negative, 2.0, use_cache=False)
    engine = make_alone(model)
    engine.add(guided("a", prompt, negative, 2.0))
    assert token_ids(run(engine)["a"]) == expected
    assert expected != generate(build_alone(kind), prompt)


def test_what_a_model_rules_out_stays_ruled_out() -> None:
    logits = torch.tensor([[1.0, 2.0, -torch.inf]])
    negative = torch.tensor([[2.0, 1.0, -torch.inf]])
    guided = apply_guidance(logits, negative, torch.tensor([1.5]))
    assert guided.isfinite().tolist() == [[True, True, False]]
