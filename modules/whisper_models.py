"""Whisper models: where they are, what they are converted from, and one of them, loaded.

faster-whisper runs them, in CTranslate2's format. Nothing is downloaded here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modules import conversions
from modules.errors import (
    InvalidRequestError,
    ModelLoadError,
    NotConfiguredError,
    ServerError,
)
from modules.model_files import FoundModel, find_bundled
from modules.model_kinds import ModelKind, is_converted_whisper, read_json
from modules.optional_packages import import_package
from modules.settings import Settings
from modules.weight_files import check_weights
from modules.worker import count_threads

logger = logging.getLogger(__name__)

CAPABILITY = "Transcriptions"
PACKAGE = "faster-whisper"
# Part of the name of a converted folder: raise it when the same one must be converted anew.
FORMAT_VERSION = 1
# What a window of 30 seconds is tried with, one after the other, until its text is plausible.
TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
# Frames of 10 ms that the spectrum is computed of at a time.
_BLOCK_FRAMES = 6000

Check = Callable[[], None]


def import_faster_whisper() -> Any:
    return import_package("faster_whisper", CAPABILITY, PACKAGE)


# Finding


def find_whisper(name: str, settings: Settings) -> FoundModel:
    """The model `name` if it is bundled or in the model folder, else the one of
    `transcription_model`: programs ask for `whisper-1`.

    Raises NotConfiguredError.
    """
    return _find_listed(name, settings.model_dir) or _find_configured(settings)


def _find_listed(name: str, model_dir: Path) -> FoundModel | None:
    """Names that come in requests are only compared, never made part of a path."""
    if bundled := find_bundled(name, ModelKind.TRANSCRIPTION):
        return FoundModel(name, bundled)
    folders = model_dir.iterdir() if model_dir.is_dir() else ()
    found = next((folder for folder in folders if folder.name == name), None)
    return FoundModel(name, found) if found and is_whisper(found) else None


def _find_configured(settings: Settings) -> FoundModel:
    name = settings.transcription_model
    if bundled := find_bundled(name, ModelKind.TRANSCRIPTION):
        return FoundModel(name, bundled)
    for folder in (settings.model_dir / name, Path(name).expanduser()):
        if is_whisper(folder):
            return FoundModel(folder.name, folder)
    raise NotConfiguredError(
        f"openai-transcription_model is {name}: no bundled model that is installed, and no folder "
        f"of a Whisper model in {settings.model_dir} or elsewhere."
    )


def is_whisper(folder: Path) -> bool:
    is_transformers = read_json(folder / "config.json").get("model_type") == "whisper"
    return is_transformers or is_converted_whisper(folder)


# Converting


def convert(folder: Path, cache_root: Path, allow_pickle: bool = False) -> Path:
    """The same model in CTranslate2's format, with int8 weights; converted at the first call.

    Raises ModelLoadError.
    """
    if is_converted_whisper(folder):
        return folder
    check_weights(folder, allow_pickle)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    stats = ((path.name, path.stat()) for path in files)
    key = " ".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)
    name = conversions.to_folder_name(folder.name, f"{key} {FORMAT_VERSION}")
    conversions.convert_once(cache_root / name, lambda work: _write(work, folder), logger.info)
    return cache_root / name


def _write(work: Path, folder: Path) -> None:
    logger.info("Converting %s", folder.name)
    converters = import_package("ctranslate2.converters", CAPABILITY, PACKAGE)
    copied = [
        name for name in ("tokenizer.json", "preprocessor_config.json") if (folder / name).is_file()
    ]
    converter = converters.TransformersConverter(str(folder), copy_files=copied)
    converter.convert(str(work), quantization="int8", force=True)
    if "tokenizer.json" not in copied:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        tokenizer.backend_tokenizer.save(str(work / "tokenizer.json"))


# One that is loaded


@dataclass(frozen=True, slots=True)
class VoiceDetection:
    """What counts as speech; everything else is left out before the model hears it."""

    threshold: float = 0.5
    min_silence_ms: int = 2000
    padding_ms: int = 400


@dataclass(frozen=True, slots=True)
class Hearing:
    """How a recording is to be listened to."""

    language: str | None = None
    """A code or an English name; None: to be found out."""
    translates: bool = False
    """Into English."""
    prompt: str = ""
    temperature: float = 0.0
    """0: as high as it takes, see TEMPERATURES."""
    word_timestamps: bool = False
    detection: VoiceDetection | None = None


class WhisperModel:
    """Used by one thread at a time."""

    def __init__(self, name: str, folder: Path) -> None:
        """Raises ModelLoadError, MissingPackageError."""
        faster_whisper = import_faster_whisper()
        self.name = name
        if not (folder / "tokenizer.json").is_file():  # else it would be downloaded
            raise ModelLoadError(f"{self.name} cannot be loaded: it has no tokenizer.json.")
        with blame(self.name):
            self._model = faster_whisper.WhisperModel(
                str(folder),
                device="cpu",
                compute_type="int8",
                cpu_threads=count_threads(),
                local_files_only=True,
            )
        # What a prompt spells stays text.
        self._model.hf_tokenizer.encode_special_tokens = True
        self._check: Check = lambda: None
        self._model.feature_extractor = _BlockwiseFeatures(
            self._model.feature_extractor, lambda: self._check()
        )
        encode = self._model.encode

        def check_and_encode(features: Any) -> Any:
            self._check()
            return encode(features)

        self._model.encode = check_and_encode

    def hear(
        self, sound: NDArray[np.float32], hearing: Hearing, check: Check
    ) -> tuple[str, Iterator[Any]]:
        """The language's code, and faster-whisper's segments as they are heard.

        `check` is called at least before each 30 seconds of sound, and may raise to end this.
        Raises InvalidRequestError.
        """
        self._check = check
        detection = hearing.detection
        segments, info = self._model.transcribe(
            sound,
            language=self._to_code(hearing.language),
            task="translate" if hearing.translates else "transcribe",
            temperature=hearing.temperature or TEMPERATURES,
            initial_prompt=hearing.prompt or None,
            word_timestamps=hearing.word_timestamps,
            vad_filter=detection is not None,
            vad_parameters=detection
            and {
                "threshold": detection.threshold,
                "min_silence_duration_ms": detection.min_silence_ms,
                "speech_pad_ms": detection.padding_ms,
            },
        )
        return info.language, segments

    def _to_code(self, language: str | None) -> str | None:
        if language is None:
            return None
        code = to_language_code(language)
        if code != "en" and not self._model.model.is_multilingual:
            raise InvalidRequestError(
                f"The model {self.name} understands English only. Another one is chosen with the "
                "setting openai-transcription_model.",
                "language",
            )
        if self._model.hf_tokenizer.token_to_id(f"<|{code}|>") is None:
            raise InvalidRequestError(
                f"The model {self.name} does not know this language.", "language"
            )
        return code


@contextmanager
def blame(name: str) -> Iterator[None]:
    """Whatever the files of a model make a library raise becomes a ModelLoadError."""
    try:
        yield
    except ServerError:
        raise
    except Exception as error:
        first_line, *_ = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelLoadError(f"{name} cannot be loaded: {first_line}") from error


class _BlockwiseFeatures:
    """faster-whisper's spectrum of a whole recording, block by block.

    At once, as faster-whisper computes it, two hours of sound take more than three gigabytes.
    """

    def __init__(self, extractor: Any, check: Check) -> None:
        self._extractor = extractor
        self._check = check

    def __getattr__(self, name: str) -> Any:
        return getattr(self._extractor, name)

    def __call__(
        self, sound: NDArray[np.float32], padding: int = 160, chunk_length: int | None = None
    ) -> NDArray[np.float32]:
        """Of shape (mel bands, frames)."""
        n_fft, hop = self._extractor.n_fft, self._extractor.hop_length
        window = np.hanning(n_fft + 1)[:-1].astype(np.float32)
        margin = n_fft // 2
        padded = np.pad(np.pad(sound, (0, padding)), margin, mode="reflect")
        num_frames = (len(sound) + padding) // hop
        spectrum = np.empty((len(self._extractor.mel_filters), num_frames), np.float32)
        for start in range(0, num_frames, _BLOCK_FRAMES):
            self._check()
            end = min(start + _BLOCK_FRAMES, num_frames)
            block = padded[start * hop : (end - 1) * hop + n_fft]
            waves = self._extractor.stft(
                block, n_fft, hop, window=window, center=False, return_complex=True
            )
            powers = np.abs(waves.astype(np.complex64)) ** 2
            spectrum[:, start:end] = self._extractor.mel_filters @ powers
        np.log10(np.maximum(spectrum, 1e-10, out=spectrum), out=spectrum)
        np.maximum(spectrum, spectrum.max() - 8, out=spectrum)
        spectrum += 4
        spectrum /= 4
        return spectrum


def to_language_code(language: str) -> str:
    """ "English", "en" and "en-US" → "en". Raises InvalidRequestError."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

    name = language.strip().lower()
    for code in (name, TO_LANGUAGE_CODE.get(name, ""), name.partition("-")[0]):
        if code in LANGUAGES:
            return code
    raise InvalidRequestError(
        "Invalid value for 'language': Input should be a code of ISO 639-1, such as en, or an "
        "English name.",
        "language",
    )


def to_language_name(code: str) -> str:
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    return str(LANGUAGES.get(code, code))
