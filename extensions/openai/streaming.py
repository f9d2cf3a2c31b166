"""The one way out: chunks → server-sent events in two dialects, or folded into one JSON answer.

Chunks come in OpenAI's form, the last one with the usage and no choices. What is in them is decided
by the endpoints; here is how they travel, and what happens when the client leaves.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, TypeVar

from fastapi import Request, Response
from sse_starlette import EventSourceResponse
from starlette.types import Receive

from extensions.openai.errors import ERROR_KINDS, to_error, to_internal_error
from extensions.openai.responses import Choice, Json
from extensions.openai.typing import GenerationOptions
from modules.context import Context
from modules.models import ModelLease
from modules.settings import Settings

logger = logging.getLogger(__name__)

Chunks = AsyncGenerator[Json, None]
# One that is bytes is a frame already.
Event = TypeVar("Event", Json, bytes)
Options = TypeVar("Options", bound=GenerationOptions)
Result = TypeVar("Result")

PING_SECONDS = 15
# A header with the number of messages that did not fit into the prompt.
DROPPED_MESSAGES = "x-dropped-messages"
DONE = b"data: [DONE]\n\n"
# Of nginx: the client that the answer was for has gone.
CLIENT_CLOSED_REQUEST = 499
# JSON allows these in a text and SSE does not end lines at them, but some clients do.
LINE_SEPARATORS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}

_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


class Dialect(StrEnum):
    OPENAI = "openai"
    CLASSIC = "classic"


@dataclass(frozen=True, slots=True)
class Answer:
    """Chunks that were not asked for yet, and what makes one JSON object of them."""

    chunks: Chunks
    fold: Callable[[Chunks], Coroutine[Any, Any, Json]]
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class JsonAnswer:
    """An answer in one piece that has been written already."""

    content: bytes
    """JSON."""
    headers: Mapping[str, str] = field(default_factory=dict)


async def send(
    begin: Callable[[Context, ModelLease, Options], Coroutine[Any, Any, Answer]],
    context: Context,
    lease: ModelLease,
    request: Request,
    body: Options,
) -> Response:
    """The answer that `begin` makes.

    Where a model has to be loaded first, a stream begins before that, with pings; what goes wrong
    is told in it then, and nothing in headers. Raises NoModelLoadedError, and what `begin` raises.
    """
    work = partial(begin, context, lease, body)
    if not body.stream:
        return await send_json(_fold_answer(work), request, context.settings)
    answer = None if lease.must_wait(body.model) else await work()
    chunks = answer.chunks if answer else _begin_late(work)
    headers = answer.headers if answer else None
    dialect = choose_dialect(context.settings.stream_format, request.headers.get("user-agent", ""))
    if dialect is Dialect.CLASSIC:
        return send_events(to_classic(chunks), context.settings, headers=headers)
    events = to_openai(chunks, body.stream_options.include_usage)
    return send_events(events, context.settings, end=DONE, headers=headers)


def send_events(
    events: AsyncGenerator[Event, None],
    settings: Settings,
    *,
    end: bytes = b"",
    headers: Mapping[str, str] | None = None,
) -> Response:
    """As server-sent events, with `end` after them unless an error has ended them."""
    if settings.debug:
        events = _log_in_full(events)
    frames = to_frames(events, end, settings.debug)
    return EventSourceResponse(frames, headers=headers, sep="\n", ping=PING_SECONDS)


async def send_json(
    work: Coroutine[Any, Any, Json | JsonAnswer], request: Request, settings: Settings
) -> Response:
    """What `work` makes, which is cancelled if the client leaves before."""
    result = await run_while_connected(work, request.receive)
    if result is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    answer = result if isinstance(result, JsonAnswer) else JsonAnswer(_to_json(result).encode())
    if settings.debug:
        logger.warning("Reply: %s", answer.content.decode())
    return Response(answer.content, 200, answer.headers, "application/json")


def choose_dialect(stream_format: str, user_agent: str) -> Dialect:
    """Programs written for the older API's streams use requests; OpenAI's own clients do not."""
    if stream_format != "auto":
        return Dialect(stream_format)
    return Dialect.CLASSIC if user_agent.startswith("python-requests/") else Dialect.OPENAI


async def _log_in_full(events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    """What OPENEDAI_DEBUG asks for; middleware.BodyLogMiddleware logs the requests."""
    async with aclosing(events):
        async for event in events:
            shown = event.decode() if isinstance(event, bytes) else _to_json(event)
            logger.warning("Reply: %s", shown)
            yield event


# Streams


async def _begin_late(begin: Callable[[], Coroutine[Any, Any, Answer]]) -> Chunks:
    answer = await begin()
    async with aclosing(answer.chunks):
        async for chunk in answer.chunks:
            yield chunk


async def to_frames(
    events: AsyncGenerator[Event, None], end: bytes, debug: bool
) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(events):
            async for event in events:
                yield event if isinstance(event, bytes) else to_frame(event)
    except tuple(ERROR_KINDS) as error:
        yield to_frame(to_error(error)[1])
    except Exception as error:  # as in InternalErrorMiddleware, after the first byte was sent
        yield to_frame(to_internal_error(error, debug)[1])
    else:
        if end:
            yield end


def to_frame(event: Json) -> bytes:
    text = _to_json(event)
    if not text.isascii():
        text = text.translate(LINE_SEPARATORS)
    return f"data: {text}\n\n".encode()


async def to_openai(chunks: Chunks, include_usage: bool) -> Chunks:
    """OpenAI's own: the usage in a chunk of its own, and only when it is asked for."""
    async with aclosing(chunks):
        async for chunk in chunks:
            if not chunk["choices"]:
                if include_usage:
                    yield chunk
            else:
                yield {**chunk, "usage": None} if include_usage else chunk


async def to_classic(chunks: Chunks) -> Chunks:
    """The dialect of the older API, whose clients look for a text in every chunk.

    Each chunk of a chat carries it as `message` too, and the last one of all carries the usage.
    """
    last: Json | None = None
    async with aclosing(chunks):
        async for chunk in chunks:
            if last is not None:
                usage = {} if chunk["choices"] else {"usage": chunk["usage"]}
                yield {**last, **usage}
                last = None
            if not chunk["choices"]:
                return
            chunk = {**chunk, "choices": [_to_classic_choice(item) for item in chunk["choices"]]}
            if chunk["choices"][0]["finish_reason"] is None:
                yield chunk
            else:  # may be the last one; it has no text that somebody could be waiting for
                last = chunk


def _to_classic_choice(choice: Json) -> Json:
    if "delta" not in choice:
        return choice
    message = {"role": "assistant", "content": choice["delta"].get("content", "")}
    return {**choice, "message": message, "delta": message}


# Answers in one piece


async def fold(chunks: Chunks, read_text: Callable[[Json], str]) -> tuple[list[Choice], Json]:
    """The choices and the usage; `read_text` finds the text in a choice of a chunk."""
    texts: dict[int, list[str]] = {}
    logprobs: dict[int, list[Json]] = {}
    finish_reasons: dict[int, str] = {}
    usage: Json = {}
    async with aclosing(chunks):
        async for chunk in chunks:
            usage = chunk.get("usage", usage)
            for choice in chunk["choices"]:
                texts.setdefault(choice["index"], []).append(read_text(choice))
                if choice["logprobs"] is not None:
                    logprobs.setdefault(choice["index"], []).append(choice["logprobs"])
                if choice["finish_reason"] is not None:
                    finish_reasons[choice["index"]] = choice["finish_reason"]
    choices = [
        Choice(
            index, "".join(parts), finish_reasons.get(index), _join_logprobs(logprobs.get(index))
        )
        for index, parts in sorted(texts.items())
    ]
    return choices, usage


def _join_logprobs(parts: list[Json] | None) -> Json | None:
    """One after the other; what is null in one of them is so in all."""
    if not parts:
        return None
    return {
        key: None if value is None else [entry for part in parts for entry in part[key]]
        for key, value in parts[0].items()
    }


async def _fold_answer(begin: Callable[[], Coroutine[Any, Any, Answer]]) -> JsonAnswer:
    answer = await begin()
    body = await answer.fold(answer.chunks)
    return JsonAnswer(_to_json(body).encode(), answer.headers)


async def run_while_connected(work: Coroutine[Any, Any, Result], receive: Receive) -> Result | None:
    """The result of `work`, or None after cancelling it because the client has left."""
    work_task = asyncio.create_task(work)
    watch_task = asyncio.create_task(_wait_for_disconnect(receive))
    tasks = (work_task, watch_task)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return work_task.result() if work_task.done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
