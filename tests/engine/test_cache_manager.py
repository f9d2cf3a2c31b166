"""Accounting of blocks, without a model."""

from __future__ import annotations

import random

import pytest

from modules.engine.cache_manager import CacheManager
from modules.engine.sequence import Sequence, SequenceRequest

SIZE = 4


def sequence(num_tokens: int) -> Sequence:
    return Sequence(SequenceRequest("x", tuple(range(num_tokens))), max_model_len=10_000)


def test_blocks_come_back() -> None:
    cache = CacheManager(num_blocks=8, block_size=SIZE)
    seq = sequence(SIZE + 1)
    cache.allocate(seq)
    assert len(set(seq.block_table)) == 2
    assert cache.num_free_blocks == 6
    cache.free(seq)
    cache.free(seq)
    assert seq.block_table == []
    assert cache.num_free_blocks == 8
    cache.check_integrity()


def test_what_does_not_fit_is_refused() -> None:
    cache = CacheManager(num_blocks=4, block_size=SIZE)
    assert not cache.can_allocate(sequence(4 * SIZE + 1))
    assert cache.can_allocate(sequence(4 * SIZE))
    cache.allocate(sequence(3 * SIZE))
    assert not cache.can_allocate(sequence(SIZE + 1))
    assert cache.can_allocate(sequence(SIZE))


def test_a_sequence_grows_by_a_block_when_its_last_one_is_full() -> None:
    cache = CacheManager(num_blocks=2, block_size=SIZE)
    seq = sequence(SIZE - 1)
    cache.allocate(seq)
    lengths = []
    for _ in range(SIZE + 1):
        seq.append(0)
        assert cache.can_append(seq)
        cache.append(seq)
        lengths.append(len(seq.block_table))
    assert lengths == [1, *[2] * SIZE]
    seq.append(0)
    assert not cache.can_append(seq)


def test_memory_that_has_been_used_is_used_again_first() -> None:
    cache = CacheManager(num_blocks=100, block_size=SIZE)
    used = set()
    for num_tokens in (3 * SIZE, 1, 5 * SIZE, 2 * SIZE):
        seq = sequence(num_tokens)
        cache.allocate(seq)
        used.update(seq.block_table)
        cache.free(seq)
    assert len(used) == 5


def test_a_lost_block_is_noticed() -> None:
    cache = CacheManager(num_blocks=2, block_size=SIZE)
    seq = sequence(1)
    cache.allocate(seq)
    cache.check_integrity()
    seq.block_table.clear()
    with pytest.raises(AssertionError):
        cache.check_integrity()


def test_any_order_of_operations_keeps_the_books() -> None:
    draw = random.Random(0)
    cache = CacheManager(num_blocks=12, block_size=SIZE)
    held: list[Sequence] = []
    for _ in range(2000):
        new = sequence(draw.randrange(1, 3 * SIZE))
        if draw.random() < 0.4 and cache.can_allocate(new):
            cache.allocate(new)
            held.append(new)
        elif held and draw.random() < 0.5:
            seq = draw.choice(held)
            seq.token_ids += [0] * draw.randrange(SIZE)
            if cache.can_append(seq):
                cache.append(seq)
                assert len(seq.block_table) * SIZE >= len(seq.token_ids)
        elif held:
            cache.free(held.pop(draw.randrange(len(held))))
        cache.check_integrity()
