"""BatchRunner: runs batches, one after the other, behind all requests that somebody waits for.

A line goes the way of a request over HTTP: the same check, the same answer, the same errors. What
is done, and how often, is modules.batch_store's business: here a line is run that has no result.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from extensions.openai.batch_lines import (
    RawLine,
    build_answered,
    build_left_out,
    find_faults,
    parse_line,
    split_lines,
)
from extensions.openai.chat_completions import answer_chat
from extensions.openai.completions import answer_completion
from extensions.openai.embeddings import answer_embeddings
from extensions.openai.errors import (
    ERROR_KINDS,
    to_error,
    to_internal_error,
    to_validation_error,
)
from extensions.openai.responses import Json
from extensions.openai.streaming import Answer
from extensions.openai.typing import (
    BatchLine,
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingRequest,
    WireModel,
)
from modules.batch_store import Batch, BatchFault, FinalStatus, LineResult
from modules.context import Context
from modules.errors import (
    CapabilityError,
    EngineDeadError,
    GenerationAbortedError,
    InvalidRequestError,
    NoModelLoadedError,
    ObjectNotFoundError,
    StorageFullError,
)
from modules.storage import UserData

logger = logging.getLogger(__name__)

# So that the engine finds a next one when a line ends.
NUM_LINES_PER_SEQUENCE = 2
# The event loop parses no line that is longer, in bytes.
MAX_PARSED_AT_ONCE = 64 * 1024
# So many lines are written in one go when they are left out: requests use the storage, too.
NUM_LEFT_OUT_AT_ONCE = 1000
# While no model is there to answer, or the folder cannot be had or written, in seconds.
RETRY_SECONDS = 5.0
# How often files whose time is over are looked for, in seconds.
SWEEP_SECONDS = 3600.0
# The model has gone, or is going: another may come, or this one with the next start.
PASSING = (NoModelLoadedError, EngineDeadError, GenerationAbortedError)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What may be asked in a batch."""

    request: type[WireModel]
    answer: Callable[[Context, Any], Awaitable[Json]]


async def _answer_chat(context: Context, body: ChatCompletionRequest) -> Json:
    with context.models.lease() as lease:
        return await _fold(await answer_chat(context, lease, body, is_background=True))


async def _answer_completion(context: Context, body: CompletionRequest) -> Json:
    with context.models.lease() as lease:
        return await _fold(await answer_completion(context, lease, body, is_background=True))


async def _fold(answer: Answer) -> Json:
    return await answer.fold(answer.chunks)


async def _answer_embeddings(context: Context, body: EmbeddingRequest) -> Json:
    answer = await answer_embeddings(context, body, is_background=True)
    return dict(from_json(answer.content))


ENDPOINTS: Mapping[str, Endpoint] = {
    "/v1/chat/completions": Endpoint(ChatCompletionRequest, _answer_chat),
    "/v1/completions": Endpoint(CompletionRequest, _answer_completion),
    "/v1/embeddings": Endpoint(EmbeddingRequest, _answer_embeddings),
}

# What becomes of the lines that have no result when a batch ends early.
LEFT_OUT: Mapping[FinalStatus, tuple[str, str]] = {
    "cancelled": ("batch_cancelled", "The batch was cancelled before this request was answered."),
    "expired": (
        "batch_expired",
        "The completion window was over before this request was answered.",
    ),
    "failed": ("batch_failed", "The batch has failed before this request was answered."),
}


class BatchRunner:
    """All of it happens on the event loop."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._wake = asyncio.Event()
        self._turn = asyncio.Lock()
        # Who holds it may have a whole input in memory; the batch whose turn it is has one anyway.
        self._reading = asyncio.Lock()
        self._batches: dict[str, asyncio.Task[None]] = {}
        self._lines: dict[str, asyncio.Task[None]] = {}
        # What has been logged: of each batch, and under "" of the folder.
        self._faults: dict[str, str] = {}

    async def run(self) -> None:
        """Until it is cancelled; then, lines that have no result yet wait for the next start."""
        try:
            while True:
                seconds = await self._look()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), seconds)
                self._wake.clear()
        finally:
            tasks = [*self._batches.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def wake(self) -> None:
        """There is a new batch."""
        self._wake.set()

    def interrupt(self, batch_id: str) -> None:
        """It is to be cancelled."""
        if batch_id in self._lines:
            self._lines[batch_id].cancel()
        elif batch_id not in self._batches:  # after a fault: its end need not wait
            self.wake()

    async def _look(self) -> float:
        """Begin what is there to be done; the seconds until it is worth another look."""
        try:
            batches = await self._context.storage.read(_find_work)
        except CapabilityError as error:
            self._report("", error)
            return RETRY_SECONDS
        self._faults.pop("", None)
        for batch in batches:
            if batch.id not in self._batches:
                self._batches[batch.id] = asyncio.create_task(self._run_batch(batch))
        return SWEEP_SECONDS

    async def _run_batch(self, batch: Batch) -> None:
        try:
            await self._process(batch)
        except Exception as error:  # the edge of the task: other batches go on
            self._report(batch.id, error)
            asyncio.get_running_loop().call_later(RETRY_SECONDS, self.wake)
        else:
            self._faults.pop(batch.id, None)
        finally:
            del self._batches[batch.id]

    def _report(self, place: str, error: Exception) -> None:
        """Log it, unless it is what was last logged of `place`."""
        is_known = isinstance(error, CapabilityError)
        fault = str(error) if is_known else type(error).__name__
        if self._faults.get(place) == fault:
            return
        self._faults[place] = fault
        if is_known:
            logger.warning("Batches do not run: %s", error)
        else:
            to_internal_error(error, self._context.settings.debug)

    async def _process(self, batch: Batch) -> None:
        try:
            status, faults = await self._run_to_an_end(batch)
        except ObjectNotFoundError as error:  # somebody has taken it out of the folder
            status, faults = "failed", [BatchFault("file_not_found", str(error))]
        await self._do(lambda data: data.batches.finish(batch.id, status, faults))

    async def _run_to_an_end(self, batch: Batch) -> tuple[FinalStatus, list[BatchFault]]:
        if not batch.num_total:  # it has not been looked at yet
            async with self._reading:
                num_total, faults = await self._check(batch)
            if faults:
                return "failed", faults
            batch = await self._do(lambda data: data.batches.begin(batch.id, num_total))
        else:  # it may have been cancelled since it was found
            batch = await self._do(lambda data: data.batches.get(batch.id))
        status, faults = await self._run_until_due(batch)
        if status != "completed":
            async with self._reading:
                await self._leave_out(batch, status)
        return status, faults

    async def _check(self, batch: Batch) -> tuple[int, list[BatchFault]]:
        """How many lines its input has, and what is wrong with them."""
        lines = await self._read_lines(batch)
        return len(lines), await asyncio.to_thread(find_faults, lines, batch.endpoint)

    async def _run_until_due(self, batch: Batch) -> tuple[FinalStatus, list[BatchFault]]:
        if batch.status == "finalizing":
            return "completed", []
        if batch.status == "cancelling":
            return "cancelled", []
        work = asyncio.create_task(self._run_in_turn(batch))
        self._lines[batch.id] = work
        try:
            seconds = batch.expires_at - self._context.storage.now()
            done, _ = await asyncio.wait({work}, timeout=max(0, seconds))
        finally:
            del self._lines[batch.id]
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        if not done:
            return "expired", []
        if work.cancelled():
            return "cancelled", []
        try:
            work.result()
        except StorageFullError as error:
            return "failed", [BatchFault("storage_quota_exceeded", str(error))]
        return "completed", []

    async def _run_in_turn(self, batch: Batch) -> None:
        async with self._turn:
            await self._run_lines(batch, await self._read_lines(batch))

    async def _run_lines(self, batch: Batch, lines: Sequence[RawLine]) -> None:
        """Those without a result, a number of them at a time. Raises StorageFullError."""
        done = await self._do(lambda data: data.batches.find_done(batch.id))
        room = asyncio.Semaphore(NUM_LINES_PER_SEQUENCE * self._context.settings.max_num_seqs)
        try:
            async with asyncio.TaskGroup() as group:
                for line in lines:
                    if line.number not in done:
                        await room.acquire()
                        task = group.create_task(self._run_line(batch, line))
                        task.add_done_callback(lambda _: room.release())
        except ExceptionGroup as faults:
            raise faults.exceptions[0] from None

    async def _read_lines(self, batch: Batch) -> list[RawLine]:
        content = await self._do(lambda data: data.files.read(batch.input_file_id))
        return await asyncio.to_thread(split_lines, content)

    async def _run_line(self, batch: Batch, line: RawLine) -> None:
        result = await self._answer(ENDPOINTS[batch.endpoint], line)
        await self._do(lambda data: data.batches.add_result(batch.id, result))

    async def _answer(self, endpoint: Endpoint, line: RawLine) -> LineResult:
        parsed = await _parse(line)
        while True:
            try:
                status, body = await self._ask(endpoint, parsed.body)
            except PASSING:
                await asyncio.sleep(RETRY_SECONDS)
            else:
                return build_answered(line, parsed.custom_id, status, body)

    async def _ask(self, endpoint: Endpoint, body: Json) -> tuple[int, Json]:
        """Status and body of the answer. Raises what is `PASSING`."""
        try:
            request = endpoint.request.model_validate(body)
            if getattr(request, "stream", False):
                raise InvalidRequestError("There are no streams in a batch.", "stream")
            return 200, await endpoint.answer(self._context, request)
        except PASSING:
            raise
        except ValidationError as error:
            detail = error.errors()[0]
            return to_validation_error(detail["loc"], detail)
        except tuple(ERROR_KINDS) as error:
            return to_error(error)
        except Exception as error:  # as in InternalErrorMiddleware
            return to_internal_error(error, self._context.settings.debug)

    async def _leave_out(self, batch: Batch, status: FinalStatus) -> None:
        """Say so of each line that has no result."""
        done = await self._do(lambda data: data.batches.find_done(batch.id))
        left = [line for line in await self._read_lines(batch) if line.number not in done]
        build = partial(build_left_out, code=LEFT_OUT[status][0], message=LEFT_OUT[status][1])
        for start in range(0, len(left), NUM_LEFT_OUT_AT_ONCE):
            piece = left[start : start + NUM_LEFT_OUT_AT_ONCE]
            results = await asyncio.to_thread(lambda lines: [*map(build, lines)], piece)
            await self._do(partial(_add_results, batch_id=batch.id, results=results))

    async def _do(self, work: Callable[[UserData], Any]) -> Any:
        return await self._context.storage.write(work)


async def _parse(line: RawLine) -> BatchLine:
    if len(line.text) > MAX_PARSED_AT_ONCE:
        return await asyncio.to_thread(parse_line, line)
    return parse_line(line)


def _add_results(data: UserData, batch_id: str, results: list[LineResult]) -> None:
    data.batches.add_results(batch_id, results)


def _find_work(data: UserData) -> list[Batch]:
    data.files.remove_expired()
    return data.batches.list_unfinished()
