"""Folders whose weights another program has stored in fewer bits."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPTQConfig,
    PretrainedConfig,
    TorchAoConfig,
)

from modules import prequantized
from modules.errors import ModelLoadError
from modules.model_loading import _load_config, _load_weights, _placement, load_model
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


def test_a_format_is_called_the_same_before_and_after_loading() -> None:
    for given in ({"quant_method": "gptq", "bits": 4}, GPTQConfig(bits=4)):
        assert quantization_of(PretrainedConfig(quantization_config=given)) == "gptq"


@pytest.mark.parametrize("is_card_there", [False, True])
def test_nothing_is_put_on_a_card_that_shall_not_be_used(
    is_card_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_card_there)
    placement = _placement(Settings(cpu=True), "cpu", is_quantized=True)
    assert placement == ({"device_map": {"": "cpu"}} if is_card_there else {})


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


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("weight_scale_inv", "tiny lacks the scales of 1 of its weights, such as model.layers.0."),
        ("q_proj.weight", "tiny: weights are missing or damaged, or not what its config.json"),
    ],
)
def test_damaged_fp8_is_named(end: str, message: str, model_dir: Path, tiny: Path) -> None:
    to_fp8(tiny)
    weights = load_file(tiny / "model.safetensors")
    damaged = min(name for name in weights if name.endswith(end))
    weights[damaged] = weights[damaged][1:]
    if end == "weight_scale_inv":
        del weights[damaged]
    save_file(weights, tiny / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError) as error:
        load_model("tiny", make_settings(model_dir))
    assert message in one_line(error)


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


# Formats of packages that are not among the requirements: run where somebody has them.

Weights = dict[str, torch.Tensor]
GROUP = 32


def map_matrices(
    folder: Path, store: Callable[[torch.Tensor], tuple[Weights, torch.Tensor]]
) -> Weights:
    """Store those of the layers as `store` says: tensors by the end of their name, and what they
    mean; what all weights of the model mean.
    """
    stored, meant = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            stored[name] = meant[name] = weight
            continue
        parts, meant[name] = store(weight)
        stored |= {name.removesuffix("weight") + end: part for end, part in parts.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return meant


def round_off(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """To 16 levels in each group of a row: levels, scales, the levels of 0, and what they mean."""
    groups = weight.unflatten(1, (-1, GROUP))
    lowest, highest = groups.amin(-1), groups.amax(-1)
    scales = ((highest - lowest) / 15).half().float()
    zeros = (-lowest / scales).round().clamp(0, 15)
    levels = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    meant = (levels - zeros[..., None]) * scales[..., None]
    return levels.flatten(1).int(), scales, zeros.int(), meant.flatten(1)


def pack(levels: torch.Tensor, dim: int, order: Sequence[int] = range(8)) -> torch.Tensor:
    """Eight levels along `dim` into one of 32 bits, in this order from the lowest four on."""
    eights = levels.transpose(dim, -1).unflatten(-1, (-1, 8)).long()
    packed = sum((eights[..., place] & 15) << 4 * i for i, place in enumerate(order))
    signed = torch.where(packed >= 2**31, packed - 2**32, packed).int()
    return signed.transpose(dim, -1).contiguous()


def to_gptq(folder: Path) -> Weights:
    def store(weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
        levels, scales, zeros, meant = round_off(weight)
        return {
            "qweight": pack(levels.T, 0),
            "qzeros": pack(zeros.T - 1, 1),
            "scales": scales.T.half().contiguous(),
            "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
        }, meant

    set_quantization(
        folder,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False},
    )
    return map_matrices(folder, store)


def to_awq(folder: Path) -> Weights:
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def store(weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
        levels, scales, zeros, meant = round_off(weight)
        return {
            "qweight": pack(levels.T, 1, order),
            "qzeros": pack(zeros.T, 1, order),
            "scales": scales.T.half().contiguous(),
        }, meant

    set_quantization(
        folder,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
    )
    return map_matrices(folder, store)


@pytest.mark.parametrize(
    ("packages", "store"),
    [(["gptqmodel", "optimum"], to_gptq), (["gptqmodel"], to_awq)],
    ids=["gptq", "awq"],
)
def test_four_bits_of_gptqmodel(
    packages: list[str], store: Callable[[Path], Weights], model_dir: Path, tiny: Path
) -> None:
    for package in packages:
        pytest.importorskip(package)
    reference = build_model("llama")
    reference.load_state_dict(store(tiny))
    settings = make_settings(model_dir, dtype="float32")
    config = _load_config(tiny, settings)
    model = _load_weights(tiny, config, settings, "cpu", reads_images=False)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected, logits = reference(ids).logits, model(ids).logits
    # It computes with numbers of 16 bits.
    assert torch.allclose(logits, expected, rtol=0, atol=2**-6 * float(expected.abs().max()))
    loaded = load_model("tiny", settings)
    loaded.engine.stop()
    assert loaded.dtype == quantization_of(config)


def to_compressed(folder: Path) -> Weights:
    def store(weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
        scales = weight.abs().amax(1, keepdim=True) / 127
        levels = (weight / scales).round().to(torch.int8)
        return {"weight": levels, "weight_scale": scales}, levels * scales

    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    }
    set_quantization(
        folder,
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": group},
        },
    )
    return map_matrices(folder, store)


def save_as(folder: Path, quantization: Any) -> Weights:
    """By the package itself; the tensors in the file."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, device_map={"": "cpu"}
    )
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def to_bitsandbytes_8(folder: Path) -> Weights:
    stored = save_as(folder, BitsAndBytesConfig(load_in_8bit=True))
    scales = {name: stored.pop(name) for name in [*stored] if name.endswith("SCB")}
    for name in scales:
        stored.pop(f"{name.removesuffix('SCB')}weight_format")
        stored[f"{name.removesuffix('SCB')}weight"] = (
            stored[f"{name.removesuffix('SCB')}weight"] * scales[name][:, None] / 127
        )
    return stored


def to_bitsandbytes_4(folder: Path) -> Weights:
    before = load_file(folder / "model.safetensors")
    stored = save_as(
        folder,
        BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
    )
    meant = {}
    for name, weight in before.items():
        meant[name] = weight
        if f"{name}.absmax" in stored:
            pairs = torch.cat((stored[name] >> 4, stored[name] & 15), dim=1).flatten().long()
            numbers = stored[f"{name}.quant_map"][pairs].unflatten(0, (-1, 64))
            meant[name] = (numbers * stored[f"{name}.absmax"][:, None]).reshape(weight.shape)
    return meant


def to_torchao(folder: Path, name: str) -> Weights:
    stored = save_as(folder, TorchAoConfig(getattr(import_module("torchao.quantization"), name)()))
    meant = {}
    for name, weight in stored.items():
        if name.endswith("_weight_qdata"):  # symmetric: 0 is 0
            scales = stored[f"{name.removesuffix('qdata')}scale"].reshape(len(weight), -1)
            meant[name.replace("_weight_qdata", "weight")] = weight.float() * scales
        elif "_weight_" not in name:
            meant[name] = weight
    return meant


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("package", "store"),
    [
        ("compressed_tensors", to_compressed),
        ("bitsandbytes", to_bitsandbytes_8),
        ("bitsandbytes", to_bitsandbytes_4),
        ("torchao", partial(to_torchao, name="Int8WeightOnlyConfig")),
        ("torchao", partial(to_torchao, name="Int8DynamicActivationInt8WeightConfig")),
        ("torchao", partial(to_torchao, name="Float8WeightOnlyConfig")),
    ],
    ids=["compressed-tensors", "bnb 8", "bnb 4", "int8 ao", "dynamic ao", "float8 ao"],
)
def test_on_a_cpu_others_become_numbers(
    package: str, store: Callable[[Path], Weights], dtype: str, model_dir: Path, tiny: Path
) -> None:
    pytest.importorskip(package)
    meant = store(tiny)
    settings = make_settings(model_dir, dtype=dtype)
    config = _load_config(tiny, settings)
    model = _load_weights(tiny, config, settings, "cpu", reads_images=False)
    weights = model.state_dict()
    assert weights.keys() == meant.keys()
    for name, expected in meant.items():
        assert weights[name].dtype == getattr(torch, dtype)
        # What is left is the rounding of one multiplication.
        tolerance = 2**-20 if dtype == "float32" else 2**-7
        assert torch.allclose(weights[name].float(), expected.float(), rtol=tolerance, atol=1e-7)
    loaded = load_model("tiny", settings)
    loaded.engine.stop()
    assert loaded.dtype == dtype
    assert loaded.kv_part is not None  # it is for batches
