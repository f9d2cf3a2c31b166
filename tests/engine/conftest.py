"""Tiny models of real architectures with random weights, and an engine around one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from modules.engine.engine import Engine, EngineConfig
from modules.engine.generate_engine import GenerateEngine
from modules.engine.outputs import TokenOutput
from modules.engine.sampling_params import SamplingParams
from modules.engine.sequence import SequenceRequest

VOCAB_SIZE = 300
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "mistral-sliding": MistralConfig(**SHAPE, sliding_window=24),
    "gemma2-softcap-sliding": Gemma2Config(
        **SHAPE,
        sliding_window=24,
        attn_logit_softcapping=5.0,
        tie_word_embeddings=False,  # tied, it says one token again and again
        attn_implementation="eager",
    ),
    "gpt-oss-sinks-sliding": GptOssConfig(
        **SHAPE,
        sliding_window=24,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="eager",
    ),
}


def build_model(name: str, configs: dict[str, PretrainedConfig] = CONFIGS) -> PreTrainedModel:
    torch.manual_seed(0)
    config = copy.deepcopy(configs[name])  # a model changes its own
    auto_model = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto_model.from_config(config)
    with torch.no_grad():  # the default initialisation is so small that every logit is a near-tie
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model.generation_config.eos_token_id = None
    model.generation_config.forced_eos_token_id = None
    return model.eval()


@pytest.fixture(scope="session")
def tiny_model() -> PreTrainedModel:
    """A Llama; engines take copies of it, so it stays as transformers made it."""
    return build_model("llama")


EngineFactory = Callable[..., Engine]


@pytest.fixture
def make_engine(tiny_model: PreTrainedModel) -> EngineFactory:
    def make(model: PreTrainedModel = tiny_model, **overrides: object) -> Engine:
        config = {"max_model_len": 512, "num_cache_tokens": 4096, **overrides}
        return Engine(copy.deepcopy(model), EngineConfig(**config))  # type: ignore[arg-type]

    return make


def request(name: str, prompt: list[int], **params: object) -> SequenceRequest:
    wishes = {"temperature": 0.0, "max_tokens": 12, **params}
    return SequenceRequest(name, tuple(prompt), SamplingParams(**wishes))  # type: ignore[arg-type]


def run(engine: Engine | GenerateEngine) -> dict[str, list[TokenOutput]]:
    """Step until nothing is left; the outputs of each request, in order."""
    outputs: dict[str, list[TokenOutput]] = {}
    while engine.has_unfinished:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        if isinstance(engine, Engine):
            engine.cache_manager.check_integrity()
    return outputs


def token_ids(outputs: list[TokenOutput]) -> list[int]:
    return [output.token_id for output in outputs]
