"""Int8 and int4 layers against the ones they stand for, and tokens alone against in company."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from modules.engine.attention import Segment
from modules.engine.cpu_kernels import GROUP
from modules.engine.engine import Engine, EngineConfig
from modules.engine.fused_layers import FusedLayers, quantize_model
from tests.engine.conftest import CONFIGS, SHAPE, build_model, request, run, token_ids
from tests.engine.test_engine import random_prompts

CONFIGS = CONFIGS | {"qwen2": Qwen2Config(**{k: v for k, v in SHAPE.items() if k != "head_dim"})}
KNOWN = ("llama", "mistral-sliding", "qwen2")
formats = pytest.mark.parametrize("dtype", ["int8", "int4"])


@formats
@pytest.mark.parametrize("name", KNOWN)
def test_the_model_says_nearly_the_same(name: str, dtype: str) -> None:
    """Logits of every position of a prompt, through the cache, against transformers' own."""
    model = build_model(name, CONFIGS)
    if dtype == "int4":
        round_weights(model)
    prompt = random_prompts(1, 60)[0]
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0]
    assert quantize_model(quantized := copy.deepcopy(model), dtype)
    assert isinstance(quantized.base_model.layers[0], FusedLayers)

    seen = []
    engine = Engine(quantized, EngineConfig(max_model_len=512, num_cache_tokens=512))
    forward = engine.runner.forward
    engine.runner.forward = lambda batch: (seen.append(forward(batch)), seen[-1])[1]
    for length in range(1, len(prompt)):  # a prompt of each length, then one token more
        engine.add(request("x", prompt[:length], max_tokens=1))
        run(engine)
    relative = (torch.cat(seen) - expected[:-1]).norm() / expected.norm()
    assert relative < 0.05


@formats
@pytest.mark.parametrize("name", KNOWN)
def test_logits_are_the_same_to_the_last_bit_in_any_company_and_any_chunks(
    name: str, dtype: str
) -> None:
    model = build_model(name, CONFIGS)
    assert quantize_model(model, dtype)
    prompts = torch.randint(3, SHAPE["vocab_size"], (3, 150)).tolist()

    def read(chunk_size: int, company: bool) -> torch.Tensor:
        """Logits after each chunk of the first prompt."""
        engine = Engine(model, EngineConfig(max_model_len=512, num_cache_tokens=1024))
        attention, logits = engine.runner._attention, []
        for start in range(0, 150, chunk_size):
            end = min(150, start + chunk_size)
            others = prompts[1:] if company else []
            segments, ids, positions = [], [], []
            for number, prompt in enumerate([prompts[0], *others]):
                table = tuple(range(3 * number, 3 * number + 3))
                segments.append(Segment(table, len(ids), start, end))
                ids += prompt[start:end]
                positions += range(start, end)
            with torch.inference_mode():
                output = model(
                    torch.tensor([ids]),
                    position_ids=torch.tensor([positions]),
                    use_cache=False,
                    attention_batch=attention.batch(tuple(segments)),
                )
            logits.append(output.logits[0, : end - start])
        return torch.cat(logits)

    expected = read(chunk_size=150, company=False)
    for chunk_size in (1, 7, 64, 150):
        for company in (False, True):
            assert torch.equal(read(chunk_size, company), expected), (chunk_size, company)


@formats
@pytest.mark.parametrize("name", KNOWN)
def test_tokens_alone_equal_tokens_in_company(name: str, dtype: str) -> None:
    model = build_model(name, CONFIGS)
    assert quantize_model(model, dtype)

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


@formats
def test_what_is_not_known_is_left_as_it_is(dtype: str) -> None:
    model = build_model("gemma2-softcap-sliding", CONFIGS)
    before = [type(layer) for layer in model.base_model.layers]
    assert not quantize_model(model, dtype)
    assert [type(layer) for layer in model.base_model.layers] == before


@pytest.mark.parametrize("option", [{"attention_bias": True}, {"mlp_bias": True}])
def test_biases_where_none_are_known_are_not_lost(option: dict[str, bool]) -> None:
    assert not quantize_model(build_model("biased", {"biased": LlamaConfig(**SHAPE, **option)}))


def test_sizes_that_fill_no_vector() -> None:
    shape = SHAPE | {"hidden_size": 60, "intermediate_size": 52, "head_dim": 10, "vocab_size": 301}
    model = build_model("odd", {"odd": LlamaConfig(**shape)})
    prompt = torch.randint(3, 300, (1, 70))
    with torch.inference_mode():
        expected = model(prompt).logits[0, -1]
    assert quantize_model(model)
    engine = Engine(model, EngineConfig(max_model_len=128, num_cache_tokens=128))
    seen = []
    forward = engine.runner.forward
    engine.runner.forward = lambda batch: (seen.append(forward(batch)), seen[-1])[1]
    engine.add(request("x", prompt[0].tolist(), max_tokens=1))
    run(engine)
    assert (seen[-1][0] - expected).norm() / expected.norm() < 0.05


def round_weights(model: torch.nn.Module) -> None:
    """To 16 levels per group of a layer's weight: so files have them that were made in 4 bits."""
    for layer in model.base_model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                groups = module.weight.data.unflatten(1, (-1, GROUP))
                least, most = (limit[..., None] for limit in groups.aminmax(dim=-1))
                step = (most - least) / 15
                groups.copy_(((groups - least) / step).round() * step + least)
