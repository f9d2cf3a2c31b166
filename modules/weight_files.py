"""The files of a model's weights: which there are, whether they are whole, and how much memory
they will take.

Only their headers are read: what is cut off, or not to be loaded, is said before minutes of work.
Format of safetensors: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

from modules.errors import ModelLoadError
from modules.gguf_file import GgufFile
from modules.model_kinds import read_json

SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
# All that transformers would load.
PICKLE_PATTERN = "pytorch_model*.bin"
_LENGTH_BYTES = 8
# As the format's own library has it.
_MAX_HEADER_BYTES = 100_000_000
_FLOATS = ("F64", "F32", "F16", "BF16")
_EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "I8")
# So many numbers are packed into one element of these kinds, as far as a header tells: of 4 bits.
_PACKED = {"U8": 2, "I32": 8}


class _Weight(NamedTuple):
    """As a file's header tells of it."""

    kind: str
    size: int
    """In elements."""
    start: int
    """In bytes from the end of the header, as is `end`."""
    end: int


def check_weights(folder: Path, allow_pickle: bool) -> None:
    """Raises ModelLoadError, which names the file: one is not whole or not there, there is none,
    config.json tells of layers that are not there, or there are only pickles, which may run code,
    and nobody has asked for them.
    """
    for part in parts_of(folder):
        _check_part(part, allow_pickle, needs_weights=part == folder)


def has_all_weights(folder: Path, allow_pickle: bool) -> bool:
    names = (SAFETENSORS, PICKLE) if allow_pickle else (SAFETENSORS,)
    found = (_shards(folder, name) for name in names)
    return any(shards and all(shard.is_file() for shard in shards) for shards in found)


def estimate_bytes(path: Path, itemsize: int, unpacks: bool) -> int:
    """How much memory a model in transformers' format or a .gguf file takes while it is loaded,
    with `itemsize` bytes per number. `unpacks`: what another program has packed becomes numbers,
    too. Some libraries compute with it as it is, for which this is too much.

    Raises ModelLoadError, OSError, ValueError: a file is damaged. Pickles count as they are on the
    disk, in half precision.
    """
    if path.suffix == ".gguf":
        return sum(prod(tensor.shape) for tensor in GgufFile(path).tensors) * itemsize
    files = list(path.glob("*.safetensors"))
    if not files:
        return sum(file.stat().st_size for file in path.glob("*.bin")) // 2 * itemsize
    weights = (weight for file in files for weight in _read_header(file)[0].values())
    return sum(_estimate_weight(weight, itemsize, unpacks) for weight in weights)


def _estimate_weight(weight: _Weight, itemsize: int, unpacks: bool) -> int:
    if weight.kind in _FLOATS or unpacks:
        return weight.size * _PACKED.get(weight.kind, 1) * itemsize
    return weight.end - weight.start


def parts_of(folder: Path) -> list[Path]:
    """Of a model of sentence-transformers the folders that cannot be empty, the main one first; of
    any other itself.
    """
    try:
        modules = json.loads((folder / "modules.json").read_bytes())
        parts = [
            folder / module["path"]
            for module in modules
            if not module["type"].endswith(".Normalize")  # has nothing to write down
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        parts = []
    return parts or [folder]


def _check_part(folder: Path, allow_pickle: bool, needs_weights: bool) -> None:
    config = read_json(folder / "config.json")
    # As in transformers, the configuration may call them otherwise.
    name = str(config.get("transformers_weights") or SAFETENSORS)
    shards = _shards(folder, name)
    if shards is None:
        _check_pickles(folder, allow_pickle, needs_weights)
        return
    if not shards:
        raise ModelLoadError(f"{folder / name}.index.json is damaged: it names no files.")
    weights: dict[str, _Weight] = {}
    for shard, names in shards.items():
        weights |= _check_shard(shard, names)
    _check_layers(folder, config, weights)
    _check_scales(folder, config, weights)


def _check_layers(folder: Path, config: Mapping[str, Any], names: Collection[str]) -> None:
    """transformers would make as many as `config` says, and then miss their weights.

    Only where layers are called as most families call them: others use one several times.
    """
    if not any(re.search(r"\blayers\.\d+\.", name) for name in names):
        return
    # Those of the part that sees may be called so, and those of the text otherwise.
    count = 1 + max(int(number) for name in names for number in re.findall(r"\.(\d+)\b", name))
    text = config.get("text_config")
    said = (text if isinstance(text, dict) else config).get("num_hidden_layers")
    # What has an encoder, too, says more than this number.
    if isinstance(said, int) and said > count and "encoder_layers" not in config:
        raise ModelLoadError(
            f"{folder / 'config.json'} tells of {said} layers, and there are weights of only "
            f"{count}."
        )


def _check_scales(folder: Path, config: Mapping[str, Any], weights: Mapping[str, _Weight]) -> None:
    """Those of 8 bits: without its scales, transformers would take one as it is."""
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method not in ("compressed-tensors", "fp8"):
        return
    scaled = {name.partition("_scale")[0] for name in weights if "_scale" in name}
    eight = {name for name, weight in weights.items() if weight.kind in _EIGHT_BITS}
    if lacking := sorted(name for name in eight - scaled if name.endswith(".weight")):
        raise ModelLoadError(
            f"{folder} lacks the scales of {len(lacking)} of its weights, such as {lacking[0]}."
        )


def _check_pickles(folder: Path, allow_pickle: bool, needs_weights: bool) -> None:
    pickles = sorted(folder.glob(PICKLE_PATTERN))
    if pickles and not allow_pickle:
        raise ModelLoadError(
            f"{pickles[0]} is a pickle, a format that can hold programs, and there is no "
            f"{SAFETENSORS} beside it. If you trust who made it, use --allow-pickle."
        )
    for shard in _shards(folder, PICKLE) or ():
        _check_pickle(shard)
    if needs_weights and not pickles:
        raise ModelLoadError(
            f"There are no weights in {folder}: it has no {SAFETENSORS}, and no index of several."
        )


def _check_pickle(path: Path) -> None:
    _require_file(path)
    with path.open("rb") as file:  # a zip file, which the list of its contents ends
        if file.read(2) == b"PK" and not is_zipfile(file):
            raise ModelLoadError(f"{path} is incomplete: its end is missing. Download it again.")


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise ModelLoadError(f"{path} is missing, which the index of the weights names.")


def _shards(folder: Path, name: str) -> dict[Path, list[str]] | None:
    """Files → names of the weights that an index has in them. None: there are no such files; empty:
    the index is damaged. transformers looks for the one file first, and then for the index.
    """
    if (folder / name).is_file():
        return {folder / name: []}
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return None
    shards: dict[Path, list[str]] = {}
    weight_map = read_json(index).get("weight_map")
    for weight, file in weight_map.items() if isinstance(weight_map, dict) else ():
        shards.setdefault(folder / str(file), []).append(weight)
    return shards


def _check_shard(path: Path, names: list[str]) -> dict[str, _Weight]:
    """All weights in it, by name."""
    _require_file(path)
    weights, expected = _read_header(path)
    actual = path.stat().st_size
    if actual < expected:
        raise ModelLoadError(
            f"{path} is incomplete: it has {actual} of its {expected} bytes. Download it again."
        )
    if actual > expected:
        raise ModelLoadError(f"{path} is damaged: it has more than its {expected} bytes.")
    if missing := sorted(set(names) - set(weights)):
        raise ModelLoadError(f"{path} has no {missing[0]}, which the index says is there.")
    return weights


def _read_header(path: Path) -> tuple[dict[str, _Weight], int]:
    """The weights by name, and how many bytes the file should have."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        content = file.read(length) if length <= _MAX_HEADER_BYTES else b""
    try:
        header = json.loads(content)
        header.pop("__metadata__", None)
        weights = {name: _to_weight(entry) for name, entry in header.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelLoadError(
            f"{path} is incomplete or damaged: its header is not whole. Download it again."
        ) from error
    ends = (weight.end for weight in weights.values())
    return weights, _LENGTH_BYTES + length + max(ends, default=0)


def _to_weight(entry: Mapping[str, Any]) -> _Weight:
    start, end = entry["data_offsets"]
    return _Weight(str(entry["dtype"]), prod(entry["shape"]), int(start), int(end))
