"""Recordings → text: segments as they come, times, which model, and what ends it."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modules.audio_files import SPEAKING_RATE
from modules.errors import CapabilityError, InvalidRequestError, MissingPackageError
from modules.model_files import find_bundled
from modules.model_kinds import ModelKind
from modules.settings import Settings
from modules.transcription import Segment, Transcriber, Transcript
from modules.whisper_models import Hearing, VoiceDetection, import_faster_whisper
from tests.recordings import encode, is_like, speak

pytestmark = pytest.mark.anyio

TINY = "whisper-tiny.en"
WAIT_SECONDS = 30


@pytest.fixture
def transcriber() -> Transcriber:
    return Transcriber(Settings())


async def hear(transcriber: Transcriber, audio: bytes, **options: object) -> list[Segment]:
    transcript = await transcriber.transcribe(audio, "whisper-1", Hearing(**options))  # type: ignore[arg-type]
    return [segment async for segment in transcript.segments]


def make_long_recording() -> bytes:
    """Of 120 seconds, so that it takes four windows, with a little to hear in each."""
    samples = np.frombuffer(speak(format="pcm"), "<i2").astype(np.float32) / 32768
    window = np.pad(samples, (0, 30 * SPEAKING_RATE - len(samples)))
    return encode(np.tile(window, 4))


async def test_what_was_spoken_is_heard(transcriber: Transcriber) -> None:
    transcript = await transcriber.transcribe(speak(), "whisper-1", Hearing(word_timestamps=True))
    segments = [segment async for segment in transcript.segments]
    assert transcript.language == "english"
    num_bytes = len(speak(format="pcm"))
    assert transcript.duration == pytest.approx(num_bytes / 2 / SPEAKING_RATE, abs=0.7)
    assert is_like("".join(segment.text for segment in segments))
    words = [word for segment in segments for word in segment.words]
    assert "".join(word.text for word in words) == "".join(s.text for s in segments)
    times = [time for word in words for time in (word.start, word.end)]
    assert times == sorted(times)
    assert 0 <= times[0] < times[-1] <= transcript.duration
    assert [segment.index for segment in segments] == list(range(len(segments)))
    assert all(0 <= s.start < s.end <= transcript.duration for s in segments)
    assert all(segment.token_ids and 0 <= segment.temperature <= 1 for segment in segments)


async def test_words_are_only_timed_on_request(transcriber: Transcriber) -> None:
    assert all(segment.words == () for segment in await hear(transcriber, speak()))


async def test_a_translation_by_an_english_model_is_a_transcript(transcriber: Transcriber) -> None:
    transcript = await transcriber.transcribe(speak(), "", Hearing(translates=True))
    assert transcript.language == "english"
    assert is_like("".join([segment.text async for segment in transcript.segments]))


async def test_silence_can_be_left_out(transcriber: Transcriber) -> None:
    silence = encode(np.zeros(5 * SPEAKING_RATE, np.float32))
    assert await hear(transcriber, silence, detection=VoiceDetection()) == []
    heard = await hear(transcriber, speak(), detection=VoiceDetection())
    assert is_like("".join(segment.text for segment in heard))


async def test_a_prompt_stands_before_what_is_heard(
    transcriber: Transcriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    cls = import_faster_whisper().WhisperModel
    generate = cls.generate_with_fallback

    def note_and_generate(model: Any, encoded: Any, prompt: list[int], *args: Any) -> Any:
        read.append(model.hf_tokenizer.decode(prompt, skip_special_tokens=False))
        return generate(model, encoded, prompt, *args)

    monkeypatch.setattr(cls, "generate_with_fallback", note_and_generate)
    await hear(transcriber, speak(), prompt="Kraków, <|endoftext|>")
    assert read[0] == "<|startofprev|> Kraków, <|endoftext|><|startoftranscript|>"
    await hear(transcriber, speak())
    assert read[-1].startswith("<|startoftranscript|>")


async def test_what_is_refused_is_refused_before_anything_is_heard(
    transcriber: Transcriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    for audio, language, param in ((b"nothing", None, "file"), (speak(), "de", "language")):
        with pytest.raises(InvalidRequestError) as caught:
            await transcriber.transcribe(audio, "whisper-1", Hearing(language))
        assert caught.value.param == param
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingPackageError, match="pip install av"):
        await transcriber.transcribe(speak(), "whisper-1", Hearing())


async def test_a_recording_that_is_too_long() -> None:
    transcriber = Transcriber(Settings(max_audio_minutes=1))
    with pytest.raises(InvalidRequestError, match="longer than 1 minutes") as caught:
        await transcriber.transcribe(make_long_recording(), "whisper-1", Hearing())
    assert caught.value.param == "file"


async def test_one_model_is_kept(tmp_path: Path) -> None:
    bundled = find_bundled(TINY, ModelKind.TRANSCRIPTION)
    assert bundled is not None
    (tmp_path / "mine").symlink_to(bundled)
    transcriber = Transcriber(Settings(model_dir=tmp_path))
    seen = []
    for name in ("whisper-1", TINY, "mine"):
        await (await transcriber.transcribe(speak(), name, Hearing())).segments.aclose()
        seen.append(await transcriber._worker.run(lambda shelf: shelf._model))
    assert seen[0] is seen[1]
    assert [model.name for model in seen if model] == [TINY, TINY, "mine"]


# What ends it


class Gate:
    """Counts the windows that were heard, and holds up the second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_heard = 0
        self.opened = threading.Event()
        cls = import_faster_whisper().WhisperModel
        encode = cls.encode

        def wait_and_encode(model: object, features: np.ndarray) -> object:
            if self.num_heard == 1:
                assert self.opened.wait(WAIT_SECONDS)
            self.num_heard += 1
            return encode(model, features)

        monkeypatch.setattr(cls, "encode", wait_and_encode)


async def open_long(transcriber: Transcriber) -> Transcript:
    # With one temperature only, there are no second tries.
    hearing = Hearing(temperature=0.2)
    return await transcriber.transcribe(make_long_recording(), "whisper-1", hearing)


async def test_segments_come_while_the_rest_is_not_heard_yet(
    transcriber: Transcriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whoever leaves then ends the work at the next window."""
    gate = Gate(monkeypatch)
    transcript = await open_long(transcriber)
    await anext(transcript.segments)
    assert gate.num_heard == 1
    await transcript.segments.aclose()
    gate.opened.set()
    await transcriber._worker.run(lambda shelf: None)  # its turn comes when the other is over
    assert gate.num_heard <= 2


async def test_a_shutdown_ends_it_with_an_error(
    transcriber: Transcriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modules.worker.CLOSE_SECONDS", 0)  # the gate is still closed
    gate = Gate(monkeypatch)
    transcript = await open_long(transcriber)
    await anext(transcript.segments)
    transcriber.close()
    gate.opened.set()
    with pytest.raises(CapabilityError, match="shutting down"):
        async for _ in transcript.segments:
            pass
    with pytest.raises(CapabilityError, match="shutting down"):
        await transcriber.transcribe(speak(), "whisper-1", Hearing())
