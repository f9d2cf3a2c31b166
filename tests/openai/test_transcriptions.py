"""/v1/audio/transcriptions and /translations: five formats, streams, and what is refused."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import httpx
import pytest

from extensions.openai.subtitles import to_srt, to_vtt
from tests.conftest import MakeApp, connect
from tests.openai.assertions import assert_error_shape, read_events
from tests.recordings import encode, is_like, make_tone, speak

pytestmark = pytest.mark.anyio

TRANSCRIPTIONS = "/v1/audio/transcriptions"
TRANSLATIONS = "/v1/audio/translations"


async def send(
    client: httpx.AsyncClient, path: str = TRANSCRIPTIONS, audio: bytes | None = None, **form: Any
) -> httpx.Response:
    """`form` keys may end in `__`, which stands for the `[]` of lists."""
    data = {"model": "whisper-1"} | {
        name.replace("__", "[]"): value for name, value in form.items()
    }
    files = {"file": ("speech.mp3", speak(format="mp3") if audio is None else audio)}
    return await client.post(path, data=data, files=files)


async def hear(client: httpx.AsyncClient, path: str = TRANSCRIPTIONS, **form: Any) -> Any:
    response = await send(client, path, **form)
    assert response.status_code == 200, response.text
    is_json = response.headers["content-type"] == "application/json"
    return response.json() if is_json else response.text


# Formats


async def test_json(client: httpx.AsyncClient) -> None:
    answer = await hear(client)
    assert list(answer) == ["text", "usage"]
    assert is_like(answer["text"])
    assert answer["usage"]["type"] == "duration"
    assert 4 < answer["usage"]["seconds"] < 12


async def test_text(client: httpx.AsyncClient) -> None:
    response = await send(client, response_format="text")
    assert response.headers["content-type"].startswith("text/plain")
    assert response.text.endswith("\n")
    assert is_like(response.text)


async def test_subtitles(client: httpx.AsyncClient) -> None:
    srt = await hear(client, response_format="srt")
    time = r"\d\d:\d\d:\d\d,\d{3}"
    blocks = srt.removesuffix("\n\n").split("\n\n")
    lines = []
    for number, block in enumerate(blocks, 1):
        index, span, text = block.split("\n")
        assert index == str(number)
        assert re.fullmatch(f"{time} --> {time}", span)
        lines.append(text)
    assert is_like(" ".join(lines))
    vtt = await hear(client, response_format="vtt")
    header, *cues = vtt.removesuffix("\n\n").split("\n\n")
    assert header == "WEBVTT"
    time = time.replace(",", r"\.")
    assert all(re.match(f"{time} --> {time}\n", cue) for cue in cues)


def test_times_and_texts_of_subtitles() -> None:
    segments = [
        {"start": 0, "end": 59.9996, "text": " One --> two\n three"},
        {"start": 3661.5, "end": 360000.25, "text": " four"},
    ]
    assert to_srt(segments) == (
        "1\n00:00:00,000 --> 00:01:00,000\nOne -> two three\n\n"
        "2\n01:01:01,500 --> 100:00:00,250\nfour\n\n"
    )
    assert to_vtt(segments[1:]) == "WEBVTT\n\n01:01:01.500 --> 100:00:00.250\nfour\n\n"
    assert (to_srt([]), to_vtt([])) == ("", "WEBVTT\n\n")


async def test_verbose_json(client: httpx.AsyncClient) -> None:
    both = await hear(
        client, response_format="verbose_json", timestamp_granularities__=["word", "segment"]
    )
    names = ["task", "language", "duration", "text", "segments", "words", "usage"]
    assert list(both) == names
    assert (both["task"], both["language"]) == ("transcribe", "english")
    assert "".join(segment["text"] for segment in both["segments"]).strip() == both["text"]
    assert " ".join(word["word"] for word in both["words"]) == both["text"]
    assert all("words" not in segment for segment in both["segments"])
    assert both["words"][-1]["end"] <= both["duration"] == both["usage"]["seconds"]
    plain = await hear(client, response_format="verbose_json")
    assert list(plain) == [name for name in names if name != "words"]
    words = await hear(client, response_format="verbose_json", timestamp_granularities__="word")
    assert list(words) == [name for name in names if name != "segments"]


async def test_stream(client: httpx.AsyncClient) -> None:
    response = await send(client, stream="true", language="en")
    assert response.headers["content-type"].startswith("text/event-stream")
    *deltas, done = read_events(response.text)
    assert {event["type"] for event in deltas} == {"transcript.text.delta"}
    assert done["type"] == "transcript.text.done"
    assert "".join(event["delta"] for event in deltas) == done["text"]
    assert is_like(done["text"])


async def test_a_stream_of_nothing(client: httpx.AsyncClient) -> None:
    tone = encode(make_tone(2, hertz=30))
    response = await send(client, audio=tone, stream="true", chunking_strategy="auto")
    assert read_events(response.text) == [{"type": "transcript.text.done", "text": ""}]


async def test_translations(client: httpx.AsyncClient) -> None:
    answer = await hear(client, TRANSLATIONS)
    assert list(answer) == ["text"]
    assert is_like(answer["text"])
    verbose = await hear(client, TRANSLATIONS, response_format="verbose_json")
    assert list(verbose) == ["task", "language", "duration", "text", "segments"]
    assert (verbose["task"], verbose["language"]) == ("translate", "english")


# Fields


@pytest.mark.parametrize(
    "strategy",
    [
        {"chunking_strategy": "auto"},
        {"chunking_strategy": json.dumps({"type": "server_vad", "threshold": 0.4})},
        {"chunking_strategy[type]": "server_vad", "chunking_strategy[silence_duration_ms]": "500"},
    ],
    ids=["auto", "JSON", "brackets"],
)
async def test_silence_can_be_left_out(client: httpx.AsyncClient, strategy: dict[str, str]) -> None:
    assert is_like((await hear(client, **strategy))["text"])


async def test_empty_fields_are_as_none(client: httpx.AsyncClient) -> None:
    answer = await hear(client, language="", prompt="", temperature="", response_format="")
    assert is_like(answer["text"])


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"language": "de"}, "language"),
        ({"language": "klingon"}, "language"),
        ({"temperature": "1.1"}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"temperature": "nan"}, "temperature"),
        ({"response_format": "diarized_json"}, "response_format"),
        ({"response_format": "srt", "stream": "true"}, "response_format"),
        ({"stream": "perhaps"}, "stream"),
        ({"timestamp_granularities__": "word"}, "timestamp_granularities"),
        (
            {"timestamp_granularities__": "letter", "response_format": "verbose_json"},
            "timestamp_granularities[0]",
        ),
        ({"include__": "logprobs"}, "include"),
        ({"known_speaker_names__": ["Ann"]}, "known_speaker_names"),
        ({"chunking_strategy": "sometimes"}, "chunking_strategy"),
        ({"chunking_strategy": "[" * 100_000}, "chunking_strategy"),
    ],
)
async def test_what_makes_no_sense(
    client: httpx.AsyncClient, form: dict[str, Any], param: str
) -> None:
    assert_error_shape(await send(client, **form), 400, param=param)


async def test_what_a_voice_detection_cannot_be(client: httpx.AsyncClient) -> None:
    for strategy in ({"type": "client_vad"}, {"type": "server_vad", "threshold": 2}, {}, 7):
        response = await send(client, chunking_strategy=json.dumps(strategy))
        param = response.json()["error"]["param"]
        assert_error_shape(response, 400, param=param)
        assert param.startswith("chunking_strategy")


# Files


@pytest.mark.parametrize("path", [TRANSCRIPTIONS, TRANSLATIONS])
@pytest.mark.parametrize(
    "audio",
    [b"", b"no recording", b"ffconcat version 1.0\nfile '/etc/passwd'\n"],
    ids=["empty", "garbage", "playlist"],
)
async def test_what_is_no_recording(client: httpx.AsyncClient, path: str, audio: bytes) -> None:
    for form in ({}, {"stream": "true"}):
        assert_error_shape(await send(client, path, audio, **form), 400, param="file")


async def test_a_file_that_is_none(client: httpx.AsyncClient) -> None:
    other = {"other": b"1"}
    response = await client.post(TRANSCRIPTIONS, data={"model": "whisper-1"}, files=other)
    assert_error_shape(response, 400, param="file")
    response = await client.post(TRANSCRIPTIONS, data={"file": "speech.mp3"}, files=other)
    message = assert_error_shape(response, 400, param="file")
    assert message == "Invalid value for 'file': Input should be a file."


async def test_a_recording_that_is_too_long(make_app: MakeApp) -> None:
    async with connect(make_app(max_audio_minutes=1)) as client:
        response = await send(client, audio=encode(make_tone(61)))
    assert "longer than 1 minutes" in assert_error_shape(response, 400, param="file")


async def test_a_setting_that_names_nothing(make_app: MakeApp) -> None:
    async with connect(make_app(transcription_model="whisper-huge")) as client:
        response = await send(client)
    message = assert_error_shape(response, 503, code="not_configured")
    assert "openai-transcription_model is whisper-huge" in message


@pytest.mark.parametrize(
    ("module", "package"), [("faster_whisper", "faster-whisper"), ("av", "av")]
)
async def test_a_missing_package(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    speak(format="mp3")  # needs it too
    monkeypatch.setitem(sys.modules, module, None)
    for path in (TRANSCRIPTIONS, TRANSLATIONS):
        message = assert_error_shape(await send(client, path), 503, code="package_missing")
        assert message.endswith(f"pip install {package}")
