from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI, HTTPException

from extensions.openai import middleware
from extensions.openai.errors import ERROR_KINDS
from modules import errors
from modules.errors import NoModelLoadedError, ServerError
from tests.conftest import WAIT_SECONDS, MakeApp, connect
from tests.fakes import FakeEngine, FakeModelManager
from tests.openai.assertions import MESSAGES, assert_error_shape

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"no json",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": "\\ud800"}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": 1} {"b": 2}',
    ],
)
async def test_bad_json(client: httpx.AsyncClient, path: str, content: bytes) -> None:
    response = await client.post(path, content=content)
    assert "not valid JSON" in assert_error_shape(response, 400)


@pytest.mark.parametrize("content", [b"", b"[]", b"5", b'"x"', b"null"])
async def test_body_that_is_no_object(client: httpx.AsyncClient, content: bytes) -> None:
    response = await client.post(CHAT, content=content)
    assert "JSON object" in assert_error_shape(response, 400)


@pytest.mark.parametrize(
    "content_type", [None, "application/x-www-form-urlencoded", "text/plain", "application/json"]
)
async def test_any_content_type_may_be_json(
    client: httpx.AsyncClient, content_type: str | None
) -> None:
    headers = {"content-type": content_type} if content_type else {}
    content = b'{"prompt": "a=b&c"}'
    response = await client.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 200


async def test_errors_that_other_extensions_raise(app: FastAPI, client: httpx.AsyncClient) -> None:
    @app.get("/teapot")
    async def fail() -> None:
        raise HTTPException(499, {"any": "thing"})

    assert "thing" in assert_error_shape(await client.get("/teapot"), 499)


async def test_unknown_route_and_wrong_method(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/foo", json={})
    message = assert_error_shape(response, 404, code="unknown_url")
    assert message == "Invalid URL (POST /v1/foo)"
    assert_error_shape(await client.get("/"), 404, code="unknown_url")
    response = await client.get(CHAT)
    message = assert_error_shape(response, 405, code="method_not_supported")
    assert message == f"Method not allowed (GET {CHAT}). Allowed: POST"
    assert response.headers["allow"] == "POST"


async def test_no_model_loaded(client: httpx.AsyncClient, manager: FakeModelManager) -> None:
    manager.model = None
    response = await client.post(CHAT, json={"messages": MESSAGES})
    message = assert_error_shape(response, 503, code="no_model_loaded")
    assert message == str(NoModelLoadedError())


async def test_body_over_the_limit(make_app: MakeApp) -> None:
    app = make_app(max_request_size=1)
    async with connect(app) as client:
        content = b'{"prompt": "' + b"x" * 2**20 + b'"}'
        response = await client.post("/v1/completions", content=content)
        message = assert_error_shape(response, 413, code="request_too_large")
        assert "1048576 bytes" in message

        async def chunks():
            for start in range(0, len(content), 100_000):
                yield content[start : start + 100_000]

        response = await client.post("/v1/completions", content=chunks())
        assert "content-length" not in response.request.headers
        assert_error_shape(response, 413, code="request_too_large")


@pytest.mark.parametrize("is_declared", [True, False])
async def test_a_client_can_send_all_before_it_reads_the_answer(
    make_app: MakeApp, is_declared: bool
) -> None:
    num_sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal num_sent
        while num_sent < 30:
            num_sent += 1
            yield b"x" * 100_000

    headers = {"content-length": "3000000"} if is_declared else {}
    async with connect(make_app(max_request_size=1)) as client:
        response = await client.post("/v1/completions", content=chunks(), headers=headers)
    assert_error_shape(response, 413, code="request_too_large")
    assert num_sent == 30


async def test_an_endless_body_is_not_read_for_ever(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def chunks(num_at_once: int) -> AsyncIterator[bytes]:
        for _ in range(num_at_once):
            yield b"x" * 2**20
        await asyncio.Event().wait()

    async with connect(make_app(max_request_size=1)) as client:
        for num_at_once, seconds in ((2, 0.1), (10, 60)):  # the time is over; the bytes are enough
            monkeypatch.setattr(middleware, "DISCARD_SECONDS", seconds)
            call = client.post("/v1/completions", content=chunks(num_at_once))
            response = await asyncio.wait_for(call, WAIT_SECONDS)
            assert_error_shape(response, 413, code="request_too_large")


async def test_who_waits_for_a_word_before_sending_is_answered_at_once(make_app: MakeApp) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        raise AssertionError("nobody asked for the body")
        yield b""

    headers = {"content-length": "3000000", "expect": "100-continue"}
    async with connect(make_app(max_request_size=1)) as client:
        response = await client.post("/v1/completions", content=chunks(), headers=headers)
    assert_error_shape(response, 413, code="request_too_large")


async def test_a_body_at_the_limit_is_read(make_app: MakeApp) -> None:
    async with connect(make_app(max_request_size=1)) as client:
        content = b'{"prompt": "a"}'.ljust(2**20)
        assert (await client.post("/v1/completions", content=content)).status_code == 200


async def test_internal_error(
    client: httpx.AsyncClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    engine.enqueue("ab", error=ValueError("the prompt was: secret"))
    response = await client.post(CHAT, json={"messages": MESSAGES})
    assert_error_shape(response, 500, code="internal_error")
    assert "secret" not in response.text + caplog.text
    assert "ValueError" in caplog.text
    assert "fakes.py:" in caplog.text


async def test_internal_error_of_a_route(app: FastAPI, client: httpx.AsyncClient) -> None:
    @app.get("/broken")
    async def fail() -> None:
        raise ZeroDivisionError

    response = await client.get("/broken", headers={"origin": "http://page"})
    assert_error_shape(response, 500, code="internal_error")
    assert "access-control-allow-origin" in response.headers


async def test_no_content_is_logged_unless_asked_for(
    make_app: MakeApp, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    messages = [{"role": "user", "content": "my-question"}]
    for debug in (False, True):
        caplog.clear()
        for stream in (False, True):
            engine.enqueue("R")
            async with connect(make_app(debug=debug, api_key="my-key")) as client:
                response = await client.post(
                    CHAT,
                    json={"messages": messages, "stream": stream},
                    headers={"x-api-key": "my-key"},
                )
                assert response.status_code == 200
        own = "".join(r.getMessage() for r in caplog.records if r.name.startswith("extensions"))
        assert ("my-question" in own, '"content":"R"' in own) == (debug, debug)
        assert "my-key" not in caplog.text


@pytest.mark.parametrize("content", [b'{"prompt": 5, "x": "secr\xc3\xa9t"}', b'{"secr\xc3\xa9t'])
async def test_debug_logs_a_body_that_is_refused(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    for debug in (False, True):
        async with connect(make_app(debug=debug)) as client:
            response = await client.post("/v1/completions", content=content)
            assert response.status_code == 400
        assert caplog.messages == ([f"Request: {content.decode()}"] if debug else [])


async def test_debug_logs_without_warnings(
    make_app: MakeApp, recwarn: pytest.WarningsRecorder
) -> None:
    parts = [{"type": "text", "text": "a"}]
    messages = [{"role": "user", "content": parts, "name": "b"}]
    async with connect(make_app(debug=True)) as client:
        assert (await client.post(CHAT, json={"messages": messages})).status_code == 200
    assert not [item for item in recwarn if "Pydantic" in str(item.message)]


def test_every_error_a_request_can_cause_is_in_the_table() -> None:
    at_start_only = {errors.ExtensionError, errors.TunnelError}
    elsewhere = {errors.DownloadError}
    inside_only = {errors.NotBatchableError}
    families = {errors.ModelError, errors.EngineError, ServerError}
    tree = {
        cls
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, ServerError)
    }
    for cls in tree - at_start_only - elsewhere - inside_only - families:
        assert any(parent in ERROR_KINDS for parent in cls.__mro__), cls
