"""How much memory a model's weights take while they are loaded, told from its files' headers."""

from __future__ import annotations

from math import prod
from pathlib import Path

from safetensors import safe_open

from modules.gguf_file import GgufFile

# Weights that another program has packed stay what they are.
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def estimate_bytes(path: Path, itemsize: int) -> int:
    """Of a model in transformers' format or a .gguf file, with `itemsize` bytes per number.

    Raises what a damaged file makes the libraries raise. Pickles count as they are on the disk, in
    half precision.
    """
    if path.suffix == ".gguf":
        return sum(prod(tensor.shape) for tensor in GgufFile(path).tensors) * itemsize
    files = list(path.glob("*.safetensors"))
    if not files:
        return sum(file.stat().st_size for file in path.glob("*.bin")) // 2 * itemsize
    return sum(_estimate_file(file, itemsize) for file in files)


def _estimate_file(path: Path, itemsize: int) -> int:
    total = 0
    with safe_open(path, "numpy") as opened:
        for name in opened.keys():  # noqa: SIM118 (it is no dictionary)
            part = opened.get_slice(name)
            size = itemsize if part.get_dtype() in _FLOATS else 1
            total += prod(part.get_shape()) * size
    return total
