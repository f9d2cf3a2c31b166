"""Histories of sequences, and what repeats in them, against loops that are plain to see."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor

from modules.engine.token_history import (
    MAX_DRY_MATCH,
    GrowingArray,
    TokenCounts,
    find_ngram_followers,
    find_repeats,
    find_window,
)


def test_an_array_grows_and_its_copy_goes_its_own_way() -> None:
    array = GrowingArray([1, 2])
    for value in range(3, 200):
        array.append(value)
    other = array.copy()
    other.append(0)
    assert array.values.tolist() == list(range(1, 200))
    assert other.values.tolist() == [*range(1, 200), 0]


def test_counts() -> None:
    counts = TokenCounts()
    for token_id in (5, 3, 5, 5, 8):
        counts.add(token_id)
    other = counts.copy()
    other.add(3)
    assert dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True)) == {5: 3, 3: 1, 8: 1}
    assert dict(zip(other.ids.tolist(), other.counts.tolist(), strict=True)) == {5: 3, 3: 2, 8: 1}


def test_a_window_of_0_is_all() -> None:
    ids = np.arange(5)
    assert find_window(ids, 2).tolist() == [3, 4]
    assert find_window(ids, 0).tolist() == find_window(ids, 99).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [0, 1, 2, 4, 60])
def test_ngram_followers_equal_transformers(size, length) -> None:
    ids = [random.Random(length).randrange(4) for _ in range(length)]
    if length < size:
        assert find_ngram_followers(np.array(ids, dtype=np.int64), size).tolist() == []
        return
    scores = NoRepeatNGramLogitsProcessor(size)(torch.tensor([ids]), torch.zeros(1, 4))
    banned = (scores[0] == -torch.inf).nonzero()[:, 0].tolist()
    assert find_ngram_followers(np.array(ids), size).tolist() == banned


def find_repeats_slowly(ids: list[int], breakers: frozenset[int]) -> dict[int, int]:
    longest: dict[int, int] = {}
    if not ids or ids[-1] in breakers:
        return longest
    for end in range(len(ids) - 1):
        length = 0
        while length < MAX_DRY_MATCH and end - length >= 0:
            token_id = ids[len(ids) - 1 - length]
            if ids[end - length] != token_id or token_id in breakers:
                break
            length += 1
        follower = ids[end + 1]
        if length and follower not in breakers:
            longest[follower] = max(longest.get(follower, 0), length)
    return longest


@pytest.mark.parametrize("seed", range(40))
def test_repeats_equal_a_plain_search(seed) -> None:
    generator = random.Random(seed)
    ids = [generator.randrange(generator.choice([1, 2, 3, 6])) for _ in range(seed * 4)]
    breakers = frozenset({2}) if seed % 2 else frozenset()
    found, lengths = find_repeats(np.array(ids, dtype=np.int64), breakers)
    assert dict(zip(found.tolist(), lengths.tolist(), strict=True)) == find_repeats_slowly(
        ids, breakers
    )


def test_a_repeat_is_followed_back_to_a_limit() -> None:
    ids, lengths = find_repeats(np.array([7] * 200), frozenset())
    assert (ids.tolist(), lengths.tolist()) == ([7], [MAX_DRY_MATCH])
