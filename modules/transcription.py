"""Recordings → text, segment by segment: one recording after the other, one model at a time.

Where models come from and how they run is `whisper_models.py`' business.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from modules import conversions
from modules.audio_files import HEARING_RATE, decode
from modules.model_files import FoundModel
from modules.settings import Settings
from modules.whisper_models import (
    Check,
    Hearing,
    WhisperModel,
    blame,
    convert,
    find_whisper,
    import_faster_whisper,
    to_language_name,
)
from modules.worker import Outlet, Worker


@dataclass(frozen=True, slots=True)
class Word:
    text: str
    """With the space before it."""
    start: float
    """Times are in seconds from the beginning."""
    end: float


@dataclass(frozen=True, slots=True)
class Segment:
    index: int
    seek: int
    """Where the window begins that it was heard in, in frames of 10 ms."""
    start: float
    end: float
    text: str
    """With the space before it."""
    token_ids: tuple[int, ...]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    words: tuple[Word, ...]
    """Empty unless they were asked for."""


@dataclass(frozen=True, slots=True)
class Transcript:
    language: str
    """English name of the text's language, in small letters."""
    duration: float
    """Of the recording, in seconds."""
    segments: AsyncGenerator[Segment, None]
    """As they are heard. Closing this ends the work within the next 30 seconds of sound."""


class Transcriber:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._worker = Worker("transcription", self._open_shelf)

    @property
    def loaded_name(self) -> str | None:
        """Of the model that is in memory."""
        shelf = self._worker.resource
        return shelf.loaded_name if shelf else None

    async def transcribe(self, audio: bytes, model: str, hearing: Hearing) -> Transcript:
        """Listen to the file `audio` with the model of that name, see `find_whisper`.

        With a model that understands English only, a translation is a transcript.

        Raises before anything is heard: InvalidRequestError, CapabilityError, ModelLoadError.
        """
        events = self._listen(audio, model, hearing)
        opening = await anext(events)
        assert isinstance(opening, _Opening)
        language = "en" if hearing.translates else opening.language
        return Transcript(to_language_name(language), opening.duration, _only_segments(events))

    def close(self) -> None:
        """The recording that is listened to ends with an error at its next window."""
        self._worker.close()

    def _listen(
        self, audio: bytes, model: str, hearing: Hearing
    ) -> AsyncGenerator[_Opening | Segment, None]:
        def work(shelf: _Shelf, outlet: Outlet[_Opening | Segment]) -> None:
            for event in self._hear(shelf, audio, model, hearing, outlet.check):
                outlet.put(event)

        return self._worker.stream_from(work)

    def _hear(
        self, shelf: _Shelf, audio: bytes, name: str, hearing: Hearing, check: Check
    ) -> Iterator[_Opening | Segment]:
        sound = decode(audio, self._settings.max_audio_minutes, check)
        model = shelf.take(find_whisper(name, self._settings))
        language, segments = model.hear(sound, hearing, check)
        duration = len(sound) / HEARING_RATE
        yield _Opening(language, duration)
        yield from (_to_segment(segment, duration) for segment in segments)

    def _open_shelf(self) -> _Shelf:
        import_faster_whisper()
        return _Shelf(self._settings)


@dataclass(frozen=True, slots=True)
class _Opening:
    language: str
    duration: float


class _Shelf:
    """Has room for one model: the last one that was asked for."""

    def __init__(self, settings: Settings) -> None:
        self._cache_root = settings.model_dir / conversions.FOLDER
        self._allow_pickle = settings.allow_pickle
        self._found: FoundModel | None = None
        self._model: WhisperModel | None = None

    @property
    def loaded_name(self) -> str | None:
        return self._model.name if self._model else None

    def take(self, found: FoundModel) -> WhisperModel:
        """Raises ModelLoadError."""
        if self._model is None or self._found != found:
            self._model = None  # before the next one takes its memory
            with blame(found.name):
                folder = convert(found.path, self._cache_root, self._allow_pickle)
                self._model = WhisperModel(found.name, folder)
            self._found = found
        return self._model


async def _only_segments(
    events: AsyncGenerator[_Opening | Segment, None],
) -> AsyncGenerator[Segment, None]:
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Segment):
                yield event


def _to_segment(heard: Any, duration: float) -> Segment:
    """faster-whisper's: a window is filled up with silence, and some of its times are in there."""

    def to_seconds(value: Any) -> float:
        return min(round(float(value), 3), duration)

    return Segment(
        index=heard.id - 1,
        seek=heard.seek,
        start=to_seconds(heard.start),
        end=to_seconds(heard.end),
        text=heard.text,
        token_ids=tuple(heard.tokens),
        temperature=float(heard.temperature),
        avg_logprob=float(heard.avg_logprob),
        compression_ratio=float(heard.compression_ratio),
        no_speech_prob=float(heard.no_speech_prob),
        words=tuple(
            Word(word.word, to_seconds(word.start), to_seconds(word.end))
            for word in heard.words or ()
        ),
    )
