"""What a sequence has said so far, as arrays that grow by a token at a time; what repeats in it.

On the host, of one sequence: a step over a batch only joins what these give.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
NO_IDS: Ids = np.zeros(0, np.int64)

# Longer repetitions are not told apart by DRY.
MAX_DRY_MATCH = 50


class GrowingArray:
    """Integers at the end of which more can be put, at a constant cost."""

    def __init__(self, values: Iterable[int] = ()) -> None:
        self._buffer: Ids = np.array([*values], dtype=np.int64)
        self._size = len(self._buffer)

    @property
    def values(self) -> Ids:
        """A view; good until the next `append`."""
        return self._buffer[: self._size]

    def append(self, value: int) -> None:
        if self._size == len(self._buffer):
            self._buffer = np.concatenate([self._buffer, np.zeros(self._size + 64, np.int64)])
        self._buffer[self._size] = value
        self._size += 1

    def copy(self) -> GrowingArray:
        return GrowingArray(self.values)


class TokenCounts:
    """Which tokens there are, each once, and how often."""

    def __init__(self) -> None:
        self._ids = GrowingArray()
        self._counts = GrowingArray()
        self._places: dict[int, int] = {}

    @property
    def ids(self) -> Ids:
        return self._ids.values

    @property
    def counts(self) -> Ids:
        return self._counts.values

    def add(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids.values):
            self._ids.append(token_id)
            self._counts.append(0)
        self._counts.values[place] += 1

    def copy(self) -> TokenCounts:
        other = TokenCounts()
        other._ids, other._counts = self._ids.copy(), self._counts.copy()
        other._places = self._places.copy()
        return other


def find_window(ids: Ids, size: int) -> Ids:
    """The last `size` ids; 0: all."""
    return ids[-size:] if size else ids


def find_ngram_followers(ids: Ids, size: int) -> Ids:
    """Tokens that would complete an n-gram of `size` ≥ 1 tokens that is in `ids` already."""
    if len(ids) < size:
        return ids[:0]
    starts = np.arange(len(ids) - size + 1)
    for offset in range(size - 1):
        starts = starts[ids[starts + offset] == ids[len(ids) - size + 1 + offset]]
    return np.unique(ids[starts + size - 1])


def find_repeats(ids: Ids, breakers: frozenset[int]) -> tuple[Ids, Ids]:
    """Tokens that would carry on with what has been said before, each once, and how many of the
    last tokens are said again then, at most MAX_DRY_MATCH (DRY, p-e-w 2024).

    No repetition contains a breaker.
    """
    ends = np.flatnonzero(ids[:-1] == ids[-1]) if len(ids) else ids[:0]
    if not len(ends) or int(ids[-1]) in breakers:
        return ids[:0], ids[:0]
    longest = np.ones_like(ends)
    open_ends = np.arange(len(ends))  # those whose repetition may go further back
    for length in range(1, min(MAX_DRY_MATCH, len(ids) - 1)):
        previous = ids[-1 - length]
        places = ends[open_ends] - length
        fits = (places >= 0) & (ids[places] == previous)
        open_ends = open_ends[fits]
        if not len(open_ends) or int(previous) in breakers:
            break
        longest[open_ends] += 1
    return _keep_longest(ids[ends + 1], longest, breakers)


def _keep_longest(ids: Ids, lengths: Ids, breakers: frozenset[int]) -> tuple[Ids, Ids]:
    order = np.lexsort((lengths, ids))
    ids, lengths = ids[order], lengths[order]
    is_longest = np.append(ids[1:] != ids[:-1], True)
    ids, lengths = ids[is_longest], lengths[is_longest]
    allowed = np.array([int(token_id) not in breakers for token_id in ids], dtype=bool)
    return ids[allowed], lengths[allowed]
