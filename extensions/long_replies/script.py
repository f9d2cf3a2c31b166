"""Keeps replies from being short: until they have so many tokens they cannot end, and line breaks
are unlikely.

A stop string or `max_tokens` of the request still ends a reply before that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from modules.extended_generation import ProcessorList

params: dict[str, Any] = {"activate": True, "min_length": 120}

# Subtracted from their logits: line breaks become about 150 times less likely.
LINE_BREAK_PENALTY = 5.0


def logits_processor_modifier(processor_list: ProcessorList, input_ids: Tensor) -> None:
    if not params["activate"]:
        return
    model = processor_list.model
    ends = model.eos_token_ids
    processor_list.append(
        LongReply(
            num_prompt_tokens=input_ids.shape[-1],
            end_token_ids=sorted(ends),
            line_break_token_ids=sorted(model.vocabulary.find_containing("\n") - ends),
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LongReply:
    """A logits processor of one reply."""

    num_prompt_tokens: int
    end_token_ids: list[int]
    line_break_token_ids: list[int]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[-1] - self.num_prompt_tokens < params["min_length"]:
            scores[:, self.end_token_ids] = -math.inf
            scores[:, self.line_break_token_ids] -= LINE_BREAK_PENALTY
        return scores
