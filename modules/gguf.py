"""Turns a .gguf file into a folder that transformers' `from_pretrained` loads, once per file.

Drives transformers' mapping of names and weights. What is in the file is `gguf_file`'s business,
what the tokenizer is like that of `gguf_tokenizers`; who loads the folder is not known here.
"""

import copy
import json
import logging
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS, get_gguf_config
from transformers.integrations.gguf.utils import (
    get_gguf_conversion_mapping,
    is_gguf_arch_supported,
)
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from modules.conversions import convert_once, to_folder_name
from modules.errors import ModelLoadError
from modules.gguf_file import GgufFile, TensorInfo
from modules.gguf_tokenizers import build_tokenizer, end_token_ids, token_id

logger = logging.getLogger(__name__)

# Part of the folder's name: raise it when the same file must be converted anew.
FORMAT_VERSION = 1

MAX_SHARD_BYTES = 2 << 30

# What a header that lies makes numpy, torch and transformers raise.
_CONTRADICTIONS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


def convert(
    gguf_path: Path, cache_root: Path, on_progress: Callable[[str], None] = logger.info
) -> Path:
    """The folder under `cache_root` that holds `gguf_path` in transformers' format.

    The first call for a file writes config.json, generation_config.json, the tokenizer's files with
    chat_template.jinja if there is a template, and model.safetensors (in shards of at most
    `MAX_SHARD_BYTES`); later calls return at once. A file is known again by its name, size and time
    of change. Conversions take turns, also among processes; one that is killed leaves nothing that
    could be taken for a model. `on_progress` gets lines for a person to read.

    Weights are stored as float32 if they are quantized in the file or float32 there: their values
    are then exact. F16 and BF16 tensors keep their type where that loses nothing.

    Raises ModelLoadError if the file is not a GGUF, is damaged or is of an architecture that
    transformers does not know, and if the folder cannot be written.
    """
    try:
        target = cache_root / _folder_name(gguf_path)
        convert_once(target, lambda folder: _write(folder, gguf_path, on_progress), on_progress)
    except (ModelLoadError, OSError, SafetensorError) as error:
        raise ModelLoadError(f"{gguf_path} cannot be loaded: {error}") from error
    except _CONTRADICTIONS as error:
        reason = f"{type(error).__name__}: {error}"
        raise ModelLoadError(f"{gguf_path} cannot be loaded: {reason}") from error
    return target


def _folder_name(path: Path) -> str:
    stat = path.stat()
    key = f"{path.name} {stat.st_size} {stat.st_mtime_ns} {FORMAT_VERSION}"
    return to_folder_name(path.stem, key)


def _write(folder: Path, path: Path, on_progress: Callable[[str], None]) -> None:
    file = GgufFile(path)
    _require_space(folder.parent, file)
    _require_layers(file)
    on_progress(f"Converting {path.name}")
    tokenizer = build_tokenizer(file.metadata)
    model, settings = _build_skeleton(file, folder)
    weights = _WeightFiles(folder)
    for name, tensor in _progress(_parameters(file, model, settings), model, on_progress):
        weights.add(name, tensor)
    weights.close()
    _refuse_missing(set(_expected_shapes(model)) - weights.names)
    model.config.save_pretrained(folder)
    _generation_config(file).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _require_space(folder: Path, file: GgufFile) -> None:
    num_weights = sum(prod(tensor.shape) for tensor in file.tensors)
    needed = num_weights * _dtype(file).itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        sizes = f"{needed >> 20} MiB, and {free >> 20} MiB are free in {folder}"
        raise ModelLoadError(f"its weights take {sizes} once they are converted")


def _require_layers(file: GgufFile) -> None:
    """As many as the header says; a model of fewer would answer, but not as it should."""
    found = {int(name[1]) for each in file.tensors if (name := _LAYER.match(each.name))}
    said = file.metadata.get(f"{file.architecture}.block_count", 0)
    if found and len(found) != said:
        raise ModelLoadError(f"its header tells of {said} layers, and there are {len(found)} in it")


# An encoder-decoder has others.
_LAYER = re.compile(r"blk\.(\d+)\.")


_HALF_TYPES = {
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
    gguf.GGMLQuantizationType.F16: torch.float16,
}
_FLOAT_TYPES = {gguf.GGMLQuantizationType.F32, *_HALF_TYPES}


def _half_type(file: GgufFile) -> torch.dtype | None:
    """The 16-bit float type that occurs in the file, if any."""
    kinds = {tensor.kind for tensor in file.tensors}
    return next((dtype for kind, dtype in _HALF_TYPES.items() if kind in kinds), None)


def _dtype(file: GgufFile) -> torch.dtype:
    """The smallest type that is fit for the whole model."""
    is_quantized = any(tensor.kind not in _FLOAT_TYPES for tensor in file.tensors)
    return torch.float32 if is_quantized else _half_type(file) or torch.float32


# --- The model --------------------------------------------------------------------------------

Settings = dict[str, Any]


def _build_skeleton(file: GgufFile, scratch: Path) -> tuple[PreTrainedModel, Settings]:
    """The model, its weights without memory, and the settings it was built from."""
    settings = _settings(file, scratch)
    config = AutoConfig.for_model(**settings)
    family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model: PreTrainedModel = family.from_config(config)  # type: ignore[no-untyped-call]
    model.config.architectures = [type(model).__name__]
    model.config.dtype = _dtype(file)
    return model, settings


def _settings(file: GgufFile, scratch: Path) -> Settings:
    """What config.json is made of, in transformers' words."""
    if file.architecture in GGUF_CONFIG_ARCHS:
        vocab_size = len(file.metadata["tokenizer.ggml.tokens"])
        counted = file.metadata | {"tokenizer.ggml.tokens": vocab_size}
        settings = get_gguf_config(counted, tuple(tensor.name for tensor in file.tensors))
    else:
        outline = scratch / "outline.gguf"
        outline.write_bytes(_outline(file))
        settings = load_gguf_checkpoint(outline)["config"]
        outline.unlink()
    settings.pop("_model_name_or_path", None)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        settings.setdefault(name, None)  # rather than that of the architecture's first model
    if embedding := file.find("token_embd.weight"):
        settings["vocab_size"] = embedding.shape[0]
    if positions := file.find("position_embd.weight"):
        settings["n_positions"] = positions.shape[0]
    return settings | _rope_settings(file, settings)


def _outline(file: GgufFile) -> bytes:
    """A GGUF file with the same settings and names of tensors, but no vocabulary and no data.

    transformers takes a path, and would be busy for most of a minute with the vocabulary.
    """
    kept = [
        field
        for key, field in file.fields.items()
        if not (key.startswith("tokenizer.") and isinstance(file.metadata[key], list))
    ]
    # A vocabulary is expected: one of two bytes has the least to read.
    kept.append(_string("tokenizer.ggml.tokens") + struct.pack("<IIQ2B", 9, 0, 2, 0, 0))
    one_float = struct.pack("<IQIQ", 1, 1, gguf.GGMLQuantizationType.F32, 0)
    tensors = [_string(tensor.name) + one_float for tensor in file.tensors]
    head = b"GGUF" + struct.pack("<IQQ", file.version, len(tensors), len(kept))
    alignment = file.metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    return b"".join((head, *kept, *tensors, bytes(alignment + 4)))


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _rope_settings(file: GgufFile, settings: Settings) -> Settings:
    """The scaling of rotary positions, which transformers leaves out when it reads a GGUF."""

    def given(key: str) -> Any:
        return file.metadata.get(f"{file.architecture}.rope.{key}")

    found: Settings = {}
    factor, original = given("scaling.factor"), given("scaling.original_context_length")
    match given("scaling.type"):
        case "linear" if factor:
            found["rope_scaling"] = {"rope_type": "linear", "factor": factor}
        case "yarn" if factor and original:
            found["rope_scaling"] = {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
            }
    if long := file.find("rope_factors_long.weight"):
        found["original_max_position_embeddings"] = original
        found["rope_scaling"] = {
            "rope_type": "longrope",
            "long_factor": file.values(long).tolist(),
            "short_factor": file.values(_required(file, "rope_factors_short.weight")).tolist(),
        }
    if frequencies := file.find("rope_freqs.weight"):
        found |= _llama3_scaling(file.values(frequencies), settings)
    if file.architecture in _PARTLY_ROTATED and (rotated := given("dimension_count")):
        head_size = settings["hidden_size"] / settings["num_attention_heads"]
        found["partial_rotary_factor"] = rotated / head_size
    return found


_PARTLY_ROTATED = ("phi3", "stablelm", "nemotron")


def _llama3_scaling(divisors: np.ndarray, settings: Settings) -> Settings:
    """Llama 3.1's scaling, of which the file has only the result: one divisor per frequency.

    The other three numbers are the same in all models of the family; the result is checked.
    """
    scaling = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = AutoConfig.for_model(**settings, rope_scaling=scaling)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, 2 * len(divisors), 2) / (2 * len(divisors))
    scaled = config.rope_parameters["rope_theta"] ** -exponents / torch.tensor(divisors)
    if scaled.shape == expected.shape and torch.allclose(scaled, expected, rtol=1e-3):
        return {"rope_scaling": scaling}
    if scaling["factor"] != 1.0:
        logger.warning("This model scales rotary positions in an unknown way, which is left out")
    return {}


def _required(file: GgufFile, name: str) -> TensorInfo:
    tensor = file.find(name)
    if tensor is None:
        raise ModelLoadError(f"it has no tensor {name}")
    return tensor


def _generation_config(file: GgufFile) -> GenerationConfig:
    ends = end_token_ids(file.metadata)
    return GenerationConfig(
        bos_token_id=token_id(file.metadata, "bos"),
        eos_token_id=ends if len(ends) > 1 else next(iter(ends), None),
        pad_token_id=token_id(file.metadata, "padding"),
    )


# --- The weights ------------------------------------------------------------------------------


def _parameters(
    file: GgufFile, model: PreTrainedModel, settings: Settings
) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights of the model by its own names, a block's worth of them in memory at a time."""
    source = _transformed if is_gguf_arch_supported(file.architecture) else _processed
    expected = _expected_shapes(model)
    half_type = _half_type(file)
    for name, tensor in source(file, model, settings):
        if name not in expected:
            continue
        if tensor.shape != expected[name]:
            shapes = f"{tuple(tensor.shape)}, not {tuple(expected[name])}"
            raise ModelLoadError(f"the shape of {name} is {shapes}")
        yield name, _halved_if_exact(tensor.contiguous(), half_type)


def _expected_shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Of all weights but those that are another's twin."""
    weights = model.state_dict()
    return {n: w.shape for n, w in weights.items() if n not in model.all_tied_weights_keys}


def _halved_if_exact(tensor: torch.Tensor, half_type: torch.dtype | None) -> torch.Tensor:
    if half_type is None:
        return tensor
    halved = tensor.to(half_type)
    return halved if torch.equal(halved.to(tensor.dtype), tensor) else tensor


def _processed(
    file: GgufFile, model: PreTrainedModel, settings: Settings
) -> Iterator[tuple[str, torch.Tensor]]:
    """By transformers' processors, which undo what llama.cpp's converter did to each tensor."""
    processor_class: Callable[..., TensorProcessor] = TENSOR_PROCESSORS.get(
        file.architecture, TensorProcessor
    )
    processor = processor_class(config=settings)
    names = get_gguf_hf_weights_map(_Names.of(model), processor, model_type=file.architecture)
    _refuse_missing(_find_missing(file, model, names))
    for block in _blocks(file):
        stacked: dict[str, torch.Tensor] = {}  # some put parts of several tensors together here
        for tensor in block:
            result = processor.process(
                weights=file.values(tensor),
                name=tensor.name,
                tensor_key_mapping=names,
                parsed_parameters={"tensors": stacked},
            )
            if result.name in names:
                yield names[result.name], torch.from_numpy(np.ascontiguousarray(result.weights))
        yield from stacked.items()


def _find_missing(file: GgufFile, model: PreTrainedModel, names: dict[str, str]) -> set[str]:
    """Tensors that `names` has the model's weights in, and the file does not have. Weights without
    a name there are missed when all is converted.
    """
    expected = _expected_shapes(model)
    there = {tensor.name for tensor in file.tensors}
    there |= {name.removesuffix(".weight") for name in there}  # so `names` has those of experts
    return {name for name, weight in names.items() if weight in expected} - there


@dataclass(frozen=True)
class _Names:
    """As much of a model as transformers needs to map names.

    It asks every module, however small, which takes seconds; only the model and its direct
    children can have names that a file uses.
    """

    config: PretrainedConfig
    weights: dict[str, torch.Tensor]
    children: tuple[tuple[str, "_Names"], ...] = ()

    @classmethod
    def of(cls, model: PreTrainedModel) -> "_Names":
        children = tuple(
            (name, cls(model.config, child.state_dict())) for name, child in model.named_children()
        )
        return cls(model.config, model.state_dict(), children)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.weights

    def named_children(self) -> tuple[tuple[str, "_Names"], ...]:
        return self.children


def _transformed(
    file: GgufFile, model: PreTrainedModel, _: Settings
) -> Iterator[tuple[str, torch.Tensor]]:
    """By transformers' newer kind of mapping, which some architectures have: renamings, and
    converters that turn one or more tensors into one.
    """
    mapping = get_gguf_conversion_mapping(file.architecture, model.config)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    renamed = {
        tensor.name: rename_source_key(tensor.name, renamings, converters)
        for tensor in file.tensors
    }
    _refuse_missing(set(_expected_shapes(model)) - {name for name, _ in renamed.values()})
    for block in _blocks(file):
        collected: dict[str, WeightConverter] = {}
        for tensor in block:
            name, pattern = renamed[tensor.name]
            values = torch.from_numpy(file.values(tensor))
            if pattern is None:
                yield name, values
            else:
                converter = collected.setdefault(name, copy.deepcopy(by_pattern[pattern]))
                converter.add_tensor(name, tensor.name, pattern, _done(values))
        for name, converter in collected.items():
            yield from converter.convert(name, model=model, config=model.config).items()


def _done(values: torch.Tensor) -> Future[torch.Tensor]:
    future: Future[torch.Tensor] = Future()
    future.set_result(values)
    return future


def _blocks(file: GgufFile) -> Iterator[Iterable[TensorInfo]]:
    """The tensors, those of one block of layers together."""

    def number(tensor: TensorInfo) -> int:
        found = re.search(r"blk\.(\d+)\.", tensor.name)
        return int(found[1]) if found else -1

    for _, block in groupby(sorted(file.tensors, key=number), key=number):
        yield block


def _progress(
    parameters: Iterable[tuple[str, torch.Tensor]],
    model: PreTrainedModel,
    on_progress: Callable[[str], None],
) -> Iterator[tuple[str, torch.Tensor]]:
    total = len(_expected_shapes(model))
    reported = 0
    for count, parameter in enumerate(parameters, 1):
        yield parameter
        percent = 100 * count // total
        if percent >= reported + 10:
            reported = percent
            on_progress(f"Converting: {percent} %")


class _WeightFiles:
    """Collects tensors into files of at most `MAX_SHARD_BYTES`, and writes the index of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    @property
    def names(self) -> set[str]:
        return {name for shard in self._shards for name in shard}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self._pending and self._pending_bytes + tensor.nbytes > MAX_SHARD_BYTES:
            self._write_shard()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes

    def close(self) -> None:
        self._write_shard()
        total = len(self._shards)
        if total == 1:
            self._part(0).rename(self._folder / "model.safetensors")
            return
        index: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file_name = f"model-{number + 1:05}-of-{total:05}.safetensors"
            self._part(number).rename(self._folder / file_name)
            index |= dict.fromkeys(names, file_name)
        content = {"metadata": {"total_size": self._total_bytes}, "weight_map": index}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2))

    def _write_shard(self) -> None:
        save_file(self._pending, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number}.safetensors"


def _refuse_missing(names: set[str]) -> None:
    if names:
        some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
        raise ModelLoadError(f"it lacks {len(names)} of the model's tensors: {some}")
