"""CacheManager: who may keep keys and values where. Accounts in integers; holds no tensor.

Memory is cut into blocks of as many tokens each. A sequence holds a table of the blocks that its
tokens lie in, in order; a new block is the one that was given back last, so that resident memory
follows the tokens that are alive.
"""

from __future__ import annotations

from collections import Counter

from modules.engine.sequence import Sequence

BLOCK_SIZE = 64
"""Tokens per block, unless an engine is told otherwise."""


class CacheManager:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_references = [0] * num_blocks
        self._holders: set[Sequence] = set()

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def can_allocate(self, seq: Sequence) -> bool:
        """Whether there is room for all tokens of `seq`, which holds nothing yet."""
        return self.can_append(seq)

    def allocate(self, seq: Sequence) -> None:
        """Give `seq` room for its tokens; `can_allocate` must hold."""
        self._holders.add(seq)
        self.append(seq)

    def can_append(self, seq: Sequence) -> bool:
        return self._num_missing_blocks(seq) <= self.num_free_blocks

    def append(self, seq: Sequence) -> None:
        """Make room for all tokens of `seq`; `can_append` must hold."""
        for _ in range(self._num_missing_blocks(seq)):
            block = self._free.pop()
            self._num_references[block] = 1
            seq.block_table.append(block)

    def free(self, seq: Sequence) -> None:
        """Take the blocks back; without one, nothing happens."""
        self._holders.discard(seq)
        while seq.block_table:
            block = seq.block_table.pop()
            self._num_references[block] -= 1
            if self._num_references[block] == 0:
                self._free.append(block)

    def check_integrity(self) -> None:
        """Raises AssertionError unless every block is either free or held, as often as it says."""
        held = Counter(block for seq in self._holders for block in seq.block_table)
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        assert not held.keys() & set(self._free), "a block is free and held"
        assert len(held) + len(self._free) == self.num_blocks, "a block is lost"
        assert all(held[b] == count for b, count in enumerate(self._num_references)), (
            "a block is counted wrong"
        )

    def _num_missing_blocks(self, seq: Sequence) -> int:
        num_needed = -(-len(seq.token_ids) // self.block_size)
        return max(0, num_needed - len(seq.block_table))
