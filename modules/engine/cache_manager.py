"""CacheManager: who may keep how many keys and values. Accounts in integers; holds no tensor.

Each running sequence owns one slot. A slot's capacity is a whole number of blocks; when it is full
it doubles, if memory is plenty: so memory follows the tokens that are alive, and the copies that
growth costs stay O(1) per token.
"""

from __future__ import annotations

from modules.engine.sequence import Sequence

BLOCK_SIZE = 128
"""Tokens per block."""


class CacheManager:
    def __init__(self, num_slots: int, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free_blocks = num_blocks
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._num_blocks_of: dict[int, int] = {}
        self._released: list[int] = []

    def can_allocate(self, seq: Sequence) -> bool:
        return bool(self._free_slots) and self._num_needed_blocks(seq) <= self.num_free_blocks

    def allocate(self, seq: Sequence) -> None:
        """Give `seq` a slot with room for its tokens; `can_allocate` must hold."""
        seq.slot = self._free_slots.pop()
        self._num_blocks_of[seq.slot] = 0
        self._grow(seq.slot, self._num_needed_blocks(seq))

    def can_append(self, seq: Sequence) -> bool:
        return self._num_missing_blocks(seq) <= self.num_free_blocks

    def append(self, seq: Sequence) -> None:
        """Make room for all tokens of `seq`; `can_append` must hold."""
        missing = self._num_missing_blocks(seq)
        if missing:
            assert seq.slot is not None
            # As much again, so that growing is rare; but not at the cost of those who come next.
            doubling = min(self._num_blocks_of[seq.slot], self.num_free_blocks // 4)
            self._grow(seq.slot, max(missing, doubling))

    def free(self, seq: Sequence) -> None:
        """Take the slot back; without one, nothing happens."""
        if seq.slot is None:
            return
        self.num_free_blocks += self._num_blocks_of.pop(seq.slot)
        self._free_slots.append(seq.slot)
        self._released.append(seq.slot)
        seq.slot = None

    def capacity(self, seq: Sequence) -> int:
        """Tokens that the slot of `seq` has room for."""
        assert seq.slot is not None
        return self._num_blocks_of[seq.slot] * BLOCK_SIZE

    def take_released(self) -> tuple[int, ...]:
        """Slots freed since the last call: whatever is stored for them can go."""
        released, self._released = tuple(self._released), []
        return released

    def check_integrity(self) -> None:
        """Raises AssertionError unless every slot and block is either free or owned, once."""
        owned = set(self._num_blocks_of)
        free = set(self._free_slots)
        assert len(free) == len(self._free_slots), "a slot is free twice"
        assert not owned & free, "a slot is free and owned"
        assert len(owned) + len(free) == self._num_slots, "a slot is lost"
        assert self.num_free_blocks + sum(self._num_blocks_of.values()) == self.num_blocks

    def _num_needed_blocks(self, seq: Sequence) -> int:
        return -(-len(seq.token_ids) // BLOCK_SIZE)

    def _num_missing_blocks(self, seq: Sequence) -> int:
        assert seq.slot is not None
        return max(0, self._num_needed_blocks(seq) - self._num_blocks_of[seq.slot])

    def _grow(self, slot: int, num_blocks: int) -> None:
        self._num_blocks_of[slot] += num_blocks
        self.num_free_blocks -= num_blocks
