"""How much memory a model's weights take, told from the headers of its files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import safe_open

from modules.engine.fused_layers import KNOWN_LAYERS
from modules.gguf_file import GgufFile
from modules.model_kinds import read_json

# As much as a weight of a layer takes once it is quantized on the CPU, scales and all.
QUANTIZED_BYTES = {"int8": 1.0, "int4": 0.625}
HEAD_BYTES = 1
_FAMILIES = {kind.__name__.removesuffix("DecoderLayer").lower() for kind in KNOWN_LAYERS}
_EMBEDDINGS = ("embed_tokens.weight", "token_embd.weight")
_HEADS = ("lm_head.weight", "output.weight")
# Weights that another program has packed stay what they are.
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, slots=True)
class Weight:
    name: str
    shape: tuple[int, ...]
    is_float: bool = True

    @property
    def count(self) -> int:
        return prod(self.shape)


def estimate_bytes(path: Path, itemsize: int, quantized: str | None = None) -> int:
    """Of a model in transformers' format or a .gguf file: `itemsize` bytes per number, or those of
    a format in `QUANTIZED_BYTES` where the layers are known. While it is loaded it takes more.

    Raises what a damaged file makes the libraries raise. Pickles count as they are on the disk, in
    half precision.
    """
    weights = [*_read_weights(path)]
    if not weights:
        return sum(file.stat().st_size for file in path.glob("*.bin")) // 2 * itemsize
    if quantized is None or _family(path) not in _FAMILIES:
        return sum(each.count * (itemsize if each.is_float else 1) for each in weights)
    has_head = any(each.name.endswith(_HEADS) for each in weights)
    return sum(int(_quantized_bytes(each, itemsize, quantized, has_head)) for each in weights)


def _quantized_bytes(weight: Weight, itemsize: int, quantized: str, has_head: bool) -> float:
    if weight.name.endswith(_EMBEDDINGS):  # a head that is tied to them is a copy
        return weight.count * (itemsize if has_head else itemsize + HEAD_BYTES)
    if weight.name.endswith(_HEADS):
        return weight.count * HEAD_BYTES
    is_matrix = len(weight.shape) > 1
    return weight.count * (QUANTIZED_BYTES[quantized] if is_matrix else itemsize)


def _read_weights(path: Path) -> Iterator[Weight]:
    if path.suffix == ".gguf":
        yield from (Weight(tensor.name, tensor.shape) for tensor in GgufFile(path).tensors)
        return
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dictionary)
                part = opened.get_slice(name)
                yield Weight(name, tuple(part.get_shape()), part.get_dtype() in _FLOATS)


def _family(path: Path) -> str:
    if path.suffix == ".gguf":
        return GgufFile(path).architecture
    return str(read_json(path / "config.json").get("model_type"))
