"""Kinds of models: which are batched and which run alone, and that both say what `generate` says.

A kind that changes its list has changed what its users get: batching is not lost in silence.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from modules.engine.engine import Engine, EngineConfig
from modules.engine.generate_engine import GenerateEngine
from modules.model_loading import try_out
from tests.engine.conftest import CONFIGS, SHAPE, build_model, request, run, token_ids
from tests.engine.test_engine import generate, random_prompts
from tests.engine.test_probe import REFUSED

WINDOW = 24
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
NO_HEAD_DIM = {"head_dim": None}
UNTIED = {"tie_word_embeddings": False}

BATCHED: dict[str, dict[str, Any] | PretrainedConfig] = {
    **CONFIGS,
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": {**MIXED, **UNTIED},
    "phi": {},
    "phi3": {"sliding_window": WINDOW},
    "gpt2": {},
    # what transformers takes for its decoder is its head
    "modernbert-decoder": {"cls_token_id": 1, "sep_token_id": 2},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "mixtral": {"num_local_experts": 4, "sliding_window": WINDOW},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": EXPERTS,
    "cohere": UNTIED,
    "cohere2": {**MIXED, **UNTIED},
    "olmo2": {},
    "granite": {},
    "glm4": {},
    "exaone4": MIXED,
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": {"sliding_window": WINDOW},
}
ALONE: dict[str, dict[str, Any]] = {
    **{kind: overrides for kind, (overrides, _) in REFUSED.items() if kind != "bert"},
    # attention of their own
    "falcon": {**NO_HEAD_DIM, "alibi": False},
    "falcon with alibi": {**NO_HEAD_DIM, "model_type": "falcon", "alibi": True},
    "bloom": UNTIED,
    "mpt": {},
    "gptj": {"rotary_dim": 8},
    "stablelm": {},
    # state-space layers, some beside attention
    "mamba2": {"state_size": 8, "num_heads": 8, "n_groups": 1},
    "jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "bamba": {
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    "rwkv": {"attention_hidden_size": 64},
    # encoder-decoders
    "t5": {"d_kv": 16, "d_ff": 96, "num_decoder_layers": 2, "decoder_start_token_id": 0},
    "bart": {
        **NO_HEAD_DIM,
        **UNTIED,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
    },
}


def build(name: str, overrides: dict[str, Any] | PretrainedConfig) -> PreTrainedModel:
    if isinstance(overrides, dict):
        values = {**SHAPE, "model_type": name, **overrides}
        kind = values.pop("model_type")
        config = AutoConfig.for_model(kind, **{k: v for k, v in values.items() if v is not None})
    else:
        config = copy.deepcopy(overrides)
    return build_model(name, {name: config})


def say(engine: Engine | GenerateEngine, prompts: list[list[int]]) -> list[list[int]]:
    for number, prompt in enumerate(prompts):
        engine.add(request(str(number), prompt))
    outputs = run(engine)
    return [token_ids(outputs[str(number)]) for number in range(len(prompts))]


@pytest.mark.parametrize("name", [*BATCHED, *ALONE])
def test_says_what_generate_says(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = build(name, BATCHED[name] if name in BATCHED else ALONE[name])
    prompts = [prompt * 2 for prompt in random_prompts(3, WINDOW)]
    assert max(map(len, prompts)) > WINDOW
    expected = [generate(model, prompt) for prompt in prompts]
    assert len({token for tokens in expected for token in tokens}) > 5, "too easy"

    is_batched = try_out("tiny", model, 512)
    assert is_batched == (name in BATCHED)
    config = EngineConfig(max_model_len=512, num_cache_tokens=2048)
    engine = Engine(model, config) if is_batched else GenerateEngine(model, config)
    assert say(engine, prompts) == expected
    assert ("Requests run one at a time" in caplog.text) != is_batched
