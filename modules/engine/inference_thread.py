"""InferenceThread: one thread steps the engines of all models, in turn.

One, because each thread that computes has helpers of its own: with those of two there are more of
them than cores. What an engine is told, and what becomes of its outputs, is not known here.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol


@dataclass(frozen=True, slots=True)
class _Join:
    pass


@dataclass(frozen=True, slots=True)
class _Leave:
    is_done: threading.Event = field(default_factory=threading.Event)


class HostedEngine(Protocol):
    """What the thread calls, and nobody else."""

    @property
    def has_unfinished(self) -> bool: ...

    @property
    def has_foreground(self) -> bool:
        """Whether it has something to do that is not of the background."""
        ...

    def obey(self, command: object) -> None: ...

    def step(self) -> None: ...

    def fail(self, error: BaseException) -> None:
        """`obey` or `step` has raised; from now on the engine has nothing to do."""
        ...

    def let_go(self) -> None:
        """The last call: whatever holds memory is dropped."""
        ...


class InferenceThread:
    """Runs while it has engines to host: begins with the first one, ends with the last one."""

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[tuple[HostedEngine, object]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of what callers change: who is hosted, and the thread
        self._hosted: list[HostedEngine] = []
        self._thread: threading.Thread | None = None
        self._in_turn: deque[HostedEngine] = deque()  # touched on the thread only

    def add(self, engine: HostedEngine) -> None:
        """From now on `engine` gets what is sent to it, and steps when it has something to do."""
        with self._lock:
            self._hosted.append(engine)
            self.send(engine, _Join())
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
                self._thread.start()

    def send(self, engine: HostedEngine, command: object) -> None:
        """For `engine.obey`, in this order. What is sent to one that is not hosted is dropped."""
        self._inbox.put((engine, command))

    def remove(self, engine: HostedEngine) -> None:
        """Wait until `engine` has been let go, at the end of a step that may be running.

        Idempotent. The thread itself must not call it.
        """
        with self._lock:
            if engine not in self._hosted or self._thread is None:
                return
            leave = _Leave()
            self.send(engine, leave)
            leave.is_done.wait()
            self._hosted.remove(engine)
            if not self._hosted:
                self._thread.join()
                self._thread = None

    # On the thread. Its functions are small so that no variable holds an engine while it waits.

    def _run(self) -> None:
        while not self._in_turn:  # before the first one may stand what came too late for the last
            self._carry_out(*self._inbox.get())
        while self._in_turn:
            if self._inbox.empty() and self._is_busy:
                self._step_next()
            else:
                self._carry_out(*self._inbox.get())

    @property
    def _is_busy(self) -> bool:
        return any(engine.has_unfinished for engine in self._in_turn)

    def _carry_out(self, engine: HostedEngine, command: object) -> None:
        if isinstance(command, _Join):
            self._in_turn.append(engine)
        elif isinstance(command, _Leave):
            self._in_turn.remove(engine)
            engine.let_go()
            command.is_done.set()
        elif engine in self._in_turn:
            _guard(engine, partial(engine.obey, command))

    def _step_next(self) -> None:
        """Of those with something to do, the one whose last step was longest ago; one with nothing
        but the background only if there is no other.
        """
        busy = [engine for engine in self._in_turn if engine.has_unfinished]
        engine = next((each for each in busy if each.has_foreground), busy[0])
        self._in_turn.remove(engine)
        self._in_turn.append(engine)
        _guard(engine, engine.step)


def _guard(engine: HostedEngine, action: Callable[[], None]) -> None:
    """The edge of the thread: an engine that breaks must not take the others with it."""
    try:
        action()
    except BaseException as error:
        engine.fail(error)
