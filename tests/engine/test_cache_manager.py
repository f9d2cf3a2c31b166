"""Accounting of slots and blocks, without a model."""

from __future__ import annotations

import random

import pytest

from modules.engine.cache_manager import BLOCK_SIZE, CacheManager
from modules.engine.sequence import Sequence, SequenceRequest


def sequence(num_tokens: int) -> Sequence:
    return Sequence(SequenceRequest("x", tuple(range(num_tokens))), max_model_len=10_000)


def test_a_slot_and_its_blocks_come_back() -> None:
    cache = CacheManager(num_slots=2, num_blocks=8)
    seq = sequence(BLOCK_SIZE + 1)
    cache.allocate(seq)
    assert cache.capacity(seq) == 2 * BLOCK_SIZE
    assert cache.num_free_blocks == 6
    slot = seq.slot
    cache.free(seq)
    cache.free(seq)
    assert seq.slot is None
    assert cache.num_free_blocks == 8
    assert cache.take_released() == (slot,)
    assert cache.take_released() == ()
    cache.check_integrity()


def test_what_does_not_fit_is_refused() -> None:
    cache = CacheManager(num_slots=2, num_blocks=4)
    assert not cache.can_allocate(sequence(4 * BLOCK_SIZE + 1))
    for _ in range(2):
        seq = sequence(1)
        assert cache.can_allocate(seq)
        cache.allocate(seq)
    assert not cache.can_allocate(sequence(1)), "no slot is left"


def test_growth_doubles_until_memory_is_scarce() -> None:
    cache = CacheManager(num_slots=1, num_blocks=16)
    seq = sequence(2 * BLOCK_SIZE)
    cache.allocate(seq)
    seq.token_ids.append(0)
    assert cache.can_append(seq)
    cache.append(seq)
    assert cache.capacity(seq) == 4 * BLOCK_SIZE
    seq.token_ids += [0] * (2 * BLOCK_SIZE)
    assert cache.can_append(seq)
    cache.append(seq)
    assert cache.capacity(seq) == 7 * BLOCK_SIZE, "a quarter of what is free, not twice as much"
    seq.token_ids += [0] * (12 * BLOCK_SIZE)
    assert not cache.can_append(seq)


def test_a_lost_block_is_noticed() -> None:
    cache = CacheManager(num_slots=1, num_blocks=2)
    cache.num_free_blocks -= 1
    with pytest.raises(AssertionError):
        cache.check_integrity()


def test_any_order_of_operations_keeps_the_books() -> None:
    draw = random.Random(0)
    cache = CacheManager(num_slots=4, num_blocks=12)
    held: list[Sequence] = []
    for _ in range(2000):
        new = sequence(draw.randrange(1, 3 * BLOCK_SIZE))
        if draw.random() < 0.4 and cache.can_allocate(new):
            cache.allocate(new)
            held.append(new)
        elif held and draw.random() < 0.5:
            seq = draw.choice(held)
            seq.token_ids += [0] * draw.randrange(BLOCK_SIZE)
            if cache.can_append(seq):
                cache.append(seq)
                assert cache.capacity(seq) >= len(seq.token_ids)
        elif held:
            cache.free(held.pop(draw.randrange(len(held))))
        cache.check_integrity()
