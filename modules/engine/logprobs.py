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
    ids = upload(token_ids, logits.device, torch.long)
    num_most = min(max(num_tops), logits.shape[-1])
    most = logprobs.topk(num_most)
    # In one copy; float64 holds every token id.
    parts = (logprobs.gather(-1, ids[:, None]), most.values, most.indices)
    rows = torch.cat([part.double() for part in parts], dim=-1).tolist()
    if any(math.isnan(chosen) for chosen, *_ in rows):
        raise FloatingPointError("logits are not finite")
    return [
        Logprobs(chosen, tuple(zip(map(int, tops[num_most:]), tops[:num_most], strict=True))[:num])
        for (chosen, *tops), num in zip(rows, num_tops, strict=True)
    ]
