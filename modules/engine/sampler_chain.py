"""The sampler's steps, each as what it does to the candidates of rows that have it in common.

Here the parameters of sequences become columns of numbers; the arithmetic is in
logits_processors.py. The logits of all tokens are the chain's own, to be written into.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modules.engine.candidates import Candidates
from modules.engine.logits_processors import (
    add_to_tokens,
    apply_smoothing,
    apply_temperature,
    find_dynamic_temperature,
    find_epsilon_threshold,
    find_eta_threshold,
    find_min_p_threshold,
    find_mirostat_1_threshold,
    find_mirostat_2_threshold,
    find_tail_free_threshold,
    find_top_a_threshold,
    find_top_k_threshold,
    find_top_n_sigma_threshold,
    find_top_p_threshold,
    find_top_p_threshold_unsorted,
    leave_out_top_choices,
    leave_out_untypical,
    penalize_repetition,
    prefer_probability,
)
from modules.engine.sampler_plan import find_adaptive_target
from modules.engine.sampling_params import MIN_TEMPERATURE, SamplerStep, SamplingParams
from modules.engine.sequence import Sequence
from modules.engine.token_history import Ids, find_ngram_followers, find_repeats, find_window
from modules.engine.transfer import upload

Amounts = NDArray[np.floating[Any]]
Step = Callable[[Candidates, list[Sequence]], Candidates]

# Of DRY; far beyond any logit, and nothing overflows.
MAX_PENALTY = 1e6
# No vocabulary is larger, and it fits into every tensor.
MAX_TOP_K = 2**31


# On the tokens of a text


def _penalize_repetition(candidates: Candidates, seqs: list[Sequence]) -> Candidates:
    seen = [find_window(_history(s), s.params.repetition_penalty_range) for s in seqs]
    return _scale(candidates, seen, [seq.params.repetition_penalty for seq in seqs])


def _favour_prompt(candidates: Candidates, seqs: list[Sequence]) -> Candidates:
    prompts = [np.array(seq.token_ids[: seq.num_prompt_tokens]) for seq in seqs]
    return _scale(candidates, prompts, [1 / s.params.encoder_repetition_penalty for s in seqs])


def _penalize_presence(candidates: Candidates, seqs: list[Sequence]) -> Candidates:
    ids, _ = _counts(seqs)
    amounts = [
        np.full(len(found), -seq.params.presence_penalty)
        for found, seq in zip(ids, seqs, strict=True)
    ]
    return _add(candidates, ids, amounts)


def _penalize_frequency(candidates: Candidates, seqs: list[Sequence]) -> Candidates:
    ids, counts = _counts(seqs)
    amounts = [-s.params.frequency_penalty * c for s, c in zip(seqs, counts, strict=True)]
    return _add(candidates, ids, amounts)


def _penalize_repeats(candidates: Candidates, seqs: list[Sequence]) -> Candidates:
    found: list[Ids] = []
    amounts: list[Amounts] = []
    for seq in seqs:
        params = seq.params
        window = find_window(_history(seq), params.repetition_penalty_range)
        ids, lengths = find_repeats(window, params.dry_breaker_token_ids)
        is_long = lengths >= params.dry_allowed_length
        growth = params.dry_base ** (lengths[is_long] - float(params.dry_allowed_length))
        found.append(ids[is_long])
        amounts.append(-np.minimum(params.dry_multiplier * growth, MAX_PENALTY))
    return _add(candidates, found, amounts)


def _ban_repeated_ngrams(candidates: Candidates, seqs: list[Sequence]) -> Candidates:
    """Where all that is left would be banned, nothing is: some token has to come next."""
    found = [find_ngram_followers(_history(s), s.params.no_repeat_ngram_size) for s in seqs]
    wide = candidates.widen()
    is_banned = wide.mark(*join(found, wide.logits.device))
    banned = wide.logits.masked_fill(is_banned, -torch.inf)
    is_empty = banned.amax(-1, keepdim=True) == -torch.inf
    return wide.rewrite(torch.where(is_empty, wide.logits, banned))


def _history(seq: Sequence) -> Ids:
    assert seq.history is not None
    return seq.history.values


def _counts(seqs: list[Sequence]) -> tuple[list[Ids], list[Ids]]:
    counts = [seq.output_counts for seq in seqs if seq.output_counts is not None]
    return [each.ids for each in counts], [each.counts for each in counts]


def _scale(candidates: Candidates, ids: list[Ids], penalties: list[float]) -> Candidates:
    wide = candidates.widen()
    rows, token_ids = join(ids, wide.logits.device)
    penalty = upload(penalties, wide.logits.device)[rows]
    penalize_repetition(wide.logits, rows, token_ids, penalty)
    return wide.rewrite(wide.logits)


def _add(candidates: Candidates, ids: list[Ids], amounts: list[Amounts]) -> Candidates:
    wide = candidates.widen()
    rows, token_ids = join(ids, wide.logits.device)
    added = upload(np.concatenate(amounts), wide.logits.device, torch.float32)
    add_to_tokens(wide.logits, rows, token_ids, added)
    return wide.rewrite(wide.logits)


def join(ids: list[Ids], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each row's ids the pairs: row numbers and token ids, [num_pairs]."""
    rows = np.repeat(np.arange(len(ids)), [len(each) for each in ids])
    return upload(rows, device), upload(np.concatenate(ids), device, torch.long)


# On the shape of the distribution


def _scale_temperature(candidates: Candidates, seqs: list[Sequence]) -> Candidates:
    temperature = _column(candidates, seqs, lambda params: params.temperature)
    return candidates.reshape(lambda logits: apply_temperature(logits, temperature))


def _scale_dynamically(candidates: Candidates, seqs: list[Sequence]) -> Candidates:
    ranges = [seq.params.dynamic_temperature or (1.0, 1.0, 1.0) for seq in seqs]
    lowest, highest, exponent = upload(ranges, candidates.logits.device).split(1, dim=-1)
    temperature = find_dynamic_temperature(candidates.logits, lowest, highest, exponent)
    temperature = temperature.clamp(min=MIN_TEMPERATURE)
    return candidates.reshape(lambda logits: apply_temperature(logits, temperature))


def _smooth(candidates: Candidates, seqs: list[Sequence]) -> Candidates:
    factor = _column(candidates, seqs, lambda params: params.smoothing_factor)
    curve = _column(candidates, seqs, lambda params: params.smoothing_curve)
    if all(1 <= seq.params.smoothing_curve <= 3 for seq in seqs):
        return candidates.reshape(lambda logits: apply_smoothing(logits, factor, curve))
    return candidates.rewrite(apply_smoothing(candidates.logits, factor, curve))


def _prefer_target(candidates: Candidates, seqs: list[Sequence]) -> Candidates:
    targets = [[find_adaptive_target(seq.params, seq.sampler_state)] for seq in seqs]
    target = upload(targets, candidates.logits.device)
    return candidates.remember_probs().rewrite(prefer_probability(candidates.logits, target))


# On what is left


def _cut_top_k(candidates: Candidates, seqs: list[Sequence]) -> Candidates:
    narrow = candidates.narrow(seqs[0].plan.width)
    top_k = upload([[min(seq.params.top_k, MAX_TOP_K)] for seq in seqs], narrow.logits.device)
    return narrow.cut(find_top_k_threshold(narrow.sort(), top_k))


def _cut_top_p(candidates: Candidates, seqs: list[Sequence]) -> Candidates:
    top_p = _column(candidates, seqs, lambda params: params.top_p)
    if candidates.descending is None and candidates.logits.device.type == "cpu":
        return candidates.cut(find_top_p_threshold_unsorted(candidates.logits, top_p))
    # On a card sorting is cheap, and to look whether it is needed would mean to wait for it.
    candidates = candidates.sorted()
    return candidates.cut(find_top_p_threshold(candidates.sort(), top_p))


def _cut_mirostat(candidates: Candidates, seqs: list[Sequence]) -> Candidates:
    mu = upload([[seq.sampler_state.mirostat_mu] for seq in seqs], candidates.logits.device)
    if seqs[0].plan.mirostat_mode == 2:
        return candidates.cut(find_mirostat_2_threshold(candidates.logits, mu))
    candidates = candidates.sorted()
    return candidates.cut(find_mirostat_1_threshold(candidates.sort(), mu))


def _leave_out_untypical(candidates: Candidates, seqs: list[Sequence]) -> Candidates:
    typical_p = _column(candidates, seqs, lambda params: params.typical_p)
    return candidates.rewrite(leave_out_untypical(candidates.logits, typical_p))


def _leave_out_top_choices(candidates: Candidates, seqs: list[Sequence]) -> Candidates:
    thresholds = [[_choose_xtc_threshold(seq)] for seq in seqs]
    threshold = upload(thresholds, candidates.logits.device, torch.float32)
    protected = [np.array(seq.params.xtc_protected_token_ids, np.int64) for seq in seqs]
    is_protected = candidates.mark(*join(protected, candidates.logits.device))
    return candidates.rewrite(leave_out_top_choices(candidates.logits, threshold, is_protected))


def _choose_xtc_threshold(seq: Sequence) -> float:
    """Infinite where chance leaves the row alone."""
    happens = seq.uniform(1) < seq.params.xtc_probability
    return seq.params.xtc_threshold if happens else math.inf


def _make_cut(
    find: Callable[[Tensor, Tensor], Tensor], value: Callable[[SamplingParams], float]
) -> Step:
    """A filter whose threshold follows from a value and the logits in any order."""

    def cut(candidates: Candidates, seqs: list[Sequence]) -> Candidates:
        return candidates.cut(find(candidates.logits, _column(candidates, seqs, value)))

    return cut


def _make_sorted_cut(
    find: Callable[[Tensor, Tensor], Tensor], value: Callable[[SamplingParams], float]
) -> Step:
    """The same, of sorted logits."""

    def cut(candidates: Candidates, seqs: list[Sequence]) -> Candidates:
        candidates = candidates.sorted()
        return candidates.cut(find(candidates.sort(), _column(candidates, seqs, value)))

    return cut


def _column(
    candidates: Candidates, seqs: list[Sequence], value: Callable[[SamplingParams], float]
) -> Tensor:
    """[num_rows, 1], float32."""
    values = [[value(seq.params)] for seq in seqs]
    return upload(values, candidates.logits.device, torch.float32)


STEPS: Mapping[SamplerStep, Step] = {
    SamplerStep.REPETITION_PENALTY: _penalize_repetition,
    SamplerStep.PRESENCE_PENALTY: _penalize_presence,
    SamplerStep.FREQUENCY_PENALTY: _penalize_frequency,
    SamplerStep.DRY: _penalize_repeats,
    SamplerStep.TOP_N_SIGMA: _make_cut(find_top_n_sigma_threshold, lambda p: p.top_n_sigma),
    SamplerStep.TEMPERATURE: _scale_temperature,
    SamplerStep.DYNAMIC_TEMPERATURE: _scale_dynamically,
    SamplerStep.QUADRATIC_SAMPLING: _smooth,
    SamplerStep.TOP_K: _cut_top_k,
    SamplerStep.TOP_P: _cut_top_p,
    SamplerStep.TYPICAL_P: _leave_out_untypical,
    SamplerStep.EPSILON_CUTOFF: _make_cut(find_epsilon_threshold, lambda p: p.epsilon_cutoff),
    SamplerStep.ETA_CUTOFF: _make_cut(find_eta_threshold, lambda p: p.eta_cutoff),
    SamplerStep.TFS: _make_sorted_cut(find_tail_free_threshold, lambda p: p.tfs),
    SamplerStep.TOP_A: _make_cut(find_top_a_threshold, lambda p: p.top_a),
    SamplerStep.MIN_P: _make_cut(find_min_p_threshold, lambda p: p.min_p),
    SamplerStep.ADAPTIVE_P: _prefer_target,
    SamplerStep.MIROSTAT: _cut_mirostat,
    SamplerStep.XTC: _leave_out_top_choices,
    SamplerStep.ENCODER_REPETITION_PENALTY: _favour_prompt,
    SamplerStep.NO_REPEAT_NGRAM: _ban_repeated_ngrams,
}
