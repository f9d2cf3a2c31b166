"""The two dialects, frame by frame; errors after the first byte; clients that leave."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sse_starlette.sse import AppStatus

from extensions.openai import streaming
from extensions.openai.streaming import choose_dialect, to_frame
from modules.engine.outputs import FinishReason
from modules.errors import (
    EngineDeadError,
    GenerationAbortedError,
    GenerationFailedError,
    InvalidRequestError,
)
from tests.conftest import AsgiCall, MakeApp, Serve, connect, run_server, wait_for
from tests.fakes import FakeEngine
from tests.openai.assertions import MESSAGES, assert_error_object, assert_error_shape, read_events

pytestmark = pytest.mark.anyio

CHAT = ("/v1/chat/completions", {"messages": MESSAGES})
COMPLETION = ("/v1/completions", {"prompt": "Hi", "max_tokens": 100})
ENDPOINTS = pytest.mark.parametrize(("path", "body"), [CHAT, COMPLETION])
REQUESTS = {"user-agent": "python-requests/2.34.2"}


async def stream(client: httpx.AsyncClient, path: str, **body: Any) -> httpx.Response:
    return await client.post(path, json={**body, "stream": True})


# Dialects


@pytest.mark.parametrize(
    ("stream_format", "user_agent", "expected"),
    [
        ("auto", "python-requests/2.34.2", "classic"),
        ("auto", "OpenAI/Python 3.54.0", "openai"),
        ("auto", "curl/8 python-requests/2", "openai"),
        ("auto", "", "openai"),
        ("openai", "python-requests/2.34.2", "openai"),
        ("classic", "", "classic"),
    ],
)
def test_choice_of_dialect(stream_format: str, user_agent: str, expected: str) -> None:
    assert choose_dialect(stream_format, user_agent) == expected


async def test_frames_of_openai(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.enqueue("é")
    response = await stream(client, *COMPLETION[:1], **COMPLETION[1])
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    head, last, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert '"choices":[{"text":"é","index":0,"logprobs":null,"finish_reason":null}]' in head
    assert '"choices":[{"text":"","index":0,"logprobs":null,"finish_reason":"stop"}]' in last
    assert "\r" not in response.text


@pytest.mark.parametrize("options", [None, {"include_usage": True}])
async def test_frames_of_classic_chat(
    app: FastAPI, engine: FakeEngine, options: dict[str, Any] | None
) -> None:
    engine.enqueue("Hi")
    async with connect(app, headers=REQUESTS) as client:
        response = await stream(client, CHAT[0], **CHAT[1], stream_options=options)
    events = read_events(response.text)
    choices = [event["choices"] for event in events]
    assert choices == [
        [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": text},
                "logprobs": None,
                "finish_reason": finish_reason,
                "message": {"role": "assistant", "content": text},
            }
        ]
        for text, finish_reason in (("", None), ("H", None), ("i", None), ("", "stop"))
    ]
    assert ["usage" in event for event in events] == [False, False, False, True]
    assert events[-1]["usage"]["completion_tokens"] == 3


async def test_frames_of_classic_completion(make_app: MakeApp, engine: FakeEngine) -> None:
    engine.enqueue("a")
    engine.enqueue("bc")
    async with connect(make_app(stream_format="classic")) as client:
        response = await stream(client, "/v1/completions", prompt="x", n=2, echo=True)
    events = read_events(response.text)
    assert all(set(event["choices"][0]).isdisjoint({"message", "delta"}) for event in events)
    texts = ["", ""]
    for event in events:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == ["xa", "xbc"]
    assert [event["choices"][0]["finish_reason"] for event in events[-1:]] == ["stop"]
    assert ["usage" in event for event in events] == [False] * (len(events) - 1) + [True]


def test_a_frame_has_no_line_breaks_inside() -> None:
    event = {"text": "a\nb\r\u2028\u2029\x85\x0b🙂"}
    frame = to_frame(event)
    assert frame.decode().removesuffix("\n\n").splitlines() == [frame.decode().strip()]
    assert json.loads(frame.removeprefix(b"data: ")) == event
    assert "🙂".encode() in frame


async def test_pings_while_nothing_comes(
    app: FastAPI, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "PING_SECONDS", 0.01)
    engine.enqueue("", blocks=True)
    call = AsgiCall(app, CHAT[0], {**CHAT[1], "stream": True})
    frames = [(await call.next_message()).get("body", b"") for _ in range(4)]
    assert frames[1].startswith(b'data: {"id"')
    assert all(frame.startswith(b": ping") and frame.endswith(b"\n\n") for frame in frames[2:])
    call.disconnect()
    await call.wait()


# Errors


ERRORS = pytest.mark.parametrize(
    ("error", "status", "fields"),
    [
        (EngineDeadError("The model has failed."), 503, {"code": "engine_dead"}),
        (GenerationAbortedError("Shutting down."), 503, {"code": "generation_aborted"}),
        (GenerationFailedError(), 500, {"code": "generation_failed"}),
        (InvalidRequestError("That cannot be.", "top_k"), 400, {"param": "top_k"}),
    ],
)


@ERRORS
@ENDPOINTS
async def test_error_in_a_stream(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    path: str,
    body: dict[str, Any],
    error: Exception,
    status: int,
    fields: dict[str, Any],
) -> None:
    engine.enqueue("ab", error=error)
    response = await stream(client, path, **body)
    *chunks, event = read_events(response.text)  # no [DONE]
    assert len(chunks) >= 2
    assert assert_error_object(event, status, **fields) == str(error)


@ERRORS
@ENDPOINTS
async def test_error_in_a_whole_answer(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    path: str,
    body: dict[str, Any],
    error: Exception,
    status: int,
    fields: dict[str, Any],
) -> None:
    engine.enqueue("ab", error=error)
    response = await client.post(path, json=body)
    assert assert_error_shape(response, status, **fields) == str(error)


async def test_internal_error_in_a_stream(
    client: httpx.AsyncClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    engine.enqueue("ab", error=KeyError("a secret prompt"))
    response = await stream(client, CHAT[0], **CHAT[1])
    error = read_events(response.text)[-1]
    assert_error_object(error, 500, code="internal_error")
    assert "secret" not in response.text + caplog.text
    assert "KeyError" in caplog.text
    assert "fakes.py:" in caplog.text


@ENDPOINTS
async def test_a_whole_answer_that_was_aborted(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    engine.enqueue("ab", finish_reason=FinishReason.ABORT)
    assert_error_shape(await client.post(path, json=body), 503, code="generation_aborted")


@ENDPOINTS
async def test_what_can_be_refused_is_refused_before_the_stream(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    engine.is_dead = True
    assert_error_shape(await stream(client, path, **body), 503, code="engine_dead")


async def test_a_stream_ends_with_an_error_when_the_server_shuts_down(
    app: FastAPI, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AppStatus, "should_exit", False)  # the signal would leave it on
    engine.enqueue("ab", blocks=True)
    with run_server(app) as server:
        async with (
            httpx.AsyncClient(base_url=server.url, timeout=5) as client,
            client.stream("POST", CHAT[0], json={**CHAT[1], "stream": True}) as response,
        ):
            await wait_for(engine.blocked)
            server.handle_exit(signal.SIGTERM, None)
            assert not AppStatus.should_exit  # else all streams are cut off
            engine.stop()
            text = "".join([piece async for piece in response.aiter_text()])
    assert_error_object(read_events(text)[-1], 503, code="generation_aborted")


# Clients that leave


@ENDPOINTS
async def test_leaving_a_stream_frees_the_request(
    app: FastAPI, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    engine.enqueue("abc", blocks=True)
    engine.enqueue("d", blocks=True)
    call = AsgiCall(app, path, {**body, "stream": True, "n": 2})
    assert (await call.next_message())["status"] == 200
    await wait_for(engine.blocked)
    call.disconnect()
    await call.wait()
    assert sorted(engine.aborted) == sorted(request.request_id for request in engine.requests)


@ENDPOINTS
async def test_leaving_before_the_first_token(
    app: FastAPI, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    engine.enqueue("", blocks=True)
    call = AsgiCall(app, path, {**body, "stream": True})
    await wait_for(engine.blocked)
    call.disconnect()
    await call.wait()
    assert len(engine.aborted) == 1


@pytest.mark.parametrize("is_stream", [True, False])
@ENDPOINTS
async def test_leaving_at_once(
    app: FastAPI, engine: FakeEngine, path: str, body: dict[str, Any], is_stream: bool
) -> None:
    engine.enqueue("", blocks=True)
    call = AsgiCall(app, path, {**body, "stream": is_stream})
    call.disconnect()
    await call.wait()
    assert len(engine.aborted) == len(engine.requests)


async def test_leaving_while_a_chunk_is_being_sent(app: FastAPI, engine: FakeEngine) -> None:
    engine.enqueue("x" * 50)
    call = AsgiCall(app, COMPLETION[0], {**COMPLETION[1], "stream": True})
    for _ in range(3):
        await call.next_message()
    call.disconnect()
    await call.wait()
    assert len(engine.aborted) == 1


@ENDPOINTS
async def test_leaving_a_whole_answer_frees_the_request(
    app: FastAPI, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    engine.enqueue("abc", blocks=True)
    call = AsgiCall(app, path, body)
    await wait_for(engine.blocked)
    call.disconnect()
    await call.wait()
    assert len(engine.aborted) == 1


@pytest.mark.parametrize("is_stream", [True, False])
async def test_leaving_a_real_server(
    app: FastAPI, engine: FakeEngine, serve: Serve, is_stream: bool
) -> None:
    engine.enqueue("abc", blocks=True)
    body = {**CHAT[1], "stream": is_stream}
    with serve(app) as url:
        async with httpx.AsyncClient(base_url=url, timeout=5) as client:
            request = asyncio.create_task(client.post(CHAT[0], json=body))
            await wait_for(engine.blocked)
            request.cancel()
            await asyncio.wait([request])
        await wait_for(engine.closed)
    assert len(engine.aborted) == 1


async def test_chunks_arrive_one_by_one(app: FastAPI, engine: FakeEngine, serve: Serve) -> None:
    engine.enqueue("abc", blocks=True)
    with serve(app) as url:
        async with (
            httpx.AsyncClient(base_url=url, timeout=5) as client,
            client.stream("POST", CHAT[0], json={**CHAT[1], "stream": True}) as response,
        ):
            text = ""
            async for piece in response.aiter_text():
                text += piece
                if '"content":"c"' in text:
                    break
    assert "[DONE]" not in text
