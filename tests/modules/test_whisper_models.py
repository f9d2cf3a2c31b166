"""Whisper models: which one it is, converting one, and what it is given to hear."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from modules.errors import (
    InvalidRequestError,
    MissingPackageError,
    ModelLoadError,
    NotConfiguredError,
)
from modules.model_files import find_bundled
from modules.model_kinds import ModelKind
from modules.settings import Settings
from modules.whisper_models import (
    Hearing,
    WhisperModel,
    _BlockwiseFeatures,
    convert,
    find_whisper,
    import_faster_whisper,
    is_whisper,
    to_language_code,
    to_language_name,
)

TINY = "whisper-tiny.en"
SECOND = np.zeros(16000, np.float32)


def bundled() -> Path:
    path = find_bundled(TINY, ModelKind.TRANSCRIPTION)
    assert path is not None
    return path


@pytest.fixture(scope="module")
def random_whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with one tiny multilingual model in transformers' format, named `random`."""
    folder = tmp_path_factory.mktemp("models") / "random"
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=51865,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
    )
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(make_multilingual(bundled() / "tokenizer.json"))
    return folder


def make_multilingual(path: Path) -> str:
    """The models for many languages have one more plain token, an empty one, before the special
    ones: that is how they are told from the others.
    """
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    first = min(token["id"] for token in tokenizer["added_tokens"])
    for token in tokenizer["added_tokens"]:
        token["id"] += 1
    vocab = {text: token_id + (token_id >= first) for text, token_id in vocab.items()}
    tokenizer["model"]["vocab"] = vocab | {"": first}
    return json.dumps(tokenizer)


# Which one


def test_names_of_other_services_mean_the_setting(random_whisper: Path) -> None:
    model_dir = random_whisper.parent
    default = Settings(model_dir=model_dir)
    for name in ("whisper-1", "gpt-4o-transcribe", "", "..", "../models/random", str(model_dir)):
        assert find_whisper(name, default).name == TINY
    assert find_whisper("random", default).path == random_whisper
    by_name = Settings(model_dir=model_dir, transcription_model="random")
    by_path = Settings(transcription_model=str(random_whisper))
    for settings in (by_name, by_path):
        assert find_whisper("whisper-1", settings).path == random_whisper
        assert find_whisper(TINY, settings).path == bundled()


def test_a_setting_that_names_nothing(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("[")
    for name in ("whisper-large", "llama", "broken", str(tmp_path / "llama")):
        settings = Settings(model_dir=tmp_path, transcription_model=name)
        with pytest.raises(NotConfiguredError, match="openai-transcription_model is"):
            find_whisper("whisper-1", settings)
        assert find_whisper(name, Settings(model_dir=tmp_path)).name == TINY


def test_both_formats_are_known(random_whisper: Path) -> None:
    assert is_whisper(bundled())
    assert is_whisper(random_whisper)
    assert not is_whisper(random_whisper.parent)


# Converting


def test_a_folder_of_transformers_is_converted_once(random_whisper: Path, tmp_path: Path) -> None:
    converted = convert(random_whisper, tmp_path)
    assert [path.name for path in tmp_path.glob("[!.]*")] == [converted.name]
    assert is_whisper(converted)
    written = (converted / "model.bin").stat().st_mtime_ns
    assert convert(random_whisper, tmp_path) == converted
    assert (converted / "model.bin").stat().st_mtime_ns == written
    assert convert(bundled(), tmp_path) == bundled()


def test_a_converted_model_hears_in_many_languages(random_whisper: Path, tmp_path: Path) -> None:
    model = WhisperModel("random", convert(random_whisper, tmp_path))
    for language in ("de", "German"):
        code, segments = model.hear(SECOND, Hearing(language, temperature=1), lambda: None)
        assert code == "de"
        assert all(isinstance(segment.text, str) for segment in segments)
    with pytest.raises(InvalidRequestError, match="does not know this language") as caught:
        model.hear(SECOND, Hearing("yue"), lambda: None)
    assert caught.value.param == "language"


def test_a_model_without_a_tokenizer_is_not_completed_from_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "model.bin").symlink_to(bundled() / "model.bin")
    with pytest.raises(ModelLoadError, match=r"bare .* has no tokenizer\.json"):
        WhisperModel("bare", folder)


def test_a_damaged_model(tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(bundled(), folder, ignore=shutil.ignore_patterns("model.bin"))
    (folder / "model.bin").write_bytes((bundled() / "model.bin").read_bytes()[:1000])
    assert is_whisper(folder)
    with pytest.raises(ModelLoadError, match="damaged cannot be loaded"):
        WhisperModel("damaged", folder)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(MissingPackageError, match="pip install faster-whisper"):
        WhisperModel(TINY, bundled())


# Hearing


@pytest.fixture(scope="module")
def tiny() -> Iterator[WhisperModel]:
    yield WhisperModel(TINY, bundled())


@pytest.mark.parametrize("language", ["en", "English", "EN", "en-US", " english "])
def test_an_english_model_takes_english(tiny: WhisperModel, language: str) -> None:
    assert tiny._to_code(language) == "en"


def test_an_english_model_refuses_other_languages(tiny: WhisperModel) -> None:
    for language in ("de", "spanish"):
        with pytest.raises(InvalidRequestError, match=f"{TINY} understands English") as caught:
            tiny.hear(SECOND, Hearing(language), lambda: None)
        assert caught.value.param == "language"


@pytest.mark.parametrize("language", ["xx", "klingon", "e n", "<|en|>"])
def test_a_language_that_is_none(language: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        to_language_code(language)
    assert caught.value.param == "language"


def test_languages_have_english_names() -> None:
    assert to_language_name("de") == "german"
    assert to_language_name("??") == "??"


def test_special_tokens_in_a_prompt_are_text(tiny: WhisperModel) -> None:
    assert len(tiny._model.hf_tokenizer.encode("<|endoftext|>").ids) > 3


def test_a_very_long_prompt_is_cut(tiny: WhisperModel) -> None:
    _, segments = tiny.hear(SECOND, Hearing(prompt="word " * 2000, temperature=1), lambda: None)
    list(segments)


@pytest.mark.parametrize("num_samples", [1, 159, 200, 16000, 100_001, 1_000_000])
def test_spectra_block_by_block_are_those_of_the_whole(num_samples: int) -> None:
    extractor = import_faster_whisper().feature_extractor.FeatureExtractor()
    sound = np.random.default_rng(0).normal(0, 0.1, num_samples).astype(np.float32)
    whole = extractor(sound)
    blocks = _BlockwiseFeatures(extractor, lambda: None)(sound)
    assert blocks.shape == whole.shape
    assert blocks.dtype == np.float32
    np.testing.assert_allclose(blocks, whole, atol=1e-5)
