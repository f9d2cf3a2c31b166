"""PromptLookup: guesses what a sequence says next, because it has said or been told it before.

The guess is what followed when its last few tokens came along the last time (Saxena 2023, "Prompt
Lookup Decoding"). Each sequence learns how far its guesses are to be trusted.
"""

from __future__ import annotations

# Of what has to come along again: the longer one is the better guess.
NGRAM_SIZES = (3, 2)
# In steps without a guess, after guesses that were wrong from their first token on.
FIRST_PAUSE, LONGEST_PAUSE = 4, 64


class PromptLookup:
    """For a list of tokens that only grows. What it costs per token does not grow with it."""

    def __init__(self, max_num_tokens: int) -> None:
        self._max_num_tokens = max_num_tokens
        self._num_tokens = 1
        self._pause = 0
        self._num_steps_left = 0  # of the pause
        self._ends: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def propose(self, token_ids: list[int], max_num_tokens: int) -> tuple[int, ...]:
        """What may follow; nothing where nothing came along before, or guesses are not worth it."""
        self._index(token_ids)
        if self._num_steps_left > 0:
            self._num_steps_left -= 1
            return ()
        number = min(self._num_tokens, self._max_num_tokens, max_num_tokens)
        for size in NGRAM_SIZES:
            end = self._ends.get(tuple(token_ids[-size:]))
            if end is not None:
                period = len(token_ids) - end  # what is shorter than the guess goes on repeating
                return tuple(token_ids[end + i % period] for i in range(number))
        return ()

    def learn(self, num_proposed: int, num_accepted: int) -> None:
        """How a guess turned out."""
        if num_accepted > 0:
            self._pause = 0
            is_right = num_accepted == num_proposed
            self._num_tokens = 2 * num_proposed if is_right else num_accepted + 1
        elif num_proposed > 1:
            self._num_tokens = 1
        else:
            self._pause = min(4 * self._pause or FIRST_PAUSE, LONGEST_PAUSE)
            self._num_steps_left = self._pause

    def _index(self, token_ids: list[int]) -> None:
        """All that ends before the last token, which is what will be looked for."""
        for end in range(max(self._num_indexed, 1), len(token_ids)):
            for size in NGRAM_SIZES:
                if end >= size:
                    self._ends[tuple(token_ids[end - size : end])] = end
        self._num_indexed = len(token_ids)
