"""Every type of a GGUF file's tensors, from the file to the engine's numbers, against a model of
transformers' whose weights are what the gguf package makes of the same blocks.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from modules.errors import ModelLoadError
from modules.gguf import convert
from modules.loaded_model import LoadedModel
from modules.model_loading import load_model
from tests.engine.conftest import request
from tests.modules.conftest import make_settings
from tests.modules.test_gguf import HEADS, KV_HEADS, LAYERS, TOKENS, quantize, silent, write_llama

WIDTH = INNER = 256  # values in a block of the K-quants
SIZE = 0.1  # of a weight, more or less
PROMPT = list(range(5, 35))
NUM_TOP = 20
TOLERANCE = 5e-5  # of a logprob; see the test

# Where a block's scales are (float16) → what they are to be. The others of its bytes may have any
# value: numbers of few bits. With these scales they come to weights around 0, of about SIZE.
BLOCKS: dict[Kind, dict[int, float]] = {
    Kind.Q2_K: {80: SIZE / 8, 82: SIZE / 8 * 1.5},
    Kind.Q3_K: {108: SIZE / 40},
    Kind.Q4_K: {0: SIZE / 150, 2: SIZE / 150 * 7.5},
    Kind.Q5_K: {0: SIZE / 300, 2: SIZE / 300 * 15.5},
    Kind.Q6_K: {208: SIZE / 1400},
    Kind.IQ4_NL: {0: SIZE / 60},
    Kind.IQ4_XS: {0: SIZE / 1200},
}
QUANTIZED = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.F32, Kind.F16, Kind.BF16)


def store(values: np.ndarray, kind: Kind) -> np.ndarray:
    """As the gguf package does it, or, where it can only read a type, as random blocks."""
    return random_blocks(values.shape, kind) if kind in BLOCKS else quantize(values, kind)


def random_blocks(shape: tuple[int, ...], kind: Kind) -> np.ndarray:
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(shape[0])
    blocks = rng.integers(0, 256, (shape[0], shape[1] // size, num_bytes), np.uint8)
    for start, scale in BLOCKS[kind].items():
        blocks[..., start : start + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return blocks.reshape(shape[0], -1)


def build_reference(path: Path) -> LlamaForCausalLM:
    """By the gguf package's own reader, and names written down here."""
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    model = LlamaForCausalLM(config).eval()
    values = {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).reshape(
            tensor.shape[::-1].tolist()
        )
        for tensor in gguf.GGUFReader(path).tensors
    }
    weights = {to_name(name): torch.tensor(to_order(name, v)) for name, v in values.items()}
    model.load_state_dict(weights)
    return model


NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def to_name(name: str) -> str:
    *block, part, _ = name.split(".")
    return f"model.layers.{block[1]}.{NAMES[part]}.weight" if block else f"{NAMES[part]}.weight"


def to_order(name: str, values: np.ndarray) -> np.ndarray:
    """llama.cpp has the two halves of a head that are rotated together next to each other."""
    heads = HEADS if ".attn_q." in name else KV_HEADS if ".attn_k." in name else 0
    if not heads:
        return values
    pairs = values.reshape(heads, -1, 2, values.shape[1])
    return pairs.swapaxes(1, 2).reshape(values.shape)


@torch.inference_mode()
def compute_logits(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.tensor([PROMPT])).logits[0]


async def score(model: LoadedModel) -> dict[int, dict[int, float]]:
    """Place → token → logprob, of the likeliest after each token of the prompt but the last."""
    scored = {"prompt_logprobs": True, "num_logprobs": NUM_TOP, "max_tokens": 0}
    found = {}
    async for outputs in model.engine.generate([request("1", PROMPT, **scored)]):
        for output in outputs:
            found[len(found)] = dict(output.top_logprobs)
    return {place - 1: top for place, top in found.items() if place}


@pytest.mark.parametrize("kind", (*QUANTIZED, *BLOCKS), ids=lambda kind: kind.name)
def test_logits_are_those_of_the_numbers_in_the_file(kind: Kind, tmp_path: Path) -> None:
    path = write_llama(tmp_path / "tiny.gguf", kind, width=WIDTH, inner=INNER, store=store)
    reference = build_reference(path)
    spread = reference.lm_head.weight.std()
    assert SIZE / 2 < spread < SIZE * 2  # else the test would see little
    expected = compute_logits(reference)
    # Converting keeps each number as it is, so that not one bit of the logits may differ.
    settings = make_settings(tmp_path, dtype="float32")
    folder = convert(path, tmp_path / ".converted", silent)
    converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(compute_logits(converted), expected)
    # The engine adds up the same products in another order. A sum of a few hundred float32 numbers
    # is off by some 1e-6 of its size then, and logits are up to 12: 5e-6 has been seen, and another
    # processor's order may be ten times as far off.
    model = load_model("tiny", settings)
    try:
        scored = asyncio.run(score(model))
    finally:
        model.engine.stop()
    logprobs = expected.log_softmax(-1)
    assert len(scored) == len(PROMPT) - 1
    for place, top in scored.items():
        assert len(top) == NUM_TOP
        row = logprobs[place]
        assert list(top.values()) == pytest.approx(row.topk(NUM_TOP).values.tolist(), abs=TOLERANCE)
        assert list(top.values()) == pytest.approx([row[i].item() for i in top], abs=TOLERANCE)


def test_a_type_that_cannot_be_read_is_told_at_once(tmp_path: Path) -> None:
    """Q8_K is llama.cpp's own, for what it computes meanwhile."""

    def store_bytes(values: np.ndarray, kind: Kind) -> np.ndarray:
        return np.zeros((values.shape[0], 292), np.uint8) if kind is Kind.Q8_K else values

    path = write_llama(
        tmp_path / "tiny.gguf", Kind.Q8_K, width=WIDTH, inner=INNER, store=store_bytes
    )
    lines: list[str] = []
    with pytest.raises(ModelLoadError, match=r"tiny\.gguf .* type Q8_K cannot be read"):
        convert(path, tmp_path / "cache", lines.append)
    assert not lines
