"""/v1/audio/speech: formats, events, and what is refused before anything is sent."""

from __future__ import annotations

import base64
import sys
import threading
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from modules.audio_files import AUDIO_FORMATS, HEARING_RATE, decode
from modules.speech import _Voice
from tests.conftest import AsgiCall, connect, wait_for
from tests.openai.assertions import assert_error_shape, read_events

pytestmark = pytest.mark.anyio

PATH = "/v1/audio/speech"
TEXT = "One. Two. Three."
MAGIC = {
    "mp3": b"ID3",
    "opus": b"OggS",
    "aac": b"\xff\xf1",
    "flac": b"fLaC",
    "wav": b"RIFF",
}


async def speak(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    response = await client.post(PATH, json={"input": "Hello", "voice": "alloy", **body})
    assert response.status_code == 200, response.text
    return response


@pytest.mark.parametrize("name", sorted(AUDIO_FORMATS))
async def test_formats(client: httpx.AsyncClient, name: str) -> None:
    response = await speak(client, response_format=name)
    assert response.headers["content-type"] == AUDIO_FORMATS[name].media_type
    assert "content-length" not in response.headers
    assert response.content.startswith(MAGIC.get(name, b""))


async def test_what_programs_for_openai_send(client: httpx.AsyncClient) -> None:
    response = await speak(
        client,
        model="gpt-4o-mini-tts",
        voice={"id": "en_US-joe-medium"},
        instructions="Speak like a pirate.",
        response_format=None,
        speed=None,
    )
    assert response.headers["content-type"] == "audio/mpeg"


async def test_events_carry_the_file_in_pieces(client: httpx.AsyncClient) -> None:
    response = await speak(client, input=TEXT, stream_format="sse", response_format="wav")
    assert response.headers["content-type"].startswith("text/event-stream")
    *deltas, done = read_events(response.text)
    assert {delta["type"] for delta in deltas} == {"speech.audio.delta"}
    assert len(deltas) >= 3
    data = b"".join(base64.b64decode(delta["audio"]) for delta in deltas)
    sound = decode(data, 1, lambda: None)
    assert done["type"] == "speech.audio.done"
    usage = done["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["input_tokens"] > 6
    seconds = usage["output_tokens"] * 256 / 22050
    assert seconds == pytest.approx(len(sound) / HEARING_RATE, abs=0.1)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": None}, "input"),
        ({"input": 7}, "input"),
        ({"input": "a" * 4097}, "input"),
        ({"input": "..."}, "input"),
        ({"voice": "nobody"}, "voice"),
        ({"voice": "../en_US-joe-medium"}, "voice"),
        ({"voice": "en_US-joe-medium:Ann"}, "voice"),
        ({"voice": {"id": "voice_1234"}}, "voice"),
        ({"voice": {}}, "voice"),
        ({"speed": 0.2}, "speed"),
        ({"speed": 4.1}, "speed"),
        ({"response_format": "ogg"}, "response_format"),
        ({"stream_format": "websocket"}, "stream_format"),
    ],
)
async def test_what_makes_no_sense(
    client: httpx.AsyncClient, body: dict[str, Any], param: str
) -> None:
    response = await client.post(PATH, json={"input": "Hello", "voice": "alloy", **body})
    assert_error_shape(response, 400, param=param)


async def test_a_refused_voice_says_which_there_are(client: httpx.AsyncClient) -> None:
    response = await client.post(PATH, json={"input": "Hello", "voice": "nobody"})
    assert "en_US-joe-medium" in response.json()["error"]["message"]


async def test_a_missing_package(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "piper", None)
    response = await client.post(PATH, json={"input": "Hello"})
    assert_error_shape(response, 503, code="package_missing")
    assert "pip install piper-tts" in response.json()["error"]["message"]


# In which order


async def test_pieces_are_sent_as_they_come_and_who_leaves_ends_them(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoken: list[str] = []
    is_held, is_left = threading.Event(), threading.Event()
    say = _Voice.say

    def hold(voice: _Voice, *args: Any) -> Any:
        if len(spoken) == 1:
            is_held.set()
            assert is_left.wait(20)
        spoken.append("")
        return say(voice, *args)

    monkeypatch.setattr(_Voice, "say", hold)
    call = AsgiCall(app, PATH, {"input": TEXT, "response_format": "pcm"})
    assert (await call.next_message())["status"] == 200
    assert len((await call.next_message())["body"]) > 10000
    await wait_for(is_held)
    call.disconnect()
    await call.wait()
    is_left.set()
    async with connect(app) as client:  # its turn comes when the other is over
        await speak(client, input="Four.")
    assert len(spoken) == 3
