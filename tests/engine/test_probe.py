"""The probe: it lets through what a batch cannot change, and says what can run alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from modules.engine.probe import count_kv_bytes, probe, probe_alone
from modules.errors import ModelLoadError, NotBatchableError
from tests.engine import conftest
from tests.engine.conftest import CONFIGS, SHAPE

NUM_LAYERS = SHAPE["num_hidden_layers"]


def build_model(name: str, configs: dict[str, PretrainedConfig] = CONFIGS) -> PreTrainedModel:
    """With a configuration of its own, as loading changes it."""
    return conftest.build_model(name, copy.deepcopy(configs))


def build(model_type: str, **overrides: Any) -> PreTrainedModel:
    config: PretrainedConfig = AutoConfig.for_model(model_type, **{**SHAPE, **overrides})
    return build_model(model_type, {model_type: config})


@pytest.mark.parametrize("name", CONFIGS)
def test_measures_keys_and_values_of_a_model_it_lets_through(name: str) -> None:
    expected = NUM_LAYERS * 2 * 2 * 16 * 4  # keys and values, 2 heads of 16, 4 bytes
    model = build_model(name)
    probe(model)
    assert count_kv_bytes(model) == expected


def test_windows_are_as_long_as_before() -> None:
    model = build("gemma2", sliding_window=200)
    windows = [getattr(module, "sliding_window", None) for module in model.modules()]
    assert 200 in windows
    probe(model)
    assert model.config.sliding_window == 200
    assert [getattr(module, "sliding_window", None) for module in model.modules()] == windows


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float16, 4)])
def test_a_smaller_type_may_round(dtype: torch.dtype, size: int) -> None:
    model = build_model("llama").to(dtype)
    probe(model)
    # On the CPU, keys and values are bfloat16 or float32.
    assert count_kv_bytes(model) == NUM_LAYERS * 2 * 2 * 16 * size


def test_measures_heads_that_the_configuration_does_not_tell() -> None:
    model = build(
        "deepseek_v3",
        num_key_value_heads=4,
        head_dim=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        kv_lora_rank=16,
        q_lora_rank=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    )
    probe(model)
    assert count_kv_bytes(model) == NUM_LAYERS * 4 * (8 + 16 + 16) * 4


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "lfm2": (
        {"layer_types": ["conv", *["full_attention"] * (NUM_LAYERS - 1)]},
        "state outside the cache",
    ),
    "recurrent_gemma": ({"block_types": ["recurrent", "attention"], "lru_width": 64}, "state"),
    "minimax": ({"num_local_experts": 4}, "linear attention"),
    "diffllama": ({}, "two calls with the index of one layer"),
    "llama4_text": (
        {
            "attention_chunk_size": 16,
            "num_local_experts": 2,
            "intermediate_size_mlp": 96,
            "no_rope_layers": [1] * NUM_LAYERS,
        },
        "attention by chunks",
    ),
    "bert": ({}, "an encoder sees what follows"),
    "nemotron": ({}, "keeps arguments to itself"),
    "qwen2_moe": (
        {
            "sliding_window": 200,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention"] * NUM_LAYERS,
        },
        "a window that only its masks know, however long",
    ),
    "mamba": ({"state_size": 8}, "no attention at all"),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_refuses_what_a_batch_would_change(model_type: str) -> None:
    overrides, _ = REFUSED[model_type]
    model = build(model_type, **overrides)
    attention = model.config._attn_implementation
    with pytest.raises(NotBatchableError, match=f'"{model_type}".*cannot be batched') as error:
        probe(model)
    assert "\n" not in str(error.value)
    assert model.config._attn_implementation == attention


def test_an_encoder_is_of_no_use_alone_either() -> None:
    with pytest.raises(ModelLoadError, match=r'"bert".*cannot be served: it generates no text'):
        probe_alone(build("bert"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [(lambda logits: logits * torch.nan, "FloatingPointError"), (lambda logits: 1 / 0, "Zero")],
)
def test_what_does_not_run_alone_is_refused(change: Callable[[Any], Any], reason: str) -> None:
    model = build("mamba", state_size=8)
    patch_forward(model.lm_head, change)
    with pytest.raises(ModelLoadError, match=rf'"mamba".*cannot be served: {reason}') as error:
        probe_alone(model)
    assert "\n" not in str(error.value)


def patch_forward(module: nn.Module, change: Callable[[Any], Any]) -> None:
    original = module.forward
    module.forward = lambda *args, **kwargs: change(original(*args, **kwargs))  # type: ignore[method-assign]


def test_a_small_difference_is_one_in_float32() -> None:
    """The tolerance is no more than what the order of additions needs."""
    model = build_model("llama")
    calls: list[int] = []

    def change(logits: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        wave = torch.linspace(0, 40, logits.shape[-1]).sin() * logits.std()
        return logits + 0.01 * len(calls) * wave

    patch_forward(model.lm_head, change)
    with pytest.raises(NotBatchableError, match="its results would be wrong"):
        probe(model)


def test_results_that_are_no_numbers_are_refused() -> None:
    model = build_model("llama")
    patch_forward(model.lm_head, lambda logits: logits * torch.nan)
    with pytest.raises(NotBatchableError, match="its results would be wrong"):
        probe(model)


def test_a_layer_without_keys_and_values_is_refused() -> None:
    model = build_model("llama")
    model.config.num_hidden_layers = NUM_LAYERS + 1
    with pytest.raises(NotBatchableError, match="once per token and layer"):
        probe(model)


def test_too_little_memory_is_not_blamed_on_the_kind_of_model() -> None:
    model = build_model("llama")

    def fail(_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    patch_forward(model.lm_head, fail)
    for try_out in (probe, probe_alone):
        with pytest.raises(torch.OutOfMemoryError):
            try_out(model)


def test_a_model_with_random_state_gets_the_same_prompts_each_time() -> None:
    seen: list[list[int]] = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"]))
        hook = model.model.embed_tokens.register_forward_pre_hook
        hook(lambda _, args: seen.append(args[0].flatten().tolist()))
        probe(model)
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
