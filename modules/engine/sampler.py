"""Which token comes next: logits of a batch and the wishes of its sequences in, one token per
sequence out.

What happens to a row depends on nothing but that row: the steps it goes through follow from its own
parameters, and its random numbers from its own generator, so a sequence gets the same tokens in
any company.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from modules.engine.logits_processors import (
    apply_min_p,
    apply_penalties,
    apply_temperature,
    apply_top_k,
    apply_top_p,
)
from modules.engine.sampling_params import SamplingParams
from modules.engine.scheduler import SampledToken
from modules.engine.sequence import Sequence


def sample(logits: Tensor, seqs: list[Sequence]) -> list[SampledToken]:
    """One token for each of `seqs`; `logits` [num_seqs, vocab_size], float32."""
    penalized = _penalize(logits, seqs)
    token_ids = torch.empty(len(seqs), dtype=torch.long, device=logits.device)
    for select, choose in _CHOICES:
        rows = [row for row, seq in enumerate(seqs) if select(seq.params)]
        if rows:
            chosen = choose(penalized[rows], [seqs[row] for row in rows])
            token_ids[torch.tensor(rows, device=logits.device)] = chosen
    ids: list[int] = token_ids.tolist()
    logprobs = _logprobs(logits, token_ids, seqs)
    return [SampledToken(i, logprob) for i, logprob in zip(ids, logprobs, strict=True)]


def _penalize(logits: Tensor, seqs: list[Sequence]) -> Tensor:
    rows, token_ids, penalties, counts = [], [], [], []
    for row, seq in enumerate(seqs):
        params = seq.params
        ranged: set[int] = set()
        generated: Counter[int] = Counter()
        if params.repetition_penalty != 1.0:
            # range 0 is all: [-0:] is the whole list
            ranged = set(seq.token_ids[-params.repetition_penalty_range :])
        if params.presence_penalty or params.frequency_penalty:
            generated = Counter(seq.output_token_ids)
        for token_id in ranged | generated.keys():
            rows.append(row)
            token_ids.append(token_id)
            repetition = params.repetition_penalty if token_id in ranged else 1.0
            penalties.append((repetition, params.presence_penalty, params.frequency_penalty))
            counts.append(generated[token_id])
    if not rows:
        return logits
    device = logits.device
    return apply_penalties(
        logits,
        torch.tensor(rows, device=device),
        torch.tensor(token_ids, device=device),
        torch.tensor(penalties, device=device),
        torch.tensor(counts, device=device),
    )


def _choose_greedy(logits: Tensor, seqs: list[Sequence]) -> Tensor:
    return logits.argmax(-1)


def _choose_sampled(logits: Tensor, seqs: list[Sequence]) -> Tensor:
    logits = apply_temperature(logits, _column(logits, [s.params.temperature for s in seqs]))
    return _draw(_filter_min_p(logits, seqs), seqs)


def _choose_sampled_sorted(logits: Tensor, seqs: list[Sequence]) -> Tensor:
    logits = apply_temperature(logits, _column(logits, [s.params.temperature for s in seqs]))
    logits, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    logits = apply_top_k(logits, _column(logits, [s.params.top_k for s in seqs]))
    logits = apply_top_p(logits, _column(logits, [s.params.top_p for s in seqs]))
    ranks = _draw(_filter_min_p(logits, seqs), seqs)
    chosen: Tensor = order.gather(-1, ranks[:, None])[:, 0]
    return chosen


def _filter_min_p(logits: Tensor, seqs: list[Sequence]) -> Tensor:
    if not any(seq.params.min_p for seq in seqs):
        return logits
    return apply_min_p(logits, _column(logits, [seq.params.min_p for seq in seqs]))


def _draw(logits: Tensor, seqs: list[Sequence]) -> Tensor:
    """Inverse-CDF sampling with one uniform number per row, from the row's own generator.

    In float64, and looking for the first position whose cumulated probability is *above* the
    number: a token of probability 0 cannot be drawn.
    """
    cumulated = logits.double().softmax(-1).cumsum(-1)
    total = cumulated[:, -1:]
    uniform = torch.tensor([[seq.generator.random()] for seq in seqs], dtype=torch.float64)
    target = uniform.to(logits.device) * total
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, target, right=True)[:, 0]


def _logprobs(logits: Tensor, token_ids: Tensor, seqs: list[Sequence]) -> list[float | None]:
    if not any(seq.params.logprobs for seq in seqs):
        return [None] * len(seqs)
    chosen = logits.gather(-1, token_ids[:, None])[:, 0] - logits.logsumexp(-1)
    return [
        value if seq.params.logprobs else None
        for seq, value in zip(seqs, chosen.tolist(), strict=True)
    ]


def _column(logits: Tensor, values: list[float]) -> Tensor:
    return torch.tensor(values, device=logits.device)


def _needs_sort(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0


_CHOICES: tuple[
    tuple[Callable[[SamplingParams], bool], Callable[[Tensor, list[Sequence]], Tensor]], ...
] = (
    (lambda p: p.is_greedy, _choose_greedy),
    (lambda p: not p.is_greedy and not _needs_sort(p), _choose_sampled),
    (lambda p: not p.is_greedy and _needs_sort(p), _choose_sampled_sorted),
)
