"""AsyncEngine: the only bridge between the inference thread, which runs its engine, and the loop.

Commands go down through the thread's inbox; all outputs of a step come up in one call to the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import traceback
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field, replace

from modules.engine.engine import Engine
from modules.engine.generate_engine import GenerateEngine
from modules.engine.inference_thread import InferenceThread
from modules.engine.outputs import FinishReason, TokenOutput
from modules.engine.scheduler import ScheduledBatch
from modules.engine.sequence import SequenceRequest
from modules.errors import EngineDeadError, GenerationAbortedError, ServerError

logger = logging.getLogger(__name__)

# Steps in a row in which every sequence fails, until the model counts as broken. Those of sequences
# with adapters prove nothing: the adapters may be.
MAX_FAILED_STEPS = 3


@dataclass(frozen=True, slots=True)
class _Add:
    requests: tuple[SequenceRequest, ...]


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


@dataclass(slots=True)
class _Stream:
    """What one `generate` still waits for; touched on the event loop only."""

    open_ids: set[str]
    is_background: bool
    inbox: asyncio.Queue[list[TokenOutput] | ServerError] = field(default_factory=asyncio.Queue)


class AsyncEngine:
    """On a thread that other engines may share, from when it is made until `stop`."""

    def __init__(
        self, engine: Engine | GenerateEngine, thread: InferenceThread | None = None
    ) -> None:
        """`thread`: None means one of its own."""
        self._engine = engine
        self._streams: dict[str, _Stream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._death: str | None = None
        self._num_failed_steps = 0
        self._thread = thread or InferenceThread()
        self._thread.add(self)

    # On the event loop

    def check_health(self) -> None:
        """Raises EngineDeadError when nothing can be generated any more."""
        if self._death is not None:
            raise EngineDeadError(self._death)

    async def generate(
        self, requests: Iterable[SequenceRequest]
    ) -> AsyncGenerator[list[TokenOutput], None]:
        """All outputs of the requests, a list per step, until each is finished or aborted.

        Closing the generator aborts what is still running.

        Raises:
            EngineDeadError: the engine has failed or was stopped before, or fails meanwhile.
            GenerationAbortedError: the engine was stopped meanwhile.
        """
        self._loop = asyncio.get_running_loop()  # before the question: a death must reach it
        self.check_health()
        added = tuple(requests)
        is_background = all(request.is_background for request in added)
        stream = _Stream({request.request_id for request in added}, is_background)
        self._streams.update(dict.fromkeys(stream.open_ids, stream))
        self._thread.send(self, _Add(added))
        try:
            while stream.open_ids or not stream.inbox.empty():
                outputs = await stream.inbox.get()
                if isinstance(outputs, ServerError):
                    raise outputs
                if outputs:
                    yield outputs
        finally:
            for request_id in tuple(stream.open_ids):
                self.abort(request_id)

    def abort(self, request_id: str) -> None:
        """End one sequence of a running `generate`; idempotent."""
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            stream.open_ids.discard(request_id)
            stream.inbox.put_nowait([])  # whoever waits for more must look again
            self._thread.send(self, _Abort(request_id))

    def abort_all(self) -> None:
        """End every sequence of every `generate`, but those of the background."""
        for request_id, stream in tuple(self._streams.items()):
            if not stream.is_background:
                self.abort(request_id)

    def stop(self) -> None:
        """Let the engine go; what is still running fails with GenerationAbortedError.

        Returns when nothing here holds the model any more. Idempotent. For any thread but that of
        inference.
        """
        self._thread.remove(self)

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        batches: dict[int, tuple[_Stream, list[TokenOutput]]] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue  # aborted while the step was running
            batches.setdefault(id(stream), (stream, []))[1].append(output)
            if output.finish_reason is not None:
                del self._streams[output.request_id]
                stream.open_ids.discard(output.request_id)
        for stream, batch in batches.values():
            stream.inbox.put_nowait(batch)

    def _fail_all(self, error: ServerError) -> None:
        streams = {id(stream): stream for stream in self._streams.values()}
        self._streams.clear()
        for stream in streams.values():
            stream.open_ids.clear()
            stream.inbox.put_nowait(error)

    # On the inference thread: see HostedEngine

    @property
    def has_unfinished(self) -> bool:
        return self._death is None and self._engine.has_unfinished

    @property
    def has_foreground(self) -> bool:
        return self._death is None and self._engine.has_foreground

    def obey(self, command: object) -> None:
        match command:
            case _Add(requests) if self._death is None:
                self._publish([*filter(None, map(self._add, requests))])
            case _Abort(request_id) if self._death is None:
                self._engine.abort(request_id)

    def step(self) -> None:
        self._publish(self._step())

    def fail(self, error: BaseException) -> None:
        _log("Inference ended", error)
        self._die(EngineDeadError("The model has failed; it must be loaded again."))

    def let_go(self) -> None:
        self._die(GenerationAbortedError("The model was unloaded before this reply was whole."))
        del self._engine  # whoever may still hold this bridge does not hold a model with it

    def _step(self) -> list[TokenOutput]:
        batch = self._engine.schedule()
        try:
            outputs = self._engine.execute(batch)
        except Exception as error:  # one request's fault must not be everybody's
            _log("A step has failed", error)
            return self._step_apart(batch)
        self._num_failed_steps = 0
        return outputs

    def _step_apart(self, batch: ScheduledBatch) -> list[TokenOutput]:
        """Each sequence of `batch` on its own; those that fail even so are at fault, and end.

        If that is all of them, time and again, then the model is: the last fault goes on its way.
        """
        self._num_failed_steps += not all(map(_has_adapters, batch.units))
        outputs = []
        for unit in batch.units:
            try:
                outputs += self._engine.execute(unit)
                self._num_failed_steps = 0
            except Exception as error:
                reason = error if isinstance(error, ServerError) else None
                if reason is not None:  # what the request brought; all is well with the model
                    self._num_failed_steps = 0
                if self._num_failed_steps >= MAX_FAILED_STEPS and not _has_adapters(unit):
                    raise
                _log("A generation has failed", error)
                failure = self._engine.fail(unit.items[0].seq.request_id)
                outputs.append(replace(failure, error=reason))
        return outputs

    def _add(self, request: SequenceRequest) -> TokenOutput | None:
        """The output that says so, if the engine cannot take it."""
        try:
            self._engine.add(request)
        except ValueError as error:
            _log("A generation was not begun", error)
            return TokenOutput(request.request_id, token_id=0, finish_reason=FinishReason.ERROR)
        return None

    def _publish(self, outputs: list[TokenOutput]) -> None:
        if outputs and self._loop is not None:
            self._loop.call_soon_threadsafe(self._deliver, outputs)

    def _die(self, error: ServerError) -> None:
        self._death = str(error)
        if self._loop is not None:
            # a loop that is closed has nobody left to tell
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._fail_all, error)


def _has_adapters(unit: ScheduledBatch) -> bool:
    return bool(unit.items[0].seq.adapters)


def _log(what: str, error: BaseException) -> None:
    """Without the message, which may quote a prompt."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    logger.error("%s: %s at %s:%s", what, type(error).__name__, where.filename, where.lineno)
