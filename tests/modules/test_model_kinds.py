"""What a model is, by its small files alone; transformers' own configurations are the models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import (
    BartConfig,
    BertConfig,
    CLIPConfig,
    GPT2Config,
    LlavaConfig,
    T5Config,
    ViTConfig,
    Wav2Vec2Config,
    WhisperConfig,
)

from modules.model_kinds import ModelFacts, ModelKind, describe
from tests.engine.conftest import CONFIGS

LLAMA = CONFIGS["llama"]
LENGTH = LLAMA.max_position_embeddings


def write_config(folder: Path, config: Any, architecture: str | None, **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    content = config.to_dict() | ({"architectures": [architecture]} if architecture else {}) | more
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("config", "architecture", "expected"),
    [
        (LLAMA, "LlamaForCausalLM", (ModelKind.TEXT, LENGTH, False)),
        (LLAMA, None, (ModelKind.TEXT, LENGTH, False)),
        (LLAMA, "LlamaModel", (ModelKind.EMBEDDING, LENGTH, False)),
        (LLAMA, "LlamaForSequenceClassification", (ModelKind.CLASSIFICATION, LENGTH, False)),
        (GPT2Config(), "GPT2LMHeadModel", (ModelKind.TEXT, 1024, False)),
        (T5Config(), "T5ForConditionalGeneration", (ModelKind.TEXT, None, False)),
        (BartConfig(), "BartForConditionalGeneration", (ModelKind.TEXT, 1024, False)),
        (
            LlavaConfig(text_config=LLAMA),
            "LlavaForConditionalGeneration",
            (ModelKind.TEXT, LENGTH, True),
        ),
        (
            LlavaConfig(text_config=LLAMA, is_encoder_decoder=True),
            "LlavaForConditionalGeneration",
            (ModelKind.TEXT, LENGTH, False),
        ),
        (BertConfig(), "BertModel", (ModelKind.EMBEDDING, 512, False)),
        (BertConfig(), "BertForMaskedLM", (ModelKind.EMBEDDING, 512, False)),
        (BertConfig(), "BertLMHeadModel", (ModelKind.TEXT, 512, False)),
        (
            BertConfig(num_labels=1),
            "BertForSequenceClassification",
            (ModelKind.SCORE, 512, False),
        ),
        (
            BertConfig(num_labels=6),
            "BertForSequenceClassification",
            (ModelKind.CLASSIFICATION, 512, False),
        ),
        (
            WhisperConfig(),
            "WhisperForConditionalGeneration",
            (ModelKind.TRANSCRIPTION, None, False),
        ),
        (BertConfig(), "BertForTokenClassification", None),
        (ViTConfig(), "ViTModel", None),
        (CLIPConfig(), "CLIPModel", None),
        (Wav2Vec2Config(), "Wav2Vec2Model", None),
    ],
)
def test_a_folder_of_transformers(
    config: Any,
    architecture: str | None,
    expected: tuple[ModelKind, int | None, bool] | None,
    tmp_path: Path,
) -> None:
    folder = write_config(tmp_path, config, architecture)
    (folder / "preprocessor_config.json").touch()
    facts = describe(folder)
    if expected is None:
        assert facts is None
    else:
        kind, length, accepts_images = expected
        assert facts == ModelFacts(kind, "transformers", length, accepts_images)


def test_without_its_processor_a_model_reads_texts_alone(tmp_path: Path) -> None:
    config = LlavaConfig(text_config=LLAMA)
    facts = describe(write_config(tmp_path, config, "LlavaForConditionalGeneration"))
    assert facts == ModelFacts(ModelKind.TEXT, "transformers", LENGTH)


def test_code_of_its_own_that_writes_text(tmp_path: Path) -> None:
    own = {"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnModel"}}
    facts = describe(write_config(tmp_path, LLAMA, "OwnModel", **own))
    assert facts and facts.kind is ModelKind.TEXT


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [("SentenceTransformer", ModelKind.EMBEDDING), ("CrossEncoder", ModelKind.SCORE)],
)
def test_a_folder_of_sentence_transformers(
    model_type: str, kind: ModelKind, tmp_path: Path
) -> None:
    write_config(tmp_path, BertConfig(), "BertModel")
    (tmp_path / "modules.json").write_text("[]")
    (tmp_path / "config_sentence_transformers.json").write_text(
        json.dumps({"model_type": model_type})
    )
    assert describe(tmp_path) == ModelFacts(kind, "sentence-transformers", 512)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 256}')
    assert describe(tmp_path) == ModelFacts(kind, "sentence-transformers", 256)


def test_folders_of_other_formats(tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text("{}")
    assert describe(pipeline) == ModelFacts(ModelKind.IMAGE, "diffusers")
    whisper = tmp_path / "whisper"
    whisper.mkdir()
    (whisper / "model.bin").write_bytes(b"\x06\0\0\0\x0c\0WhisperSpec\0")
    assert describe(whisper) == ModelFacts(ModelKind.TRANSCRIPTION, "ctranslate2")


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    write_config(tmp_path, LLAMA, "LlamaForCausalLM")
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").touch()
    assert describe(tmp_path) is None
    (tmp_path / "model.safetensors").touch()  # an adapter that has been merged
    assert describe(tmp_path) is not None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"architectures": 7, "max_position_embeddings": "many"}',
        '{"architectures": [{}], "text_config": [], "id2label": 3, "max_position_embeddings": -1}',
    ],
    ids=range(6),
)
def test_a_damaged_configuration_is_a_model_without_details(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    assert describe(tmp_path) == ModelFacts(ModelKind.TEXT, "transformers")


# GGUF


def write_header(path: Path, architecture: str, **fields: int | str) -> Path:
    """A file of nothing but a header, with a vocabulary at its end."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields.items():
        key = name.replace("__", ".")
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    writer.add_token_list(["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("architecture", "fields", "expected"),
    [
        ("llama", {"llama__context_length": 4096}, (ModelKind.TEXT, 4096)),
        ("llama", {}, (ModelKind.TEXT, None)),
        ("qwen3", {"qwen3__pooling_type": 3}, (ModelKind.EMBEDDING, None)),
        ("qwen3", {"qwen3__pooling_type": 4}, (ModelKind.SCORE, None)),
        ("bert", {"bert__context_length": 512}, (ModelKind.EMBEDDING, 512)),
        ("nomic-bert", {}, (ModelKind.EMBEDDING, None)),
        ("llama", {"general__type": "adapter"}, None),
        ("clip", {}, None),
        ("llama", {"split__no": 1, "split__count": 2}, None),
    ],
)
def test_a_gguf_file(
    architecture: str,
    fields: dict[str, int | str],
    expected: tuple[ModelKind, int | None] | None,
    tmp_path: Path,
) -> None:
    path = write_header(tmp_path / "x.gguf", architecture, **fields)
    facts = ModelFacts(expected[0], "gguf", expected[1]) if expected else None
    assert describe(path) == facts


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\x03\x04", b"GGUF\x03\0\0\0" + b"\xff" * 40])
def test_a_damaged_gguf_file_is_a_model_without_details(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    assert describe(path) == ModelFacts(ModelKind.TEXT, "gguf")


def test_a_gguf_file_is_read_again_when_it_has_changed(tmp_path: Path) -> None:
    path = write_header(tmp_path / "x.gguf", "llama", llama__context_length=4096)
    assert describe(path) == ModelFacts(ModelKind.TEXT, "gguf", 4096)
    write_header(path, "bert", bert__context_length=512, bert__block_count=1)
    assert describe(path) == ModelFacts(ModelKind.EMBEDDING, "gguf", 512)
