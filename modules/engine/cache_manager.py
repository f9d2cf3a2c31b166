"""CacheManager: who may keep keys and values where. Accounts in integers; holds no tensor.

Memory is cut into blocks of as many tokens each. A sequence holds a table of the blocks that its
tokens lie in, in order. A block that is full and computed is known by its content, and whoever
begins with the same tokens, and has the same salt, holds it too; without a holder it is retained
until its memory is needed. Other blocks are free, and the one that was given back last is used
first, so that resident memory follows the tokens that are alive.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import count

from modules.engine.sequence import Sequence

BLOCK_SIZE = 64
"""Tokens per block, unless an engine is told otherwise."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a full block holds. Equal means equal: there is no hash that could be another's."""

    parent: int
    """The number that the content of the block before has been given; 0: there is none."""
    token_ids: tuple[int, ...]
    salt: Hashable = ()
    """The sequence's `cache_salt`."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """How much of a sequence is there already."""

    blocks: tuple[int, ...]
    missing: Content | None
    """What the next block would have to hold; None: no more of the sequence could be reused."""


class CacheManager:
    def __init__(
        self, num_blocks: int, block_size: int, max_num_retained_blocks: int | None = None
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._max_num_retained = (
            num_blocks if max_num_retained_blocks is None else max_num_retained_blocks
        )
        self._free = list(range(num_blocks - 1, -1, -1))
        self._retained: dict[int, None] = {}  # the one that was used longest ago is the first
        self._num_references = [0] * num_blocks
        self._num_recorded: dict[Sequence, int] = {}  # of each holder's blocks, from the first on
        self._blocks: dict[Content, int] = {}
        self._contents: dict[int, tuple[Content, int]] = {}  # by block; with the content's number
        self._numbers = count(1)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free) + len(self._retained)

    @property
    def num_retained_blocks(self) -> int:
        return len(self._retained)

    def find_prefix(self, seq: Sequence) -> Prefix:
        """The blocks that a waiting sequence can begin with. At least its last token is left, and
        all of them are where the prompt is to be scored: that takes what the model says after each.
        """
        blocks: list[int] = []
        num_reusable = (len(seq.token_ids) - 1) // self.block_size if seq.is_scored else 0
        for index in range(num_reusable):
            content = self._content(seq, index, blocks)
            block = self._blocks.get(content)
            if block is None:
                return Prefix(tuple(blocks), content)
            blocks.append(block)
        return Prefix(tuple(blocks), None)

    def can_allocate(self, seq: Sequence, prefix: Prefix) -> bool:
        """Whether there is room for all tokens of `seq`, which holds nothing yet."""
        num_reclaimed = sum(self._num_references[block] == 0 for block in prefix.blocks)
        num_new = self._num_needed_blocks(len(seq.token_ids)) - len(prefix.blocks)
        return num_new <= self.num_free_blocks - num_reclaimed

    def allocate(self, seq: Sequence, prefix: Prefix) -> int:
        """Give `seq` room for its tokens; `can_allocate` must hold.

        Returns the number of tokens that are there already, those of the prefix.
        """
        for block in prefix.blocks:
            self._hold(block)
            seq.block_table.append(block)
        self._num_recorded[seq] = len(prefix.blocks)
        self.append(seq)
        return len(prefix.blocks) * self.block_size

    def can_append(self, seq: Sequence, num_more: int = 0) -> bool:
        """Whether there is room for all tokens of `seq`, and for as many more."""
        return self._num_missing_blocks(seq, num_more) <= self.num_free_blocks

    def append(self, seq: Sequence, num_more: int = 0) -> None:
        """Make that room; `can_append` must hold."""
        for _ in range(self._num_missing_blocks(seq, num_more)):
            if not self._free:
                self._forget_oldest()
            block = self._free.pop()
            self._hold(block)
            seq.block_table.append(block)

    def record(self, seq: Sequence) -> None:
        """Let the blocks of `seq` that are full and computed be found by their content."""
        for index in range(self._num_recorded[seq], seq.num_computed_tokens // self.block_size):
            content, block = self._content(seq, index, seq.block_table), seq.block_table[index]
            known = self._blocks.get(content)
            if known is None:
                self._blocks[content] = block
                self._contents[block] = content, next(self._numbers)
            else:  # somebody else was faster: one of the two is enough
                self._hold(known)
                seq.block_table[index] = known
                self._release(block)
            self._num_recorded[seq] = index + 1

    def next_content(self, seq: Sequence) -> Content | None:
        """What `seq`, which is running, will have computed next; None: its tokens are not known."""
        index = self._num_recorded[seq]
        is_full = (index + 1) * self.block_size <= len(seq.token_ids)
        return self._content(seq, index, seq.block_table) if is_full else None

    def free(self, seq: Sequence) -> None:
        """Take the blocks back; without one, nothing happens."""
        self._num_recorded.pop(seq, None)
        while seq.block_table:  # the last one first: without those before, it is of no use
            self._release(seq.block_table.pop())

    def check_integrity(self) -> None:
        """Raises AssertionError unless every block is free, retained or held, as often as it
        says, and every content can be found from its first block on.
        """
        held = Counter(block for seq in self._num_recorded for block in seq.block_table)
        unheld = [*self._free, *self._retained]
        assert len(set(unheld)) == len(unheld), "a block is free twice"
        assert not held.keys() & set(unheld), "a block is free and held"
        assert len(held) + len(unheld) == self.num_blocks, "a block is lost"
        assert all(held[b] == number for b, number in enumerate(self._num_references)), (
            "a block is counted wrong"
        )
        assert len(self._retained) <= self._max_num_retained, "too much is retained"
        assert self._retained.keys() <= self._contents.keys(), "a block is retained for nothing"
        assert not self._contents.keys() & set(self._free), "a free block has content"
        found = {content: block for block, (content, _) in self._contents.items()}
        assert found == self._blocks, "a content is somewhere else"
        numbers = {0, *(number for _, number in self._contents.values())}
        assert all(content.parent in numbers for content in self._blocks), "a content is an orphan"

    def _content(self, seq: Sequence, index: int, blocks: list[int]) -> Content:
        """Of the block at `index`; the one before, which is recorded, is in `blocks`."""
        parent = self._contents[blocks[index - 1]][1] if index else 0
        start = index * self.block_size
        content = seq.read_content(start, start + self.block_size)
        return Content(parent, content, seq.cache_salt)

    def _hold(self, block: int) -> None:
        self._num_references[block] += 1
        self._retained.pop(block, None)

    def _release(self, block: int) -> None:
        self._num_references[block] -= 1
        if self._num_references[block] > 0:
            return
        if block in self._contents:
            self._retained[block] = None
        else:
            self._free.append(block)
        if len(self._retained) > self._max_num_retained:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        block = next(iter(self._retained))
        del self._retained[block]
        content, _ = self._contents.pop(block)
        del self._blocks[content]
        self._free.append(block)

    def _num_needed_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _num_missing_blocks(self, seq: Sequence, num_more: int) -> int:
        num_needed = self._num_needed_blocks(len(seq.token_ids) + num_more)
        return max(0, num_needed - len(seq.block_table))
