"""BatchWorker: a model that computes what many clients ask for in common batches.

On a CPU, several threads compute batches of their own, each on one core: no thread waits for
another, and OpenMP makes no teams of helpers, which would slow down the model that writes text. On
a card one thread does.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from modules.batch_queue import (
    Batch,
    BatchLimits,
    BatchQueue,
    Computed,
    Item,
    Preparation,
    Prepared,
    Request,
)
from modules.errors import CapabilityError
from modules.worker import CLOSE_SECONDS, SHUTTING_DOWN, lower_priority

Input = TypeVar("Input")
ModelInput = TypeVar("ModelInput", contravariant=True)


class BatchModel(Protocol[ModelInput]):
    """Called by several threads at once, unless `is_on_card`."""

    @property
    def limits(self) -> BatchLimits: ...

    @property
    def is_on_card(self) -> bool: ...

    def prepare(self, inputs: Sequence[ModelInput]) -> list[Prepared]:
        """Raises InvalidRequestError for what the model cannot read."""
        ...

    def compute(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """A row for each."""
        ...


class BatchWorker(Generic[Input]):
    """`load` is called in a thread, for the first request, and again for the next if it fails.

    Then all requests that wait have failed, with what it raised.
    """

    def __init__(self, name: str, load: Callable[[], BatchModel[Input]]) -> None:
        self._name = name
        self._load = load
        self._model: BatchModel[Input] | None = None
        self._queue = BatchQueue()
        self._changed = threading.Condition()
        self._has_threads = False
        self._threads: list[threading.Thread] = []
        self._is_closed = False

    @property
    def is_loaded(self) -> bool:
        return self._model is not None

    async def run(self, inputs: Sequence[Input], *, is_background: bool = False) -> Computed:
        """Compute a row for each input. What is in the background waits for all that is not.

        Who is cancelled takes his inputs out. Raises what `load` and the model raise, and
        CapabilityError once closed.
        """
        request = Request(inputs, is_background)
        if not inputs:
            return Computed(np.empty((0, 0), np.float32), (), 0)
        request.future.set_running_or_notify_cancel()  # only who computes it may end it
        self._add(request)
        try:
            return await asyncio.wrap_future(request.future)
        finally:
            with self._changed:
                if request.is_open:
                    self._queue.remove(request)

    def close(self) -> None:
        """Fail all that waits. What is computed just now goes on to its end, for nobody, and is
        waited for: see `Worker.close`.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._fail(self._queue.requests, CapabilityError(SHUTTING_DOWN))
        for thread in self._threads:
            thread.join(CLOSE_SECONDS)

    def _add(self, request: Request[Input]) -> None:
        with self._changed:
            if self._is_closed:
                raise CapabilityError(SHUTTING_DOWN)
            self._queue.add(request)
            self._changed.notify()
            if not self._has_threads:
                self._has_threads = True
                self._start_thread(self._run_first)

    def _start_thread(self, run: Callable[[], None]) -> None:
        thread = threading.Thread(target=run, name=self._name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run_first(self) -> None:
        lower_priority()
        try:
            num_threads = use_one_core()
            model = self._model = self._load()
        except BaseException as error:  # the edge of the thread: whoever waits hears of it
            with self._changed:
                self._has_threads = False  # the next request starts another thread
                waiting = self._queue.requests
                self._fail(waiting, error)
            return
        for _ in range(1 if model.is_on_card else num_threads, 1, -1):
            self._start_thread(self._run_other)
        self._work(model)

    def _run_other(self) -> None:
        lower_priority()
        use_one_core()
        assert self._model is not None
        self._work(self._model)

    def _work(self, model: BatchModel[Input]) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._queue.has_work)
                if self._is_closed:
                    return
                work = self._queue.take(model.limits)
                if self._queue.has_work:
                    self._changed.notify()
            match work:
                case Preparation():
                    self._prepare(model, work)
                case Batch():
                    self._compute(model, work.items)

    def _prepare(self, model: BatchModel[Input], preparation: Preparation) -> None:
        try:
            prepared = model.prepare(preparation.inputs)
        except BaseException as error:
            self._fail((preparation.request,), error)
            return
        with self._changed:
            self._queue.put(preparation, prepared)
            self._changed.notify()

    def _compute(self, model: BatchModel[Input], items: Sequence[Item]) -> None:
        requests = tuple({item.request: None for item in items})
        try:
            rows = model.compute([item.prepared for item in items])
        except BaseException as error:
            if len(requests) == 1:
                self._fail(requests, error)
                return
            for request in requests:  # one of them is at fault: each by itself
                self._compute(model, [item for item in items if item.request is request])
            return
        with self._changed:
            for item, row in zip(items, rows, strict=True):
                item.request.rows[item.index] = row
            done = [
                each for each in requests if each.is_open and len(each.rows) == len(each.inputs)
            ]
            for request in done:
                self._queue.remove(request)
        for request in done:
            request.future.set_result(request.build())

    def _fail(self, requests: Sequence[Request[Input]], error: BaseException) -> None:
        with self._changed:
            failing = [request for request in requests if request.is_open]
            for request in failing:
                self._queue.remove(request)
        for request in failing:
            request.future.set_exception(error)


_CHANGING_THREADS = threading.Lock()


def use_one_core() -> int:
    """Let torch compute in the calling thread on one core; with how many it would have otherwise.

    torch keeps that number for threads that are yet to come, too, which have to have theirs back.
    Only a thread that ends can see to that: the number is also its own.
    """
    import torch

    with _CHANGING_THREADS:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        restoring = threading.Thread(target=torch.set_num_threads, args=(num_threads,))
        restoring.start()
        restoring.join()
    return num_threads
