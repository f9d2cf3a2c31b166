"""Which token comes next: logits of a batch and the wishes of its sequences in, one token per
sequence out.

What happens to a row depends on nothing but that row: the steps it goes through follow from its own
parameters, and its random numbers from its own generator, so a sequence gets the same tokens in
any company.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from modules.engine.logits_processors import (
    apply_count_penalties,
    apply_min_p,
    apply_repetition_penalty,
    apply_temperature,
    apply_top_k,
    apply_top_p,
)
from modules.engine.logprobs import compute_logprobs
from modules.engine.sampling_params import SamplingParams
from modules.engine.scheduler import SampledToken
from modules.engine.sequence import Sequence
from modules.engine.transfer import upload


def sample(logits: Tensor, seqs: list[Sequence]) -> list[SampledToken]:
    """One token for each of `seqs`; `logits` [num_seqs, vocab_size], float32.

    Raises FloatingPointError when the model has computed something that is no number.
    """
    penalized = _penalize(logits, seqs)
    token_ids = torch.empty(len(seqs), dtype=torch.long, device=logits.device)
    for select, choose in _CHOICES:
        rows = [row for row, seq in enumerate(seqs) if select(seq.params)]
        if len(rows) == len(seqs):
            token_ids = choose(penalized, seqs)
        elif rows:
            places = _column(logits, rows)
            token_ids[places] = choose(penalized[places], [seqs[row] for row in rows])
    return _fetch(logits, token_ids, seqs)


def _fetch(logits: Tensor, token_ids: Tensor, seqs: list[Sequence]) -> list[SampledToken]:
    """What there is to know on the host, in one copy: a card is waited for once."""
    columns = [logits.amax(-1), token_ids]
    # float64 holds every token id
    highest, ids = torch.stack([column.double() for column in columns]).tolist()
    if not all(map(math.isfinite, highest)):
        raise FloatingPointError("logits are not finite")
    tokens = [SampledToken(int(token_id)) for token_id in ids]
    asked = [row for row, seq in enumerate(seqs) if seq.params.num_logprobs is not None]
    if asked:
        found = compute_logprobs(
            logits[_column(logits, asked)],
            [tokens[row].token_id for row in asked],
            [seqs[row].params.num_logprobs or 0 for row in asked],
        )
        for row, logprobs in zip(asked, found, strict=True):
            tokens[row] = replace(tokens[row], logprobs=logprobs)
    return tokens


def _penalize(logits: Tensor, seqs: list[Sequence]) -> Tensor:
    return _penalize_counts(_penalize_repetition(logits, seqs), seqs)


def _penalize_repetition(logits: Tensor, seqs: list[Sequence]) -> Tensor:
    # a range of 0 is all: [-0:] is the whole list
    seen = [
        (row, set(seq.token_ids[-seq.params.repetition_penalty_range :]))
        for row, seq in enumerate(seqs)
        if seq.params.repetition_penalty != 1.0
    ]
    if not seen:
        return logits
    rows = _repeat(logits, [(row, len(ids)) for row, ids in seen])
    token_ids = _column(logits, [token_id for _, ids in seen for token_id in ids])
    penalty = _column(logits, [seq.params.repetition_penalty for seq in seqs])[rows]
    return apply_repetition_penalty(logits, rows, token_ids, penalty)


def _penalize_counts(logits: Tensor, seqs: list[Sequence]) -> Tensor:
    counted = [
        (row, seq.output_counts)
        for row, seq in enumerate(seqs)
        if seq.params.presence_penalty or seq.params.frequency_penalty
    ]
    counted = [(row, counts) for row, counts in counted if counts]
    if not counted:
        return logits
    rows = _repeat(logits, [(row, len(counts)) for row, counts in counted])
    return apply_count_penalties(
        logits,
        rows,
        _column(logits, [token_id for _, counts in counted for token_id in counts]),
        _column(logits, [count for _, counts in counted for count in counts.values()]),
        _column(logits, [seq.params.presence_penalty for seq in seqs])[rows],
        _column(logits, [seq.params.frequency_penalty for seq in seqs])[rows],
    )


def _repeat(logits: Tensor, rows: list[tuple[int, int]]) -> Tensor:
    """Row numbers, each as often as it says."""
    return _column(logits, [row for row, times in rows for _ in range(times)])


def _choose_greedy(logits: Tensor, seqs: list[Sequence]) -> Tensor:
    return logits.argmax(-1)


def _choose_sampled(logits: Tensor, seqs: list[Sequence]) -> Tensor:
    logits = apply_temperature(logits, _column(logits, [s.params.temperature for s in seqs]))
    return _draw(_filter_min_p(logits, seqs), seqs)


def _choose_sampled_sorted(logits: Tensor, seqs: list[Sequence]) -> Tensor:
    logits = apply_temperature(logits, _column(logits, [s.params.temperature for s in seqs]))
    logits, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    logits = apply_top_k(
        logits, _column(logits, [min(s.params.top_k, logits.shape[-1]) for s in seqs])
    )
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
    target = upload([[seq.uniform] for seq in seqs], logits.device, torch.float64) * total
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulated, target, right=True)[:, 0]
    return drawn.clamp_(max=logits.shape[-1] - 1)  # logits that are no numbers are found out later


def _column(logits: Tensor, values: list[int] | list[float]) -> Tensor:
    return upload(values, logits.device)


def _needs_sort(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0


_CHOICES: tuple[
    tuple[Callable[[SamplingParams], bool], Callable[[Tensor, list[Sequence]], Tensor]], ...
] = (
    (lambda p: p.is_greedy, _choose_greedy),
    (lambda p: not p.is_greedy and not _needs_sort(p), _choose_sampled),
    (lambda p: not p.is_greedy and _needs_sort(p), _choose_sampled_sorted),
)
