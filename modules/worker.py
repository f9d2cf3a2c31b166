"""Worker: something that is loaded when it is first needed, and a thread that works with it.

What it is, and what is done with it, is the caller's business. One job runs after the other. The
thread ends when there are no more: OpenMP keeps a team of helpers for every thread that computes,
and more helpers than cores slow down each other, and with them the model that writes text.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future
from contextlib import aclosing, suppress
from typing import Generic, TypeVar

from modules.errors import CapabilityError

Resource = TypeVar("Resource")
Result = TypeVar("Result")

# Of Unix: with 10, a thread gets about a tenth of a core that one with 0 wants too. Somebody reads
# what the model writes while it is written; what is done here arrives whole or ahead of its time.
NICENESS = 10
LEAST_PRIORITY = 19
# How long the end of the server waits for a job.
CLOSE_SECONDS = 5.0
SHUTTING_DOWN = "The server is shutting down."
MAX_THREADS = 4


class Worker(Generic[Resource]):
    """`load` is called in the thread, at the first job, and again at the next one if it fails."""

    def __init__(self, name: str, load: Callable[[], Resource]) -> None:
        self._name = name
        self._load = load
        self._resource: Resource | None = None
        self._jobs: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_closed = threading.Event()

    @property
    def resource(self) -> Resource | None:
        """What `load` has returned; None before the first job."""
        return self._resource

    def submit(self, work: Callable[[Resource], Result]) -> Future[Result]:
        """Have `work` done. The future raises what `load` and `work` raise.

        One that is cancelled before its turn is left out. Raises CapabilityError once closed.
        """
        future: Future[Result] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work(self._get_resource()))
            except BaseException as error:  # the edge of the thread: whoever waits hears of it
                future.set_exception(error)

        with self._lock:
            if self._is_closed.is_set():
                raise CapabilityError(SHUTTING_DOWN)
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
        return future

    async def run(self, work: Callable[[Resource], Result]) -> Result:
        """As `submit`, for the event loop."""
        return await asyncio.wrap_future(self.submit(work))

    async def stream(
        self, work: Callable[[Resource], Iterator[Result]]
    ) -> AsyncGenerator[Result, None]:
        """What `work` yields, as soon as it is there. Closing this ends it at its next item."""

        def put_all(resource: Resource, outlet: Outlet[Result]) -> None:
            for item in work(resource):
                outlet.put(item)

        async with aclosing(self.stream_from(put_all)) as items:
            async for item in items:
                yield item

    async def stream_from(
        self, work: Callable[[Resource, Outlet[Result]], None]
    ) -> AsyncGenerator[Result, None]:
        """As `stream`, for work that is called back and cannot yield."""
        outlet: Outlet[Result] = Outlet(self._is_closed)
        future = self.submit(lambda resource: work(resource, outlet))
        future.add_done_callback(lambda _: outlet.end())
        try:
            while (item := await outlet.take()) is not None:
                yield item
            future.result()  # raises what has ended it
        finally:
            outlet.close()
            future.cancel()

    def close(self) -> None:
        """Refuse new jobs, leave out those that wait, and end streams at their next item; then wait
        for the job that runs, but not for long.

        Some libraries abort a process that exits while one of its threads is in their code.
        """
        with self._lock:
            self._is_closed.set()
            thread = self._thread
        if thread is not None:
            thread.join(CLOSE_SECONDS)

    def _get_resource(self) -> Resource:
        if self._is_closed.is_set():
            raise CapabilityError(SHUTTING_DOWN)
        if self._resource is None:
            self._resource = self._load()
        return self._resource

    def _run(self) -> None:
        lower_priority()
        while True:
            with self._lock:
                if not self._jobs:
                    self._thread = None
                    return
                job = self._jobs.popleft()
            job()


class Outlet(Generic[Result]):
    """Where work puts what it makes: from its own thread, for one that waits on the event loop."""

    def __init__(self, is_shutting_down: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._inbox: asyncio.Queue[Result | None] = asyncio.Queue()
        self._is_closed = threading.Event()
        self._is_shutting_down = is_shutting_down

    # In the worker's thread

    def check(self) -> None:
        """Raises OutletClosedError if nobody waits any more, and CapabilityError if the server is
        shutting down; the work should let both pass.
        """
        if self._is_closed.is_set():
            raise OutletClosedError
        if self._is_shutting_down.is_set():
            raise CapabilityError(SHUTTING_DOWN)

    def put(self, item: Result) -> None:
        """Raises what `check` raises."""
        self.check()
        self._hand_over(item)

    def end(self) -> None:
        self._hand_over(None)

    def _hand_over(self, item: Result | None) -> None:
        with suppress(RuntimeError):  # a loop that is closed has nobody left to tell
            self._loop.call_soon_threadsafe(self._inbox.put_nowait, item)

    # On the event loop

    async def take(self) -> Result | None:
        """None: there is no more."""
        return await self._inbox.get()

    def close(self) -> None:
        self._is_closed.set()


class OutletClosedError(Exception):
    """Ends work whose results nobody waits for."""


def lower_priority() -> None:
    """Let this thread, and those that it starts, give way to the other ones of this process."""
    if sys.platform == "linux":  # elsewhere, niceness is the whole process' own
        wished = min(os.getpriority(os.PRIO_PROCESS, os.getpid()) + NICENESS, LEAST_PRIORITY)
        own = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, 0, max(own, wished))  # only root may ask for more


def count_threads() -> int:
    """With how many threads one capability computes: more than a few gain it nothing."""
    return min(os.cpu_count() or 1, MAX_THREADS)
