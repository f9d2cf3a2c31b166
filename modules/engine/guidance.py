"""Classifier-free guidance: away from what would follow a negative prompt.

Sanchez et al. 2023, "Stay on topic with Classifier-Free Guidance". A sequence that is guided has a
companion, which reads the negative prompt and then the same tokens; of the two rows of logits of a
step one is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modules.engine.scheduler import ScheduledSequence
from modules.engine.transfer import upload


def guide(logits: Tensor, items: tuple[ScheduledSequence, ...]) -> Tensor:
    """`logits` [num_rows, vocab_size] of `items` without the rows of companions, which come right
    after those of the sequences that they go with.
    """
    kept: list[int] = []
    guided: list[tuple[int, float]] = []  # places among the kept rows
    num_rows = 0
    for item in items:
        if item.seq.primary is None:
            kept += range(num_rows, num_rows + 1 + len(item.draft))
        else:
            guided.append((len(kept) - 1, item.seq.primary.params.guidance_scale))
        num_rows += 1 + len(item.draft)
    if not guided:
        return logits
    places = upload([place for place, _ in guided], logits.device)
    scales = upload([scale for _, scale in guided], logits.device)
    rows = upload(kept, logits.device)
    combined = logits[rows]
    combined[places] = apply_guidance(logits[rows[places]], logits[rows[places] + 1], scales)
    return combined


def apply_guidance(logits: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
    """Log-probabilities, as many times further from the negative ones as `scale` [num_rows] says;
    both [num_rows, vocab_size]. What the model itself rules out stays ruled out.
    """
    origin = negative.log_softmax(-1)
    guided = origin + scale[:, None] * (logits.log_softmax(-1) - origin)
    return guided.masked_fill(logits.isneginf() | negative.isneginf(), -torch.inf)
