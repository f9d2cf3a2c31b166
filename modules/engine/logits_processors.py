"""Pure functions on batched logits, [num_seqs, vocab_size], float32. What no sequence asks for is
not called.

Each takes one value per row; a row's neutral value leaves the row as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def apply_repetition_penalty(
    logits: Tensor, rows: Tensor, token_ids: Tensor, penalty: Tensor
) -> Tensor:
    """Divide the logit of a token that was seen, multiply a negative one (Keskar et al. 2019).

    `rows`, `token_ids` [num_pairs]: each (row, token) once; `penalty` [num_pairs], 1 is neutral.
    """
    seen = logits[rows, token_ids]
    seen = torch.where(seen > 0, seen / penalty, seen * penalty)
    return logits.index_put((rows, token_ids), seen)


def apply_count_penalties(
    logits: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    counts: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    """Subtract `presence` + `frequency` × count from tokens that were generated (OpenAI's API).

    All [num_pairs], each (row, token) once; 0 is neutral.
    """
    return logits.index_put((rows, token_ids), -presence - frequency * counts, accumulate=True)


def apply_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """Divide by `temperature` > 0, [num_seqs]. The largest logit becomes 0: nothing overflows."""
    return (logits - logits.amax(-1, keepdim=True)) / temperature[:, None]


def apply_top_k(sorted_logits: Tensor, top_k: Tensor) -> Tensor:
    """Keep the `top_k` first of logits in descending order; 0 keeps all (Fan et al. 2018)."""
    rank = torch.arange(sorted_logits.shape[-1], device=sorted_logits.device)
    cut = (rank >= top_k[:, None]) & (top_k > 0)[:, None]
    return sorted_logits.masked_fill(cut, -torch.inf)


def apply_top_p(sorted_logits: Tensor, top_p: Tensor) -> Tensor:
    """Keep the smallest head whose probability reaches `top_p`, at least one token (Holtzman et
    al. 2020).

    `sorted_logits` in descending order.
    """
    probs = sorted_logits.softmax(-1)
    mass_before = probs.cumsum(-1) - probs
    cut = (mass_before >= top_p[:, None]) & (top_p < 1)[:, None]
    cut[:, 0] = False
    return sorted_logits.masked_fill(cut, -torch.inf)


def apply_min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """Drop what is less probable than `min_p` times the likeliest token (Nguyen et al. 2024)."""
    relative = logits - logits.amax(-1, keepdim=True)
    return logits.masked_fill(relative < min_p.log()[:, None], -torch.inf)
