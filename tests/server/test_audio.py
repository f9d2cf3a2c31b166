"""Text → speech → text over the real server, by OpenAI's clients, the current and the old one."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from tests.recordings import TEXT, is_like

from .conftest import Server

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300)


@pytest.fixture(scope="module")
def recording(client: openai.OpenAI, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("audio") / "speech.mp3"
    with client.audio.speech.with_streaming_response.create(
        model="tts-1", voice="alloy", input=TEXT
    ) as response:
        response.stream_to_file(path)
    return path


@pytest.mark.parametrize("name", ["mp3", "opus", "aac", "flac", "wav"])
def test_what_is_spoken_is_understood(client: openai.OpenAI, name: str) -> None:
    speech = client.audio.speech.create(
        model="gpt-4o-mini-tts",
        voice="coral",
        input=TEXT,
        response_format=name,  # type: ignore[arg-type]
    )
    heard = client.audio.transcriptions.create(
        model="whisper-1", file=(f"speech.{name}", speech.content)
    )
    assert is_like(heard.text)
    assert heard.usage is not None and heard.usage.type == "duration"


def test_transcriptions(client: openai.OpenAI, recording: Path) -> None:
    verbose = client.audio.transcriptions.create(
        model="whisper-1",
        file=recording,
        response_format="verbose_json",
        timestamp_granularities=["word", "segment"],
        language="en",
        prompt="A diary.",
        temperature=0,
    )
    assert is_like(verbose.text)
    assert verbose.words and verbose.segments
    assert verbose.words[0].start < verbose.words[-1].end <= verbose.duration
    srt = client.audio.transcriptions.create(
        model="whisper-1", file=recording, response_format="srt"
    )
    assert isinstance(srt, str) and srt.startswith("1\n00:00:00,000 --> ")


def test_a_stream(client: openai.OpenAI, recording: Path) -> None:
    stream = client.audio.transcriptions.create(
        model="gpt-4o-transcribe",
        file=recording,
        stream=True,
        chunking_strategy={"type": "server_vad", "threshold": 0.4},
    )
    *deltas, done = list(stream)
    assert done.type == "transcript.text.done" and is_like(done.text)
    assert "".join(event.delta for event in deltas) == done.text  # type: ignore[union-attr]


def test_translations(client: openai.OpenAI, recording: Path) -> None:
    assert is_like(client.audio.translations.create(model="whisper-1", file=recording).text)
    text = client.audio.translations.create(
        model="whisper-1", file=recording, response_format="text"
    )
    assert is_like(str(text))


def test_errors(client: openai.OpenAI, recording: Path) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.audio.transcriptions.create(model="whisper-1", file=recording, language="de")
    assert caught.value.param == "language"
    with pytest.raises(openai.BadRequestError) as caught:
        client.audio.transcriptions.create(model="whisper-1", file=("a.mp3", b"nothing"))
    assert caught.value.param == "file"
    with pytest.raises(openai.BadRequestError) as caught:
        client.audio.speech.create(model="tts-1", voice="nobody", input="Hello")
    assert caught.value.param == "voice"


def test_nothing_of_it_is_logged(server: Server, recording: Path) -> None:
    assert "weather" not in server.output
    assert "apples" not in server.output
