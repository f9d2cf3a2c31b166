"""Text → speech, sentence by sentence: one text after the other, one voice at a time.

By piper-tts, a program of its own under the GPL, which is only imported when somebody wants to hear
something. Voices are files; formats are `audio_files.py`' business.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modules.audio_files import AudioEncoder
from modules.errors import (
    InvalidRequestError,
    ModelLoadError,
    NotConfiguredError,
    ServerError,
)
from modules.model_files import BUNDLED_MODELS, find_bundled, list_voice_files
from modules.model_kinds import ModelKind
from modules.optional_packages import import_package
from modules.settings import Settings
from modules.worker import Worker, count_threads

CAPABILITY = "Spoken texts"
PACKAGE = "piper-tts"
# They mean the setting `voice`.
OPENAI_VOICES = (
    "alloy",
    "ash",
    "ballad",
    "cedar",
    "coral",
    "echo",
    "fable",
    "marin",
    "nova",
    "onyx",
    "sage",
    "shimmer",
    "verse",
)
# Of sounds that are made at once: a sentence of thousands would take gigabytes, and nobody could
# stop it. Spoken slowly, they take as much the more.
MAX_PHONEMES = 300
# How voices spell sounds. Others need packages of their own, or files that would be downloaded.
_PHONEME_TYPES = ("espeak", "text")
_CONTROL_CHARACTERS = dict.fromkeys((*range(32), 127), " ")


@dataclass(frozen=True, slots=True)
class SpeechRequest:
    text: str
    voice: str
    """One of `list_voices`, or NAME:SPEAKER, or one of OPENAI_VOICES."""
    speed: float
    format: str
    """A key of AUDIO_FORMATS."""


@dataclass(frozen=True, slots=True)
class SpeechPiece:
    """Some of the file, and what it was made of since the piece before."""

    audio: bytes
    num_phonemes: int = 0
    num_frames: int = 0
    """What the voice makes of phonemes before it makes sound of it; some 12 ms each."""


class SpeechSynthesizer:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._worker = Worker("speech", _Shelf)

    @property
    def loaded_name(self) -> str | None:
        """Of the voice that is in memory."""
        shelf = self._worker.resource
        return shelf.loaded_name if shelf else None

    async def speak(self, request: SpeechRequest) -> AsyncGenerator[SpeechPiece, None]:
        """The file in pieces, at least one per sentence. Closing this ends the work at the next.

        Raises before the first: InvalidRequestError, CapabilityError, ModelLoadError.
        """
        voice = await asyncio.to_thread(find_voice, request.voice, self._settings)
        pieces = self._worker.stream(partial(self._work, request=request, voice=voice))
        return _put_before(await anext(pieces), pieces)

    def close(self) -> None:
        """The text that is spoken ends with an error at its next sentence."""
        self._worker.close()

    def _work(
        self, shelf: _Shelf, request: SpeechRequest, voice: FoundVoice
    ) -> Iterator[SpeechPiece]:
        loaded = shelf.take(voice.path)
        speaker_id = loaded.find_speaker(voice)
        sentences = loaded.spell(request.text, request.speed)
        if not sentences:
            raise InvalidRequestError("There is nothing in the text that can be spoken.", "input")
        encoder = AudioEncoder(request.format, loaded.sample_rate)
        for phonemes in sentences:
            sound = loaded.say(phonemes, request.speed, speaker_id)
            num_frames = len(sound) // loaded.hop_length
            yield SpeechPiece(encoder.encode(sound), len(phonemes), num_frames)
        yield SpeechPiece(encoder.finish())


async def _put_before(
    first: SpeechPiece, rest: AsyncGenerator[SpeechPiece, None]
) -> AsyncGenerator[SpeechPiece, None]:
    async with aclosing(rest):
        yield first
        async for piece in rest:
            yield piece


# Finding voices


@dataclass(frozen=True, slots=True)
class FoundVoice:
    name: str
    path: Path
    speaker: str | None
    """Of a voice with several: a name or a number. None: its own default."""


def list_voices(voice_dir: Path) -> dict[str, Path]:
    """Files by name: the bundled voices that are installed, and those in `voice_dir`."""
    names = [name for name, model in BUNDLED_MODELS.items() if model.kind is ModelKind.VOICE]
    found = {name: find_bundled(name, ModelKind.VOICE) for name in names}
    bundled = {name: path for name, path in found.items() if path}
    return bundled | list_voice_files(voice_dir)


def find_voice(name: str, settings: Settings) -> FoundVoice:
    """Raises InvalidRequestError, which says what there is; NotConfiguredError."""
    voices = list_voices(settings.voice_dir)
    if name.lower() in OPENAI_VOICES and name not in voices:
        found = _choose(settings.voice, voices)
        if found is None:
            raise NotConfiguredError(
                f"openai-voice is {settings.voice}: no bundled voice that is installed, and none "
                f"in {settings.voice_dir}."
            )
        return found
    found = _choose(name, voices)
    if found is None:
        raise InvalidRequestError(
            f"There is no such voice. Voices on this machine: {', '.join(voices) or 'none'}. "
            f"OpenAI's names mean {settings.voice}.",
            "voice",
        )
    return found


def _choose(name: str, voices: dict[str, Path]) -> FoundVoice | None:
    """Names are only compared, never made part of a path."""
    file_name, _, speaker = name.partition(":")
    path = voices.get(file_name)
    return FoundVoice(file_name, path, speaker or None) if path else None


def _config_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


# One that is loaded


class _Shelf:
    """Has room for one voice: the last one that was asked for."""

    def __init__(self) -> None:
        self._piper = import_package("piper", CAPABILITY, PACKAGE)
        # It quotes what it cannot pronounce.
        logging.getLogger("piper").setLevel(logging.ERROR)
        self._path: Path | None = None
        self._voice: _Voice | None = None

    @property
    def loaded_name(self) -> str | None:
        return self._path.stem if self._voice and self._path else None

    def take(self, path: Path) -> _Voice:
        """Raises ModelLoadError."""
        if self._voice is None or self._path != path:
            self._voice = None  # before the next one takes its memory
            self._voice = _load(self._piper, path)
            self._path = path
        return self._voice


def _load(piper: Any, path: Path) -> _Voice:
    try:
        config = json.loads(_config_path(path).read_bytes())
        kind = config.get("phoneme_type", "espeak")
        if kind not in _PHONEME_TYPES:
            raise ModelLoadError(f"The voice {path.stem} needs sounds of the kind {kind}.")
        piper_config = piper.PiperConfig.from_dict(config)
        return _Voice(piper, piper.PiperVoice(_open_session(path), piper_config))
    except ServerError:
        raise
    except Exception as error:  # whatever a file that is damaged makes the libraries raise
        raise ModelLoadError(f"The voice {path.stem} cannot be loaded.") from error


def _open_session(path: Path) -> Any:
    """As piper's own, but for threads that do not spin on cores which the model could use."""
    onnxruntime = import_package("onnxruntime", CAPABILITY, "onnxruntime")
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = count_threads()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_cpu_mem_arena = False  # it would keep what the longest sentence took
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        str(path), sess_options=options, providers=["CPUExecutionProvider"]
    )


class _Voice:
    """Used by one thread at a time."""

    def __init__(self, piper: Any, voice: Any) -> None:
        self._piper = piper
        self._voice = voice
        self.sample_rate: int = voice.config.sample_rate
        self.hop_length: int = voice.config.hop_length

    def find_speaker(self, voice: FoundVoice) -> int | None:
        """Raises InvalidRequestError, which says whom there is."""
        config = self._voice.config
        if voice.speaker is None:
            return None
        speakers = config.speaker_id_map
        if voice.speaker in speakers:
            return int(speakers[voice.speaker])
        if voice.speaker.isdecimal() and int(voice.speaker) < config.num_speakers:
            return int(voice.speaker)
        known = ", ".join(speakers) or ", ".join(map(str, range(config.num_speakers)))
        raise InvalidRequestError(
            f"The voice {voice.name} has no such speaker. Its speakers: {known}.", "voice"
        )

    def spell(self, text: str, speed: float) -> list[list[str]]:
        """Sentences as phonemes; one that is very long comes as several."""
        # In double brackets piper reads phonemes; here everything is text.
        plain = text.translate(_CONTROL_CHARACTERS).replace("[[", "[ [")
        limit = int(MAX_PHONEMES * min(speed, 1))
        sentences = self._voice.phonemize(plain)
        return [piece for sentence in sentences for piece in split_phonemes(sentence, limit)]

    def say(
        self, phonemes: Sequence[str], speed: float, speaker_id: int | None
    ) -> NDArray[np.float32]:
        """Samples between -1 and 1, as loud as they can be."""
        config = self._piper.SynthesisConfig(
            speaker_id=speaker_id, length_scale=self._voice.config.length_scale / speed
        )
        phoneme_ids = self._voice.phonemes_to_ids(phonemes)
        sound = np.atleast_1d(self._voice.phoneme_ids_to_audio(phoneme_ids, config))
        peak = np.abs(sound).max(initial=0)
        return sound / peak if peak > 1e-8 else np.zeros_like(sound)


def split_phonemes(phonemes: list[str], limit: int) -> Iterator[list[str]]:
    """At the last space that leaves a piece of at most `limit`, or within a word without spaces."""
    while len(phonemes) > limit:
        spaces = (i for i in range(limit, limit // 2, -1) if phonemes[i] == " ")
        end = next(spaces, limit)
        yield phonemes[:end]
        phonemes = phonemes[end:]
    if phonemes:
        yield phonemes
