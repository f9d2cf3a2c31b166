"""Beam search over the engine against transformers' own."""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from modules.engine import searches
from modules.engine.async_engine import AsyncEngine
from modules.engine.beam_search import BeamOptions, search_beams
from modules.engine.contrastive_search import ContrastiveOptions
from modules.engine.engine import Engine, EngineConfig
from modules.engine.generate_engine import GenerateEngine
from modules.engine.outputs import FinishReason, TokenOutput
from modules.engine.searches import SearchOptions
from modules.engine.sequence import SequenceRequest
from modules.errors import GenerationAbortedError, GenerationFailedError
from tests.engine.conftest import request, token_ids
from tests.engine.test_engine import generate, random_prompts
from tests.engine.test_generate_engine import build_alone

EOS = frozenset(range(2, 60))  # so many that beams end now and then


def search(
    model: PreTrainedModel,
    prompt: list[int],
    options: BeamOptions,
    *,
    n: int = 1,
    eos_token_ids: frozenset[int] = frozenset(),
    **params: object,
) -> list[list[int]]:
    """The token ids of the best beams, by way of the inference thread."""
    wish = request("a", prompt, **params)
    wishes = [replace(wish, request_id=str(number)) for number in range(n)]
    engine = AsyncEngine(build_engine(copy.deepcopy(model)))
    try:
        found = collect(search_beams(engine.generate, wishes, options, eos_token_ids))
    finally:
        engine.stop()
    return [token_ids(found[wish.request_id]) for wish in wishes]


def build_engine(model: PreTrainedModel) -> Engine | GenerateEngine:
    config = EngineConfig(max_model_len=512, num_cache_tokens=4096)
    is_batched = model.config.model_type == "llama"
    return Engine(model, config) if is_batched else GenerateEngine(model, config)


def collect(
    outputs: AsyncGenerator[list[TokenOutput], None],
) -> dict[str, list[TokenOutput]]:
    async def collect_all() -> dict[str, list[TokenOutput]]:
        found: dict[str, list[TokenOutput]] = {}
        async for batch in outputs:
            for output in batch:
                found.setdefault(output.request_id, []).append(output)
        return found

    return asyncio.run(collect_all())


def generate_beams(
    model: PreTrainedModel,
    prompt: list[int],
    options: BeamOptions,
    eos_token_ids: frozenset[int],
    max_tokens: int,
    **more: object,
) -> list[int]:
    ids = generate(
        model,
        prompt,
        num_beams=options.num_beams,
        length_penalty=options.length_penalty,
        early_stopping=options.early_stopping,
        eos_token_id=sorted(eos_token_ids) or None,
        max_new_tokens=max_tokens,
        **more,
    )
    end = next((i + 1 for i, token in enumerate(ids) if token in eos_token_ids), len(ids))
    return ids[:end]


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.5, -1.0])
@pytest.mark.parametrize("num_beams", [2, 5])
def test_the_best_beam_is_that_of_generate(
    num_beams: int, length_penalty: float, early_stopping: bool, tiny_model
) -> None:
    options = BeamOptions(
        num_beams=num_beams, length_penalty=length_penalty, early_stopping=early_stopping
    )
    lengths = set()
    for seed in range(4):
        (prompt,) = random_prompts(1, seed=seed)
        model = tiny_model
        expected = generate_beams(model, prompt, options, EOS, 24)
        (found,) = search(model, prompt, options, eos_token_ids=EOS, max_tokens=24)
        assert found == expected, f"seed {seed}"
        lengths.add(len(found))
    assert len(lengths) > 1 or length_penalty > 1  # some have ended


def test_the_n_best_beams_are_those_of_generate(tiny_model) -> None:
    options = BeamOptions(num_beams=4)
    (prompt,) = random_prompts(1)
    ids = torch.tensor([prompt])
    expected = tiny_model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=4,
        num_return_sequences=3,
        max_new_tokens=10,
        do_sample=False,
        pad_token_id=0,
    )
    found = search(tiny_model, prompt, options, n=3, max_tokens=10)
    assert found == expected[:, len(prompt) :].tolist()


def test_beams_go_on_over_blocks(tiny_model) -> None:
    options = BeamOptions(num_beams=3)
    prompt = random_prompts(1, seed=6)[0] * 4
    expected = generate_beams(tiny_model, prompt, options, frozenset(), 150)
    assert search(tiny_model, prompt, options, max_tokens=150) == [expected]


@pytest.mark.parametrize("kind", ["bloom", "bart"])
def test_beams_of_models_that_run_alone(kind: str) -> None:
    options = BeamOptions(num_beams=3)
    (prompt,) = random_prompts(1)
    model = build_alone(kind)
    expected = generate_beams(model, prompt, options, EOS, 8)
    assert search(build_alone(kind), prompt, options, eos_token_ids=EOS, max_tokens=8) == [expected]


def test_tokens_that_are_to_be_ignored_end_no_beam(tiny_model) -> None:
    options = BeamOptions(num_beams=3)
    (prompt,) = random_prompts(1)
    expected = generate_beams(tiny_model, prompt, options, frozenset(), 12)
    (found,) = search(tiny_model, prompt, options, eos_token_ids=EOS, ignore_eos=True)
    assert found == expected
    own = frozenset(expected[3:4])
    (found,) = search(tiny_model, prompt, options, stop_token_ids=tuple(own))
    assert found == generate_beams(tiny_model, prompt, options, own, 12)


def test_log_probabilities_are_those_of_the_beam(tiny_model) -> None:
    engine = AsyncEngine(build_engine(copy.deepcopy(tiny_model)))
    try:
        wish = request("a", [5, 6, 7], num_logprobs=2, max_tokens=6)
        options = BeamOptions(num_beams=2)
        found = collect(search_beams(engine.generate, [wish], options, frozenset()))["a"]
    finally:
        engine.stop()
    ids = token_ids(found)
    logits = tiny_model(torch.tensor([[5, 6, 7, *ids]])).logits[0, 2:-1].log_softmax(-1)
    assert [o.logprob for o in found] == pytest.approx(
        [row[i].item() for row, i in zip(logits, ids, strict=True)], abs=1e-4
    )
    assert all(len(output.top_logprobs) == 2 for output in found)
    assert [o.finish_reason for o in found] == [*itertools.repeat(None, 5), FinishReason.LENGTH]


@pytest.mark.parametrize(
    ("reason", "error"),
    [
        (FinishReason.ERROR, GenerationFailedError),
        (FinishReason.ABORT, GenerationAbortedError),
    ],
)
def test_a_failure_is_passed_on(reason: FinishReason, error: type[Exception]) -> None:
    async def fail(requests: list[SequenceRequest]) -> AsyncGenerator[list[TokenOutput], None]:
        yield [TokenOutput(wish.request_id, 0, reason) for wish in requests]

    with pytest.raises(error):
        collect(search_beams(fail, [request("a", [5])], BeamOptions(num_beams=2), frozenset()))


@pytest.mark.parametrize("length_penalty", [1e6, -1e6])
def test_no_length_penalty_is_too_much(length_penalty: float, tiny_model) -> None:
    options = BeamOptions(num_beams=3, length_penalty=length_penalty)
    (found,) = search(tiny_model, [5, 6, 7], options, eos_token_ids=EOS)
    assert found


@pytest.mark.parametrize("is_contrastive", [False, True])
def test_what_is_told_to_abort_ends(is_contrastive: bool, tiny_model) -> None:
    engine = AsyncEngine(build_engine(copy.deepcopy(tiny_model)))
    options: SearchOptions = BeamOptions(num_beams=3)
    if is_contrastive:
        options = ContrastiveOptions(penalty_alpha=0.6, top_k=3)

    async def generate_a_little(
        requests: list[SequenceRequest],
    ) -> AsyncGenerator[list[TokenOutput], None]:
        steps = engine.generate(requests)
        if len(requests[0].output_token_ids) == 4:
            asyncio.get_running_loop().call_soon(engine.abort_all)
        async for outputs in steps:
            yield outputs

    try:
        wish = request("a", [5, 6, 7], max_tokens=400)
        found = collect(searches.search(generate_a_little, [wish], options, frozenset()))["a"]
    finally:
        engine.stop()
    assert len(found) >= 3
    assert all(output.finish_reason is None for output in found)
