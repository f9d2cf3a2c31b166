"""TokenRules: what a sequence asks of single tokens before any step of the sampler, as arrays that
are made once and only looked at afterwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modules.engine.sampling_params import SamplingParams
from modules.engine.token_history import Ids


@dataclass(frozen=True, slots=True)
class Biases:
    token_ids: Ids
    """Each once."""
    amounts: NDArray[np.float32]
    """Added to their logits; minus infinity bans."""


@dataclass(frozen=True, slots=True)
class TokenRules:
    """None: no such wish."""

    biases: Biases | None
    early_biases: Biases | None
    """In their place before `min_tokens` are generated."""
    allowed: Ids | None
    first_allowed: Ids | None
    """In their place for the first token."""
    min_tokens: int

    def find_biases(self, num_output_tokens: int) -> Biases | None:
        return self.early_biases if num_output_tokens < self.min_tokens else self.biases

    def find_allowed(self, num_output_tokens: int) -> Ids | None:
        return self.allowed if num_output_tokens else self.first_allowed


def to_token_rules(params: SamplingParams, eos_token_ids: frozenset[int]) -> TokenRules:
    always = dict(params.logit_bias)
    if params.ban_eos:
        always |= dict.fromkeys(eos_token_ids, -math.inf)
    ends = (*eos_token_ids, *params.stop_token_ids)
    allowed, first = params.allowed_token_ids, params.first_token_ids
    if first is not None and allowed is not None:
        first = tuple(set(first).intersection(allowed))
    return TokenRules(
        biases=_to_biases(always),
        early_biases=_to_biases(always | dict.fromkeys(ends, -math.inf)),
        allowed=_to_ids(allowed),
        first_allowed=_to_ids(allowed if first is None else first),
        min_tokens=params.min_tokens,
    )


def _to_biases(amounts: dict[int, float]) -> Biases | None:
    if not amounts:
        return None
    return Biases(np.array([*amounts], np.int64), np.array([*amounts.values()], np.float32))


def _to_ids(token_ids: tuple[int, ...] | None) -> Ids | None:
    return None if token_ids is None else np.array(token_ids, np.int64)
