"""Log-probabilities of tokens and of their likeliest alternatives."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modules.engine.outputs import TopLogprobs
from modules.engine.transfer import upload


@dataclass(frozen=True, slots=True)
class Logprobs:
    logprob: float
    """Natural logarithm."""
    top: TopLogprobs = ()
    hidden_state: NDArray[np.float32] | None = field(default=None, compare=False)
    """What the model's head made this of, when asked for: [hidden_size]."""


def compute_logprobs(logits: Tensor, token_ids: list[int], num_tops: list[int]) -> list[Logprobs]:
    """For each row of `logits` [num_rows, vocab_size] the log-probability of its token, and so many
    of the likeliest ones. Minus infinity for what is impossible.

    Raises FloatingPointError when a row has no probabilities, since it holds what is no number.
    """
    logprobs = logits.log_softmax(-1)
    ids = upload([[token_id] for token_id in token_ids], logits.device, torch.long)
    chosen = logprobs.gather(-1, ids)
    num_most = min(max(num_tops), logits.shape[-1])
    top, top_ids = logprobs.topk(num_most)
    # In one copy, as a card is waited for; float64 holds every token id.
    rows = torch.cat([chosen.double(), top.double(), top_ids.double()], dim=-1).tolist()
    if any(math.isnan(row[0]) for row in rows):
        raise FloatingPointError("logits are not finite")
    return [
        Logprobs(
            row[0], tuple(zip(map(int, row[1 + num_most :][:num]), row[1:][:num], strict=True))
        )
        for row, num in zip(rows, num_tops, strict=True)
    ]
