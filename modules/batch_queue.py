"""BatchQueue: what is computed next, of the texts of all clients. Integers only: no torch.

Texts wait sorted by their length, so that a batch of neighbours needs little padding. Requests take
turns in having one of theirs in the next batch: a short one does not wait for all of a long one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Input = TypeVar("Input")

# How much is cut into tokens between two batches: enough to choose from, and soon done.
PREPARED_INPUTS = 64
PREPARED_CHARS = 2**16


@dataclass(frozen=True, slots=True)
class BatchLimits:
    max_items: int
    max_tokens: int
    """Padding included. A single text may have more."""
    max_padding: int
    """So many tokens of padding cost less than a batch of its own would."""
    max_padding_share: float = 0.125
    """Beyond `max_padding`, of the true tokens."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """An input in tokens."""

    features: Mapping[str, Any]
    num_tokens: int
    """That the model reads, special ones included."""
    is_truncated: bool = False


@dataclass(frozen=True, slots=True)
class Computed:
    rows: NDArray[np.float32]
    """[number of inputs, ...], in their order."""
    num_tokens: tuple[int, ...]
    """Of each input."""
    num_truncated: int


@dataclass(eq=False, slots=True)
class Request(Generic[Input]):
    """What one client waits for."""

    inputs: Sequence[Input]
    is_background: bool = False
    future: Future[Computed] = field(default_factory=Future)
    num_taken: int = 0
    """Inputs that have been handed out to be prepared."""
    prepared: dict[int, Prepared] = field(default_factory=dict)
    waiting: dict[int, Item] = field(default_factory=dict)
    """By index: prepared, and in no batch yet."""
    rows: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    is_open: bool = True

    def build(self) -> Computed:
        """Once there is a row for every input."""
        indices = range(len(self.inputs))
        return Computed(
            np.stack([self.rows[index] for index in indices]),
            tuple(self.prepared[index].num_tokens for index in indices),
            sum(prepared.is_truncated for prepared in self.prepared.values()),
        )


@dataclass(frozen=True, slots=True, order=True)
class Item:
    """Sorted by length, and of the same length by arrival."""

    length: int
    serial: int
    index: int = field(compare=False)
    prepared: Prepared = field(compare=False)
    request: Request[Any] = field(compare=False)


@dataclass(frozen=True, slots=True)
class Preparation:
    """Inputs of one request, to be cut into tokens; the first one is `start`."""

    request: Request[Any]
    start: int
    inputs: Sequence[Any]


@dataclass(frozen=True, slots=True)
class Batch:
    items: Sequence[Item]


@dataclass(slots=True)
class _Lane:
    unprepared: deque[Request[Any]] = field(default_factory=deque)
    turns: deque[Request[Any]] = field(default_factory=deque)
    """Requests with items, the next one first."""
    items: list[Item] = field(default_factory=list)
    """Sorted."""
    num_inputs: int = 0
    """Handed out to be prepared since the last batch."""
    num_chars: int = 0
    """Of these."""

    @property
    def has_work(self) -> bool:
        return bool(self.unprepared or self.items)

    @property
    def can_prepare(self) -> bool:
        return self.num_inputs < PREPARED_INPUTS and self.num_chars < PREPARED_CHARS


class BatchQueue:
    def __init__(self) -> None:
        self._foreground = _Lane()
        self._background = _Lane()
        self._serials = count()
        self._open: set[Request[Any]] = set()

    @property
    def has_work(self) -> bool:
        return self._foreground.has_work or self._background.has_work

    @property
    def requests(self) -> tuple[Request[Any], ...]:
        """Those that are not answered yet."""
        return tuple(self._open)

    def add(self, request: Request[Any]) -> None:
        self._open.add(request)
        self._lane_of(request).unprepared.append(request)

    def remove(self, request: Request[Any]) -> None:
        """With all of it that waits. What is being computed just now is of no use any more."""
        request.is_open = False
        self._open.discard(request)
        lane = self._lane_of(request)
        if request in lane.unprepared:
            lane.unprepared.remove(request)
        if request in lane.turns:
            lane.turns.remove(request)
            lane.items = [item for item in lane.items if item.request is not request]
            request.waiting.clear()

    def take(self, limits: BatchLimits) -> Preparation | Batch | None:
        """The next work, of the background only if there is no other."""
        lane = self._foreground if self._foreground.has_work else self._background
        if lane.items and not (lane.unprepared and lane.can_prepare):
            return _take_batch(lane, limits)
        if lane.unprepared:
            return _take_preparation(lane)
        return None

    def put(self, preparation: Preparation, prepared: Sequence[Prepared]) -> None:
        """What has been prepared waits to be computed."""
        request = preparation.request
        if not request.is_open:
            return
        lane = self._lane_of(request)
        if not request.waiting:
            lane.turns.append(request)
        for index, each in enumerate(prepared, preparation.start):
            item = Item(each.num_tokens, next(self._serials), index, each, request)
            request.prepared[index] = each
            request.waiting[index] = item
            insort(lane.items, item)

    def check_integrity(self) -> None:
        """Every item is of an open request that knows of it and has its turn."""
        for lane in (self._foreground, self._background):
            assert lane.items == sorted(lane.items)
            assert len(set(lane.turns)) == len(lane.turns)
            waiting = [item for request in lane.turns for item in request.waiting.values()]
            assert sorted(waiting) == lane.items
            assert all(request.waiting for request in lane.turns)
            assert all(request.is_open for request in (*lane.turns, *lane.unprepared))

    def _lane_of(self, request: Request[Any]) -> _Lane:
        return self._background if request.is_background else self._foreground


def _take_preparation(lane: _Lane) -> Preparation:
    if not lane.can_prepare:  # and nothing to compute before
        lane.num_inputs = lane.num_chars = 0
    request = lane.unprepared.popleft()
    start = request.num_taken
    while request.num_taken < len(request.inputs) and lane.can_prepare:
        lane.num_inputs += 1
        lane.num_chars += _count_chars(request.inputs[request.num_taken])
        request.num_taken += 1
    if request.num_taken < len(request.inputs):
        lane.unprepared.append(request)
    return Preparation(request, start, request.inputs[start : request.num_taken])


def _take_batch(lane: _Lane, limits: BatchLimits) -> Batch:
    lane.num_inputs = lane.num_chars = 0
    lane.turns.rotate(-1)
    anchor = next(iter(lane.turns[-1].waiting.values()))
    start, end = choose_batch(lane.items, bisect_left(lane.items, anchor), limits)
    items = lane.items[start:end]
    del lane.items[start:end]
    for item in items:
        del item.request.waiting[item.index]
    lane.turns = deque(request for request in lane.turns if request.waiting)
    return Batch(items)


def _count_chars(given: Any) -> int:
    """Of a text, or of texts or token ids in a tuple."""
    if isinstance(given, str):
        return len(given)
    return sum(len(part) if isinstance(part, str) else 1 for part in given)


def choose_batch(items: Sequence[Item], anchor: int, limits: BatchLimits) -> tuple[int, int]:
    """Start and end of a batch of neighbours around an item, in sorted `items`."""
    start, end = anchor, anchor + 1
    num_tokens = items[anchor].length
    while end - start < limits.max_items:
        longest = items[end - 1].length
        below = longest - items[start - 1].length if start else None
        above = (items[end].length - longest) * (end - start) if end < len(items) else None
        if below is None and above is None:
            break
        goes_up = below is None or (above is not None and above < below)
        added = items[end if goes_up else start - 1].length
        padded = (end - start + 1) * max(longest, added)
        padding = padded - num_tokens - added
        most = max(limits.max_padding, limits.max_padding_share * (num_tokens + added))
        if padded > limits.max_tokens or padding > most:
            break
        num_tokens += added
        start, end = (start, end + 1) if goes_up else (start - 1, end)
    return start, end
