"""What surrounds every request: its id, its path, the size of its body, and unexpected faults.

Pure ASGI: what a route sends goes straight through, so a stream is never held back.
"""

import asyncio
import logging
import re
import uuid
from contextlib import suppress

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from extensions.openai.errors import HTTP_CODES, ErrorKind, build_error, to_internal_error

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
# What may stand in a header and in a line of a log.
SAFE_REQUEST_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
API_PREFIX = "/v1/"
# How much of a body that is too large is read all the same, in times of the limit and in seconds.
DISCARD_FACTOR = 4
DISCARD_SECONDS = 5


class RequestIdMiddleware:
    """Sends the client's X-Request-Id back, or one of our own."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if SAFE_REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        return await self.app(scope, receive, send_with_id)


class InternalErrorMiddleware:
    """Answers with a fixed text when something failed that should not have.

    One of the two places that catch any exception. Starlette's own would hand it on to the server
    process, which prints it with its text, and that may quote a prompt.
    """

    def __init__(self, app: ASGIApp, debug: bool) -> None:
        self.app = app
        self.debug = debug

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        is_started = False

        async def send_and_note(message: Message) -> None:
            nonlocal is_started
            is_started = True
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        except Exception as error:
            status, body = to_internal_error(error, self.debug)
            if not is_started:  # else the server closes the connection: the answer has no end
                await JSONResponse(body, status)(scope, receive, send)


class TrailingSlashMiddleware:
    """Serves /v1/models/ as /v1/models, where a redirect would lose the body or the key."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path.startswith(API_PREFIX) and path.endswith("/"):
            scope = {**scope, "path": path.rstrip("/")}
        await self.app(scope, receive, send)


class BodyLimitMiddleware:
    """Refuses a body of more than `max_bytes`: before it is read where its length is declared."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.message = f"The request body is larger than {max_bytes} bytes."

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self.max_bytes:
            if "expect" not in headers:  # else the client waits for a word before it sends
                await self._discard(receive)
            body = build_error(ErrorKind(413, HTTP_CODES[413]), self.message)
            response = JSONResponse(body, 413, {"connection": "close"})
            return await response(scope, receive, send)
        num_bytes = 0

        async def receive_within_limit() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes:
                if message.get("more_body"):
                    await self._discard(receive)
                raise HTTPException(413, self.message, {"connection": "close"})
            return message

        return await self.app(scope, receive_within_limit, send)

    async def _discard(self, receive: Receive) -> None:
        """Read on for a while: who still sends when the connection closes never sees the answer."""
        num_bytes = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                while num_bytes < DISCARD_FACTOR * self.max_bytes:
                    message = await receive()
                    num_bytes += len(message.get("body", b""))
                    if not message.get("more_body"):
                        return


class BodyLogMiddleware:
    """Logs every body that is read, as OPENEDAI_DEBUG asks for: also one that is refused then.

    At a level that is always shown, since it was asked for by name.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = bytearray()

        async def receive_and_log() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                body.extend(message.get("body", b""))
                if not message.get("more_body"):
                    logger.warning("Request: %s", body.decode(errors="replace"))
            return message

        await self.app(scope, receive_and_log, send)
