"""What a model is, as the small files beside its weights say: nothing is loaded for it.

Where models are is `model_files`' business.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from pathlib import Path
from typing import Any

from modules.errors import ModelLoadError
from modules.gguf_file import read_summary

# What makes a folder a model. The second one is sentence-transformers', and lists its parts, of
# which some are in folders of their own.
MODEL_FILES = ("config.json", "modules.json")
PIPELINE_FILE = "model_index.json"
ADAPTER_FILE = "adapter_config.json"
# One of them describes how a model's images are prepared.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


class ModelKind(Enum):
    """What a model makes."""

    TEXT = auto()
    EMBEDDING = auto()
    SCORE = auto()
    """Of two texts: a cross-encoder."""
    CLASSIFICATION = auto()
    TRANSCRIPTION = auto()
    VOICE = auto()
    IMAGE = auto()


@dataclass(frozen=True, slots=True)
class ModelFacts:
    kind: ModelKind
    format: str
    """transformers, sentence-transformers, gguf, ctranslate2, diffusers or piper."""
    context_length: int | None = None
    """In tokens, as much as the model was made for; None where nothing says so."""
    accepts_images: bool = False
    """Beside texts."""


def describe(path: Path) -> ModelFacts | None:
    """Of a folder or a file. None: it is no model, or one of a kind that nothing here can use.

    What is damaged is a model that writes text, without details: loading it says what is wrong.
    """
    if path.suffix == ".gguf":
        return _describe_gguf(path)
    if path.suffix == ".onnx":
        return ModelFacts(ModelKind.VOICE, "piper")
    if (path / PIPELINE_FILE).is_file():
        return ModelFacts(ModelKind.IMAGE, "diffusers")
    if is_converted_whisper(path):
        return ModelFacts(ModelKind.TRANSCRIPTION, "ctranslate2")
    if (path / "modules.json").is_file():
        return _describe_sentence_transformer(path)
    if is_adapter(path) or not (path / "config.json").is_file():
        return None
    has_processor = any((path / name).is_file() for name in PROCESSOR_FILES)
    return _describe_transformer(read_json(path / "config.json"), has_processor)


def is_adapter(folder: Path) -> bool:
    """A LoRA, which changes a model and is none; a model that has been fused with one keeps the
    file, and has weights of its own.
    """
    return (folder / ADAPTER_FILE).is_file() and not any(folder.glob("model*.safetensors"))


def is_converted_whisper(folder: Path) -> bool:
    """CTranslate2's format: the name of the kind of model comes first."""
    try:
        with (folder / "model.bin").open("rb") as file:
            return b"WhisperSpec" in file.read(64)
    except OSError:
        return False


def read_json(path: Path) -> dict[str, Any]:
    """An object; an empty one in the place of all that is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


# transformers and sentence-transformers


def _describe_sentence_transformer(folder: Path) -> ModelFacts:
    kind = read_json(folder / "config_sentence_transformers.json").get("model_type")
    config = read_json(folder / "config.json")
    length = read_json(folder / "sentence_bert_config.json").get("max_seq_length")
    return ModelFacts(
        ModelKind.SCORE if kind == "CrossEncoder" else ModelKind.EMBEDDING,
        "sentence-transformers",
        _to_length(length) or _find_length(config),
    )


def _describe_transformer(config: Mapping[str, Any], has_processor: bool) -> ModelFacts | None:
    kind = _find_kind(config)
    if kind is None:
        return None
    return ModelFacts(
        kind,
        "transformers",
        None if kind is ModelKind.TRANSCRIPTION else _find_length(config),
        accepts_images=kind is ModelKind.TEXT
        and "vision_config" in config
        and has_processor
        and not config.get("is_encoder_decoder"),
    )


# The end of a class's name in transformers → what it makes, the longer ones first.
_ENDINGS = (
    ("ForCausalLM", ModelKind.TEXT),
    ("LMHeadModel", ModelKind.TEXT),
    ("ForConditionalGeneration", ModelKind.TEXT),
    ("ForMaskedLM", ModelKind.EMBEDDING),
    ("ForPreTraining", ModelKind.EMBEDDING),
    ("ForSequenceClassification", ModelKind.CLASSIFICATION),
    ("Model", ModelKind.EMBEDDING),
)
# Fields that only models have which hear, speak or see.
_SENSES = ("num_mel_bins", "audio_config", "audio_encoder", "image_size", "conv_dim")


def _find_kind(config: Mapping[str, Any]) -> ModelKind | None:
    """None: neither for texts nor a Whisper."""
    if config.get("model_type") == "whisper":
        return ModelKind.TRANSCRIPTION
    name = _first_text(config.get("architectures"))
    if name is None:
        return ModelKind.TEXT  # AutoModelForCausalLM needs no such field
    kind = next((kind for ending, kind in _ENDINGS if name.endswith(ending)), None)
    sees = "vision_config" in config
    if any(sense in config for sense in _SENSES) and not (sees and kind is ModelKind.TEXT):
        return None
    if kind is ModelKind.EMBEDDING and (sees or "decoder" in config):
        return None
    if kind is ModelKind.EMBEDDING and "AutoModelForCausalLM" in (config.get("auto_map") or ()):
        return ModelKind.TEXT  # code of its own, whose class may have any name
    if kind is ModelKind.CLASSIFICATION and _count_labels(config) == 1:
        return ModelKind.SCORE
    return kind


def _count_labels(config: Mapping[str, Any]) -> int:
    labels = config.get("id2label")
    given = len(labels) if isinstance(labels, dict) else config.get("num_labels")
    return given if isinstance(given, int) else 2  # transformers' own default


# As the families call it. What is said of the text's part counts more.
_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len")


def _find_length(config: Mapping[str, Any]) -> int | None:
    text = config.get("text_config")
    for part in (text if isinstance(text, dict) else {}, config):
        for name in _LENGTHS:
            if length := _to_length(part.get(name)):
                return length
    return None


def _to_length(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 1 else None


def _first_text(value: Any) -> str | None:
    first = value[0] if isinstance(value, list) and value else None
    return first if isinstance(first, str) else None


# GGUF

# Parts of general.architecture: encoders, which llama.cpp has for nothing but vectors.
_GGUF_ENCODERS = ("bert", "t5encoder", "-embed")
# Of general.type: parts of a model, and tables that were made on the way to one.
_GGUF_PARTS = ("adapter", "mmproj", "imatrix", "vocab")
# llama.cpp's numbers of how a text's vector is made; 0 is that there is none, 4 that it is a score.
_RANK_POOLING = 4


def _describe_gguf(path: Path) -> ModelFacts | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return _read_gguf(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _read_gguf(path: Path, size: int, mtime_ns: int) -> ModelFacts | None:
    """`size` and `mtime_ns` only say whether what is remembered is still so."""
    try:
        fields = read_summary(path)
    except (ModelLoadError, OSError, ValueError):
        return ModelFacts(ModelKind.TEXT, "gguf")
    architecture = str(fields.get("general.architecture"))
    is_part = fields.get("general.type") in _GGUF_PARTS or architecture == "clip"
    if is_part or fields.get("split.no"):
        return None
    pooling = fields.get(f"{architecture}.pooling_type")
    length = _to_length(fields.get(f"{architecture}.context_length"))
    return ModelFacts(_find_gguf_kind(architecture, pooling), "gguf", length)


def _find_gguf_kind(architecture: str, pooling: Any) -> ModelKind:
    if pooling == _RANK_POOLING:
        return ModelKind.SCORE
    is_encoder = any(part in architecture for part in _GGUF_ENCODERS)
    return ModelKind.EMBEDDING if pooling or is_encoder else ModelKind.TEXT
