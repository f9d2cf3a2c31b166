"""Weights that another program has stored in fewer bits: AWQ, GPTQ, FP8 and what else transformers
loads, each with a package of its own. Here is said beforehand what is missing for it.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

from modules.engine.fused_layers import FORMATS
from modules.errors import ModelLoadError
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
CARD_ONLY = ("eetq", "fbgemm_fp8", "fouroversix", "fp_quant", "higgs", "nvfp4", "spqr", "vptq")


def quantization_of(config: PretrainedConfig) -> str | None:
    """How the weights are stored, as config.json names it; None: as numbers."""
    given = _find(config)
    return _method(given) if given else None


def prepare(folder: Path, config: PretrainedConfig, settings: Settings, device: str) -> None:
    """See to it that from_pretrained can load what `config` tells of. On a CPU, weights become
    numbers again wherever transformers can do that: it has no fast way to compute with them.

    Raises ModelLoadError, which names the format and the package, or config.json.
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
        elif settings.dtype in FORMATS:
            raise ValueError(f"it cannot be made {settings.dtype} when it is loaded")
        quantizer.validate_environment(
            device_map={"": device} if device == "cuda" else None, weights_only=True
        )
    except (ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason, *_ = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelLoadError(
            f"{folder} cannot be loaded: its weights are in the format {method}, and {reason}"
        ) from error


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
    is_bitsandbytes = given.get("load_in_8bit") or given.get("load_in_4bit")
    method = given.get("quant_method")
    return "bitsandbytes" if is_bitsandbytes else method and str(method)
