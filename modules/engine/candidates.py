"""Candidates: the tokens of a batch's rows that may still come next, on their way through the
sampler's steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modules.engine.logits_processors import (
    find_share,
    leave_out_below,
    sort_descending,
)


@dataclass(frozen=True, slots=True)
class Candidates:
    """Logits of tokens; what is left out has minus infinity.

    Either all tokens of the vocabulary, or the likeliest few, which are so few that every step
    after that costs next to nothing.
    """

    vocab_size: int
    logits: Tensor
    """[num_rows, num_candidates], float32."""
    token_ids: Tensor | None = None
    """[num_rows, num_candidates]; None: place i is token i."""
    descending: Tensor | None = None
    """The logits of each row sorted, once a step has needed that; for those that follow."""
    earlier_probs: Tensor | None = None
    """Probabilities as adaptive-p has found them."""

    def with_descending(self) -> tuple[Candidates, Tensor]:
        """The same, knowing its logits in descending order; and these."""
        if self.descending is not None:
            return self, self.descending
        descending = sort_descending(self.logits)
        return replace(self, descending=descending), descending

    def reshape(self, change: Callable[[Tensor], Tensor]) -> Candidates:
        """Change the logits by a function that looks at a row as a whole, in whatever order, and
        keeps larger ones larger."""
        descending = self.descending
        return replace(
            self,
            logits=change(self.logits),
            descending=None if descending is None else change(descending),
        )

    def cut(self, threshold: Tensor) -> Candidates:
        """Leave out what is below; `threshold` [num_rows, 1]."""
        return self.reshape(lambda logits: leave_out_below(logits, threshold))

    def rewrite(self, logits: Tensor) -> Candidates:
        """With other logits, in another order maybe."""
        return replace(self, logits=logits, descending=None)

    def remember_probs(self) -> Candidates:
        return replace(self, earlier_probs=self.logits.softmax(-1))

    def narrow(self, width: int) -> Candidates:
        """Only the `width` likeliest tokens, in descending order; all, if there are no more."""
        if width >= self.logits.shape[-1]:
            return self.with_descending()[0]
        logits, places = self.logits.topk(width)
        return replace(
            self,
            logits=logits,
            token_ids=self._gather(self.token_ids, places, places),
            descending=logits,
            earlier_probs=self._gather(self.earlier_probs, places, None),
        )

    def widen(self) -> Candidates:
        """All tokens of the vocabulary, those that are not there as left out."""
        if self.token_ids is None:
            return self
        return replace(
            self,
            logits=self._spread(self.logits, -torch.inf),
            token_ids=None,
            descending=None,
            earlier_probs=None
            if self.earlier_probs is None
            else self._spread(self.earlier_probs, 0.0),
        )

    def mark(self, rows: Tensor, token_ids: Tensor) -> Tensor:
        """Where these tokens are, bool, like `logits`. `rows`, `token_ids` [num_pairs]."""
        marks = rows.new_zeros((len(self.logits), self.vocab_size), dtype=torch.bool)
        marks[rows, token_ids] = True
        return marks if self.token_ids is None else marks.gather(-1, self.token_ids)

    def draw(self, uniforms: Tensor) -> Tensor:
        """Places of one candidate per row, [num_rows, 1], by the inverse of the cumulative
        distribution; `uniforms` [num_rows, 1], float64, in [0, 1)."""
        return find_share(self.logits.softmax(-1), uniforms)

    def find_ids(self, places: Tensor) -> Tensor:
        """Token ids of candidates, [num_rows, 1]."""
        return places if self.token_ids is None else self.token_ids.gather(-1, places)

    @staticmethod
    def _gather(values: Tensor | None, places: Tensor, otherwise: Tensor | None) -> Tensor | None:
        return otherwise if values is None else values.gather(-1, places)

    def _spread(self, values: Tensor, rest: float) -> Tensor:
        assert self.token_ids is not None
        full = values.new_full((len(values), self.vocab_size), rest)
        return full.scatter(-1, self.token_ids, values)
