"""Int8 layers against the ones they stand for, and a sequence's tokens alone against in company."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import Qwen2Config

from modules.engine.engine import Engine, EngineConfig
from modules.engine.fused_layers import Int8DecoderLayer, quantize_model
from modules.engine.quantization import FINER, Int8Linear, quantize_rows
from tests.engine.conftest import CONFIGS, SHAPE, build_model, request, run, token_ids
from tests.engine.test_engine import random_prompts

CONFIGS = CONFIGS | {"qwen2": Qwen2Config(**{k: v for k, v in SHAPE.items() if k != "head_dim"})}
KNOWN = ("llama", "mistral-sliding", "qwen2")


@pytest.mark.parametrize(("num_terms", "error"), [(1, 0.5 / 127), (2, 0.5 / 127 / FINER)])
def test_rows_are_represented_within_half_a_step(num_terms: int, error: float) -> None:
    x = torch.randn(7, 96) * torch.tensor([1e-3, 1, 50, 1, 1e4, 1, 1])[:, None]
    terms, scale = quantize_rows(x, num_terms)
    parts = terms.double().chunk(num_terms)
    restored = sum(part / FINER**power for power, part in enumerate(parts)) * scale
    largest = x.abs().amax(-1, keepdim=True)
    assert ((restored - x).abs() / largest).max() <= error * 1.001


def test_a_row_of_zeros_stays_zero() -> None:
    terms, scale = quantize_rows(torch.zeros(2, 8), 2)
    assert not terms.any() and scale.isfinite().all()


def test_linear_is_that_of_its_rounded_weights() -> None:
    torch.manual_seed(0)
    linears = [nn.Linear(64, 48), nn.Linear(64, 16)]
    x = torch.randn(5, 64)
    expected = torch.cat([linear(x) for linear in linears], dim=-1)
    relative = (Int8Linear(linears, 2)(x) - expected).norm() / expected.norm()
    assert relative < 0.01


def test_a_row_does_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    linear = Int8Linear([nn.Linear(576, 1536)], 2)
    x = torch.randn(64, 576)
    whole = linear(x)
    for rows in (slice(0, 1), slice(3, 5), slice(10, 47)):
        assert torch.equal(linear(x[rows]), whole[rows])


@pytest.mark.parametrize("name", KNOWN)
def test_the_model_says_nearly_the_same(name: str, make_engine) -> None:
    """Logits of every position of a prompt, through the cache, against transformers' own."""
    model = build_model(name, CONFIGS)
    prompt = random_prompts(1, 60)[0]
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0]
    assert quantize_model(quantized := copy.deepcopy(model))
    assert isinstance(quantized.base_model.layers[0], Int8DecoderLayer)

    seen = []
    engine = Engine(quantized, EngineConfig(max_model_len=512, num_cache_tokens=512))
    forward = engine.runner._forward
    engine.runner._forward = lambda batch: (seen.append(forward(batch)), seen[-1])[1]
    for length in range(1, len(prompt)):  # a prompt of each length, then one token more
        engine.add(request("x", prompt[:length], max_tokens=1))
        run(engine)
    relative = (torch.cat(seen) - expected[:-1]).norm() / expected.norm()
    assert relative < 0.03


@pytest.mark.parametrize("name", KNOWN)
def test_tokens_alone_equal_tokens_in_company(name: str) -> None:
    model = build_model(name, CONFIGS)
    assert quantize_model(model)

    def build() -> Engine:
        config = EngineConfig(
            max_model_len=512, num_cache_tokens=4096, max_num_batched_tokens=16, max_num_seqs=4
        )
        return Engine(copy.deepcopy(model), config)

    together = build()
    wishes = [
        request(str(n), prompt, temperature=float(n % 2), seed=n)
        for n, prompt in enumerate(random_prompts(12))
    ]
    for wish in wishes:
        together.add(wish)
    outputs = run(together)
    for wish in wishes:
        alone = build()
        alone.add(wish)
        assert token_ids(run(alone)[wish.request_id]) == token_ids(outputs[wish.request_id])


def test_what_is_not_known_is_left_as_it_is() -> None:
    model = build_model("gemma2-softcap-sliding", CONFIGS)
    before = [type(layer) for layer in model.base_model.layers]
    assert not quantize_model(model)
    assert [type(layer) for layer in model.base_model.layers] == before
