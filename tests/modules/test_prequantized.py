"""Folders whose weights another program has stored in fewer bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from modules import prequantized
from modules.errors import ModelLoadError
from modules.model_loading import _load_config, _load_weights, load_model
from modules.prequantized import prepare, quantization_of
from modules.settings import Settings
from tests.modules.conftest import build_model, make_settings, one_line, save

BLOCK = 32
FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}


def set_quantization(folder: Path, quantization: dict[str, Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": quantization}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("quantization", "packages"),
    [
        ({"quant_method": "awq", "bits": 4}, "gptqmodel"),
        ({"quant_method": "gptq", "bits": 4}, "gptqmodel optimum"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "torchao"),
    ],
)
def test_a_missing_package_is_named(
    quantization: dict[str, Any],
    packages: str,
    model_dir: Path,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        prequantized, "find_spec", lambda name: name if name == "accelerate" else None
    )
    set_quantization(tiny, quantization)
    with pytest.raises(ModelLoadError) as error:
        load_model("tiny", make_settings(model_dir))
    method = quantization.get("quant_method", "bitsandbytes")
    assert f"{tiny} cannot be loaded: its weights are in the format {method}" in one_line(error)
    assert one_line(error).endswith(f"pip install {packages}")


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "of-the-future"}, "format of-the-future, and Unknown quantization type"),
        ({"quant_method": "eetq"}, "format eetq, and only a CUDA card can compute with that"),
        ({"quant_method": "hqq"}, "format hqq, and A valid HQQ version"),
        ({"quant_method": "fp8", "weight_block_size": [1]}, "format fp8, and "),
        ({"bits": 4}, r"config\.json .* has no `quant_method`\.$"),
    ],
)
def test_what_cannot_be_loaded_is_told_before_it_is(
    quantization: dict[str, Any], message: str, model_dir: Path, tiny: Path
) -> None:
    set_quantization(tiny, quantization)
    with pytest.raises(ModelLoadError, match=message) as error:
        load_model("tiny", make_settings(model_dir))
    assert str(tiny) in one_line(error)


def test_fewer_bits_still_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card, where the weights stay as they are."""
    config = PretrainedConfig(quantization_config=dict(FP8))
    with pytest.raises(ModelLoadError, match="format fp8, and it cannot be made int8"):
        prepare(Path("somewhere"), config, Settings(dtype="int8"), "cuda")
    assert "dequantize" not in config.quantization_config


def test_numbers_are_nothing_to_prepare() -> None:
    config = PretrainedConfig()
    prepare(Path("somewhere"), config, Settings(dtype="int8"), "cpu")
    assert quantization_of(config) is None


def to_fp8(folder: Path) -> dict[str, torch.Tensor]:
    """Store the matrices of the layers as blocks of 8-bit numbers, each with a scale; the weights
    that this comes to.
    """
    weights = load_file(folder / "model.safetensors")
    stored, meant = {}, {}
    for name, weight in weights.items():
        if not name.endswith("proj.weight"):
            stored[name] = meant[name] = weight
            continue
        scales = torch.tensor(
            [
                [block.abs().max() / 448 for block in row.split(BLOCK, 1)]
                for row in weight.split(BLOCK, 0)
            ]
        )
        spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        spread = spread[: weight.shape[0], : weight.shape[1]]
        stored[name] = (weight / spread).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scales
        meant[name] = stored[name].float() * spread
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    set_quantization(folder, FP8)
    return meant


def test_on_a_cpu_fp8_becomes_numbers(model_dir: Path, tiny: Path) -> None:
    meant = to_fp8(tiny)
    settings = make_settings(model_dir, dtype="float32")
    config = _load_config(tiny, settings)
    model = _load_weights(tiny, config, settings, "cpu", reads_images=False)
    assert quantization_of(model.config) is None  # int8 and int4 may be made of them
    weights = model.state_dict()
    assert weights.keys() == meant.keys()
    for name, expected in meant.items():
        assert weights[name].dtype == torch.float32
        # Scaled in float32 here and there: what is left is one rounding.
        assert torch.allclose(weights[name], expected, rtol=2**-20, atol=0)


# E2M1, of OCP's Microscaling Formats specification, by its four bits.
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def to_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """Random numbers of four bits for the experts' matrices, 32 of them to a power of two; the
    weights that this comes to, [experts, inputs, outputs].
    """
    generator = torch.Generator().manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    meant = {}
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, num_inputs, num_outputs = weights.pop(name).shape
        shape = (experts, num_outputs, num_inputs // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 125, shape, dtype=torch.uint8, generator=generator)
        weights[f"{name}_blocks"], weights[f"{name}_scales"] = blocks, scales
        pairs = torch.stack((blocks & 15, blocks >> 4), dim=-1).int()
        numbers = FP4[pairs].flatten(-2) * 2.0 ** (scales.int() - 127).unsqueeze(-1)
        meant[name] = numbers.flatten(-2).transpose(1, 2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    set_quantization(folder, {"quant_method": "mxfp4"})
    return meant


def test_on_a_cpu_mxfp4_becomes_numbers(tmp_path: Path) -> None:
    folder = save(tmp_path / "experts", build_model("gpt-oss-sinks-sliding"))
    meant = to_mxfp4(folder)
    settings = make_settings(tmp_path, dtype="float32")
    config = _load_config(folder, settings)
    model = _load_weights(folder, config, settings, "cpu", reads_images=False)
    assert meant and quantization_of(model.config) is None
    weights = model.state_dict()
    for name, expected in meant.items():
        assert torch.equal(weights[name].float(), expected)  # few bits: exact in all types
