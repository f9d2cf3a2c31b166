"""Contrastive search over the engine against its definition, written out."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from modules.engine.async_engine import AsyncEngine
from modules.engine.contrastive_search import ContrastiveOptions, search_contrastively
from modules.engine.engine import Engine, EngineConfig
from modules.engine.fused_layers import quantize_model
from modules.engine.generate_engine import GenerateEngine
from modules.engine.outputs import FinishReason, TokenOutput
from modules.engine.sequence import SequenceRequest
from tests.engine.conftest import CONFIGS, build_model, request, run, token_ids
from tests.engine.test_beam_search import collect
from tests.engine.test_engine import generate, random_prompts
from tests.engine.test_generate_engine import build_alone

OPTIONS = ContrastiveOptions(penalty_alpha=0.6, top_k=4)


def search(
    engine: Engine | GenerateEngine,
    wish: SequenceRequest,
    options: ContrastiveOptions = OPTIONS,
    eos_token_ids: frozenset[int] = frozenset(),
) -> list[TokenOutput]:
    bridge = AsyncEngine(engine)
    try:
        found = collect(search_contrastively(bridge.generate, wish, options, eos_token_ids))
    finally:
        bridge.stop()
    return found[wish.request_id]


@torch.no_grad()
def search_by_definition(
    model: PreTrainedModel, prompt: list[int], num_tokens: int, options: ContrastiveOptions
) -> list[int]:
    """Reads the whole text again for each candidate."""
    text = list(prompt)
    for _ in range(num_tokens):
        probs = model(torch.tensor([text])).logits[0, -1].softmax(-1)
        scores = {}
        for token_id in probs.topk(options.top_k).indices.tolist():
            states = []
            hook = model.get_output_embeddings().register_forward_pre_hook(
                lambda _, inputs, states=states: states.append(inputs[0][0])
            )
            model(torch.tensor([[*text, token_id]]))
            hook.remove()
            *context, own = states[0]
            likeness = max(torch.cosine_similarity(own, other, dim=0).item() for other in context)
            alpha = options.penalty_alpha
            scores[token_id] = (1 - alpha) * probs[token_id].item() - alpha * likeness
        text.append(max(scores, key=lambda token_id: scores[token_id]))
    return text[len(prompt) :]


@pytest.mark.parametrize(
    ("name", "alpha"), [*((name, 0.6) for name in CONFIGS), ("llama", 0.3), ("llama", 0.9)]
)
def test_tokens_are_those_of_the_definition(name: str, alpha: float, make_engine) -> None:
    model = build_model(name)
    options = ContrastiveOptions(penalty_alpha=alpha, top_k=4)
    (prompt,) = random_prompts(1, seed=11)
    engine = make_engine(model, max_num_batched_tokens=24)
    found = token_ids(search(engine, request("a", prompt, max_tokens=16), options))
    assert found == search_by_definition(model, prompt, 16, options)


def test_it_is_not_greedy(tiny_model) -> None:
    (prompt,) = random_prompts(1, seed=11)
    assert search_by_definition(tiny_model, prompt, 16, OPTIONS) != generate(tiny_model, prompt)


@pytest.mark.parametrize("kind", ["bloom", "mamba"])
def test_models_that_run_alone(kind: str) -> None:
    model = build_alone(kind)
    (prompt,) = random_prompts(1)
    config = EngineConfig(max_model_len=512, num_cache_tokens=512)
    engine = GenerateEngine(copy.deepcopy(model), config)
    found = token_ids(search(engine, request("a", prompt, max_tokens=8)))
    assert found == search_by_definition(model, prompt, 8, OPTIONS)


def test_it_goes_on_over_blocks_to_the_end_of_the_context(make_engine, tiny_model) -> None:
    prompt = random_prompts(1, 60, seed=7)[0] * 2
    engine = make_engine(max_model_len=len(prompt) + 40)
    found = search(engine, request("a", prompt, max_tokens=40))
    assert found[-1].finish_reason is FinishReason.LENGTH
    assert token_ids(found) == search_by_definition(tiny_model, prompt, 40, OPTIONS)


def test_an_end_of_sequence_token_ends_it(make_engine, tiny_model) -> None:
    expected = search_by_definition(tiny_model, [5, 6, 7], 12, OPTIONS)
    end = expected[5]
    found = search(make_engine(), request("a", [5, 6, 7]), eos_token_ids=frozenset({end}))
    assert token_ids(found) == expected[: expected.index(end) + 1]
    assert found[-1].finish_reason is FinishReason.STOP


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_hidden_states_of_fused_layers_are_those_of_the_model(dtype: str, make_engine) -> None:
    model = build_model("llama")
    with torch.no_grad():
        model.base_model.norm.weight.mul_(torch.linspace(0.2, 3, 64))
    states = {}
    for number in range(2):
        engine = make_engine(copy.deepcopy(model))
        if number:
            quantized = copy.deepcopy(model)
            assert quantize_model(quantized, dtype)
            engine = make_engine(quantized)
        engine.add(
            request(
                "a",
                [*range(5, 25)],
                max_tokens=1,
                hidden_states=True,
                num_logprobs=0,
                prompt_logprobs=True,
            )
        )
        outputs = run(engine)["a"]
        states[number] = torch.tensor(np.stack([o.hidden_state for o in outputs[1:]]))
    least = 0.99 if dtype == "int8" else 0.9
    assert torch.cosine_similarity(states[0], states[1]).mean().item() > least
