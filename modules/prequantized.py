"""Weights that another program has stored in fewer bits: AWQ, GPTQ, FP8 and what else transformers
loads, each with a package of its own. Says beforehand what is missing for it, and makes numbers of
them on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

from modules.engine.fused_layers import FORMATS
from modules.errors import ModelLoadError, UnfitSettingError
from modules.settings import Settings

# `quant_method` of config.json → packages, as pip calls them. What is not here, transformers says.
PACKAGES: dict[str, tuple[str, ...]] = {
    "awq": ("gptqmodel", "accelerate"),
    "gptq": ("gptqmodel", "optimum", "accelerate"),
    "bitsandbytes": ("bitsandbytes", "accelerate"),
    "compressed-tensors": ("compressed-tensors", "accelerate"),
    "fp8": ("accelerate",),
    "torchao": ("torchao", "accelerate"),
}
# What a configuration that is not right makes transformers and the packages raise.
_FAULTS = (
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
CARD_ONLY = ("eetq", "fbgemm_fp8", "fouroversix", "fp_quant", "higgs", "nvfp4", "spqr", "vptq")


def quantization_of(config: PretrainedConfig) -> str | None:
    """How the weights are stored, as config.json names it; None: as numbers."""
    given = _find(config)
    return _method(given) if given else None


def prepare(folder: Path, config: PretrainedConfig, settings: Settings, device: str) -> None:
    """See to it that from_pretrained can load what `config` tells of. On a CPU, weights become
    numbers again wherever that can be done: there is no fast way to compute with them.

    Raises ModelLoadError, which names the format and the package, or config.json; UnfitSettingError
    where it is there, and not in the bits that are asked for.
    """
    given = _find(config)
    if not given:
        return
    method = _method(given)
    if not method:
        raise ModelLoadError(
            f"{folder / 'config.json'} cannot be used: its `quantization_config` has no "
            "`quant_method`."
        )
    try:
        _require_packages(method, device)
        quantizer = AutoHfQuantizer.from_config(
            AutoQuantizationConfig.from_dict(dict(given)), pre_quantized=True
        )
        if device == "cpu" and hasattr(quantizer.quantization_config, "dequantize"):
            given["dequantize"] = quantizer.quantization_config.dequantize = True
        elif settings.dtype in FORMATS and not (device == "cpu" and method in _UNPACKED_LATER):
            raise UnfitSettingError(
                f"{folder} cannot be loaded: its weights are in the format {method}, and it cannot "
                f"be made {settings.dtype} when it is loaded",
                "dtype",
            )
        quantizer.validate_environment(
            device_map={"": device} if device == "cuda" else None, weights_only=True
        )
    except _FAULTS as error:
        reason, *_ = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelLoadError(
            f"{folder} cannot be loaded: its weights are in the format {method}, and {reason}"
        ) from error


def unpack(folder: Path, model: PreTrainedModel, dtype: torch.dtype) -> None:
    """What has been loaded onto a CPU, and is not numbers yet, though it can be.

    Raises ModelLoadError: it is of a kind that cannot.
    """
    method = quantization_of(model.config)
    if method not in _UNPACKED_LATER:
        return
    try:
        _UNPACKED_LATER[method](model, dtype)
    except NotImplementedError as error:
        raise ModelLoadError(
            f"{folder} cannot be loaded: its weights are in the format {method}, and of a kind "
            "that only a CUDA card can compute with"
        ) from error
    nn.Module.to(model, dtype)  # what was not packed is still as it is in the file


def _unpack_bitsandbytes(model: PreTrainedModel, dtype: torch.dtype) -> None:
    model.dequantize(dtype)


def _unpack_torchao(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Which transformers does not do. Some of its kinds compute with activations of one type only,
    and some make those of a request depend on its neighbours in the batch.
    """
    from torchao.utils import TorchAOBaseTensor

    for module in model.modules():
        for name, weight in [*module.named_parameters(recurse=False)]:
            if isinstance(weight, TorchAOBaseTensor):
                module.register_parameter(name, nn.Parameter(weight.dequantize().to(dtype), False))
    quantizer: Any = model.hf_quantizer
    quantizer.remove_quantization_config(model)


# What can be made numbers once it is loaded, and not while it is.
_UNPACKED_LATER: dict[str | None, Callable[[PreTrainedModel, torch.dtype], None]] = {
    "bitsandbytes": _unpack_bitsandbytes,
    "torchao": _unpack_torchao,
}


def _require_packages(method: str, device: str) -> None:
    if device == "cpu" and method in CARD_ONLY:
        raise RuntimeError("only a CUDA card can compute with that")
    names = PACKAGES.get(method, ())
    if missing := [name for name in names if find_spec(name.replace("-", "_")) is None]:
        raise ImportError(f"packages are missing for that: pip install {' '.join(missing)}")


def _find(config: PretrainedConfig) -> dict[str, Any]:
    """Before loading, the very dictionary that transformers finds; it puts an object there."""
    for part in (config, config.get_text_config(decoder=True)):
        if given := getattr(part, "quantization_config", None):
            return given if isinstance(given, dict) else dict(given.to_dict())
    return {}


def _method(given: dict[str, Any]) -> str | None:
    if given.get("load_in_8bit") or given.get("load_in_4bit"):
        return "bitsandbytes"
    method = given.get("quant_method")
    return method and str(getattr(method, "value", method))  # an enumeration's, once it is loaded
