"""Accounting of blocks, without a model."""

from __future__ import annotations

import random

import pytest

from modules.engine.cache_manager import CacheManager
from modules.engine.sequence import Sequence, SequenceRequest

SIZE = 4


def sequence(num_tokens: int, first: int = 0) -> Sequence:
    return of_tokens(*range(first, first + num_tokens))


def of_tokens(*token_ids: int) -> Sequence:
    return Sequence(SequenceRequest("x", token_ids), max_model_len=10_000)


def can_allocate(cache: CacheManager, seq: Sequence) -> bool:
    return cache.can_allocate(seq, cache.find_prefix(seq))


def allocate(cache: CacheManager, seq: Sequence) -> int:
    """The number of tokens that are there already."""
    assert can_allocate(cache, seq)
    return cache.allocate(seq, cache.find_prefix(seq))


def read(cache: CacheManager, seq: Sequence) -> None:
    """All that has been appended so far."""
    seq.num_computed_tokens = len(seq.token_ids)
    cache.record(seq)
    cache.check_integrity()


def leave(cache: CacheManager, *seqs: Sequence) -> None:
    """Each is read in turn, and ends."""
    for seq in seqs:
        allocate(cache, seq)
        read(cache, seq)
        cache.free(seq)
        cache.check_integrity()


def test_blocks_come_back() -> None:
    cache = CacheManager(num_blocks=8, block_size=SIZE)
    seq = sequence(SIZE + 1)
    allocate(cache, seq)
    assert len(set(seq.block_table)) == 2
    assert cache.num_free_blocks == 6
    cache.free(seq)
    cache.free(seq)
    assert seq.block_table == []
    assert cache.num_free_blocks == 8
    cache.check_integrity()


def test_what_does_not_fit_is_refused() -> None:
    cache = CacheManager(num_blocks=4, block_size=SIZE)
    assert not can_allocate(cache, sequence(4 * SIZE + 1))
    assert can_allocate(cache, sequence(4 * SIZE))
    allocate(cache, sequence(3 * SIZE))
    assert not can_allocate(cache, sequence(SIZE + 1))
    assert can_allocate(cache, sequence(SIZE))


def test_a_sequence_grows_by_a_block_when_its_last_one_is_full() -> None:
    cache = CacheManager(num_blocks=2, block_size=SIZE)
    seq = sequence(SIZE - 1)
    allocate(cache, seq)
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
        allocate(cache, seq)
        used.update(seq.block_table)
        cache.free(seq)
    assert len(used) == 5


def test_a_lost_block_is_noticed() -> None:
    cache = CacheManager(num_blocks=2, block_size=SIZE)
    seq = sequence(1)
    allocate(cache, seq)
    cache.check_integrity()
    seq.block_table.clear()
    with pytest.raises(AssertionError):
        cache.check_integrity()


def test_full_blocks_are_found_by_whoever_begins_like_them() -> None:
    cache = CacheManager(num_blocks=20, block_size=SIZE)
    first = sequence(3 * SIZE + 2)
    allocate(cache, first)
    read(cache, first)
    table = first.block_table[:]
    running = sequence(2 * SIZE + 1)
    assert allocate(cache, running) == 2 * SIZE
    assert running.block_table[:2] == table[:2] != running.block_table[1:3]
    cache.free(first)
    cache.check_integrity()
    later = sequence(5 * SIZE)
    assert allocate(cache, later) == 3 * SIZE, "also those that nobody holds any more"
    assert later.block_table[:3] == table[:3]
    cache.check_integrity()


def test_what_has_not_been_computed_is_not_found() -> None:
    cache = CacheManager(num_blocks=20, block_size=SIZE)
    seq = sequence(3 * SIZE)
    allocate(cache, seq)
    seq.num_computed_tokens = 2 * SIZE - 1
    cache.record(seq)
    assert cache.find_prefix(sequence(3 * SIZE)).blocks == tuple(seq.block_table[:1])


def test_at_least_the_last_token_is_left() -> None:
    cache = CacheManager(num_blocks=20, block_size=SIZE)
    leave(cache, sequence(3 * SIZE))
    assert allocate(cache, sequence(2 * SIZE)) == SIZE
    assert allocate(cache, sequence(2 * SIZE + 1)) == 2 * SIZE


def test_the_same_tokens_after_others_are_something_else() -> None:
    cache = CacheManager(num_blocks=20, block_size=SIZE)
    leave(cache, of_tokens(*[1] * SIZE, *[2] * SIZE, *[3] * SIZE))
    for token_ids in ([2] * SIZE, [3] * SIZE, [0] * SIZE + [2] * SIZE, [1] * (SIZE - 1)):
        assert allocate(cache, of_tokens(*token_ids, 9)) == 0
    assert allocate(cache, of_tokens(*[1] * SIZE, *[3] * SIZE, 9)) == SIZE


def test_output_is_found_as_prompts_are() -> None:
    cache = CacheManager(num_blocks=20, block_size=SIZE)
    seq = sequence(SIZE)
    allocate(cache, seq)
    for token_id in (7, 8, 9, 10):
        read(cache, seq)
        seq.append(token_id)
        cache.append(seq)
    read(cache, seq)
    cache.free(seq)
    assert allocate(cache, of_tokens(*seq.token_ids, 11)) == 2 * SIZE


def test_two_of_the_same_become_one() -> None:
    cache = CacheManager(num_blocks=20, block_size=SIZE)
    seqs = [sequence(2 * SIZE) for _ in range(3)]
    for seq in seqs:
        allocate(cache, seq)
    for seq in seqs:
        read(cache, seq)
    assert seqs[0].block_table == seqs[1].block_table == seqs[2].block_table
    assert cache.num_free_blocks == 18
    for seq in seqs:
        cache.free(seq)
        cache.check_integrity()
    assert cache.num_free_blocks == 20


def test_what_was_used_longest_ago_goes_first_and_from_its_end() -> None:
    cache = CacheManager(num_blocks=6, block_size=SIZE)
    old, new = sequence(2 * SIZE, first=100), sequence(2 * SIZE, first=200)
    leave(cache, old, new)
    allocate(cache, used := sequence(2 * SIZE + 1, first=100))
    cache.free(used)
    assert cache.num_retained_blocks == 4
    allocate(cache, sequence(3 * SIZE, first=300))  # two are free, so one must go
    cache.check_integrity()
    assert len(cache.find_prefix(sequence(9 * SIZE, first=200)).blocks) == 1
    assert len(cache.find_prefix(sequence(9 * SIZE, first=100)).blocks) == 2


def test_a_prefix_is_not_given_away_while_it_is_taken() -> None:
    cache = CacheManager(num_blocks=3, block_size=SIZE)
    leave(cache, sequence(2 * SIZE))
    assert can_allocate(cache, sequence(3 * SIZE))
    assert not can_allocate(cache, sequence(3 * SIZE + 1))
    assert allocate(cache, sequence(3 * SIZE)) == 2 * SIZE
    cache.check_integrity()


def test_what_is_retained_is_bounded() -> None:
    cache = CacheManager(num_blocks=100, block_size=SIZE, max_num_retained_blocks=5)
    seqs = [sequence(3 * SIZE, first=10 * number) for number in range(4)]
    leave(cache, *seqs)
    assert cache.num_retained_blocks == 5
    assert [len(cache.find_prefix(sequence(9 * SIZE, 10 * n)).blocks) for n in range(4)] == [
        *(0, 0, 2, 3)
    ]
    used: set[int] = set()
    for number in range(50):
        allocate(cache, seq := sequence(3 * SIZE, first=1000 * number))
        read(cache, seq)
        used.update(seq.block_table)
        cache.free(seq)
    assert len(used) <= 5 + 2 * 3, "memory that has never been used"


def test_any_order_of_operations_keeps_the_books() -> None:
    """With two tokens only, so that there is much to share."""
    draw = random.Random(0)
    cache = CacheManager(num_blocks=12, block_size=SIZE, max_num_retained_blocks=6)
    held: list[Sequence] = []
    num_reused = 0
    for _ in range(5000):
        if draw.random() < 0.4:
            new = of_tokens(*draw.choices((0, 1), (9, 1), k=draw.randrange(1, 4 * SIZE)))
            if can_allocate(cache, new):
                new.num_computed_tokens = allocate(cache, new)
                num_reused += new.num_computed_tokens
                assert new.num_uncomputed_tokens > 0
                held.append(new)
        elif held and draw.random() < 0.5:
            seq = draw.choice(held)
            seq.num_computed_tokens += draw.randint(0, seq.num_uncomputed_tokens)
            cache.record(seq)
            seq.token_ids += [0] * draw.randrange(SIZE)
            if cache.can_append(seq):
                cache.append(seq)
                assert len(seq.block_table) * SIZE >= len(seq.token_ids)
            else:
                cache.free(seq)
                held.remove(seq)
        elif held:
            cache.free(held.pop(draw.randrange(len(held))))
        cache.check_integrity()
    assert num_reused > 1000
