"""Plan: which steps of the sampler a sequence goes through, settled once, when it begins.

Rows with the same plan go through it together. What is neutral is in no plan, so it costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from modules.engine.sampling_params import SamplerStep, SamplingParams

# A row with `top_k` keeps so many candidates, or the next power of two that is enough.
MIN_WIDTH = 64

IS_ACTIVE: Mapping[SamplerStep, Callable[[SamplingParams], bool]] = {
    SamplerStep.REPETITION_PENALTY: lambda p: p.repetition_penalty != 1,
    SamplerStep.PRESENCE_PENALTY: lambda p: p.presence_penalty != 0,
    SamplerStep.FREQUENCY_PENALTY: lambda p: p.frequency_penalty != 0,
    SamplerStep.DRY: lambda p: p.dry_multiplier > 0,
    SamplerStep.TOP_N_SIGMA: lambda p: p.top_n_sigma > 0,
    SamplerStep.TEMPERATURE: lambda p: p.temperature != 1 and p.dynamic_temperature is None,
    SamplerStep.DYNAMIC_TEMPERATURE: lambda p: p.dynamic_temperature is not None,
    SamplerStep.QUADRATIC_SAMPLING: lambda p: p.smoothing_factor > 0,
    SamplerStep.TOP_K: lambda p: p.top_k > 0,
    SamplerStep.TOP_P: lambda p: p.top_p < 1,
    SamplerStep.TYPICAL_P: lambda p: p.typical_p < 1,
    SamplerStep.EPSILON_CUTOFF: lambda p: p.epsilon_cutoff > 0,
    SamplerStep.ETA_CUTOFF: lambda p: p.eta_cutoff > 0,
    SamplerStep.TFS: lambda p: p.tfs < 1,
    SamplerStep.TOP_A: lambda p: p.top_a > 0,
    SamplerStep.MIN_P: lambda p: p.min_p > 0,
    SamplerStep.ADAPTIVE_P: lambda p: p.adaptive_target is not None,
    SamplerStep.MIROSTAT: lambda p: p.mirostat_mode > 0,
    SamplerStep.XTC: lambda p: p.xtc_probability > 0,
    SamplerStep.ENCODER_REPETITION_PENALTY: lambda p: p.encoder_repetition_penalty != 1,
    SamplerStep.NO_REPEAT_NGRAM: lambda p: p.no_repeat_ngram_size > 0,
}

HISTORY_STEPS = frozenset(
    {SamplerStep.REPETITION_PENALTY, SamplerStep.DRY, SamplerStep.NO_REPEAT_NGRAM}
)
COUNT_STEPS = frozenset({SamplerStep.PRESENCE_PENALTY, SamplerStep.FREQUENCY_PENALTY})
# They look at single tokens, so they may say which one is the likeliest.
TOKEN_STEPS = HISTORY_STEPS | COUNT_STEPS | {SamplerStep.ENCODER_REPETITION_PENALTY}


@dataclass(frozen=True, slots=True)
class Plan:
    is_greedy: bool
    steps: tuple[SamplerStep, ...]
    width: int
    """How many candidates `top_k` leaves; the likeliest `top_k` of them are kept."""
    mirostat_mode: int

    @property
    def needs_history(self) -> bool:
        return not HISTORY_STEPS.isdisjoint(self.steps)

    @property
    def edits_tokens(self) -> bool:
        """Whether a step looks at single tokens."""
        return not TOKEN_STEPS.isdisjoint(self.steps)

    @property
    def num_uniforms(self) -> int:
        """Random numbers that a token takes."""
        return 0 if self.is_greedy else 1 + (SamplerStep.XTC in self.steps)

    @property
    def needs_counts(self) -> bool:
        return not COUNT_STEPS.isdisjoint(self.steps)


def plan(params: SamplingParams) -> Plan:
    active = [step for step in params.sampler_order if IS_ACTIVE[step](params)]
    if params.is_greedy:
        active = [step for step in active if step in TOKEN_STEPS]
    # It bans: after what leaves tokens out, there might be none left.
    active.sort(key=lambda step: step is not SamplerStep.NO_REPEAT_NGRAM)
    return Plan(
        is_greedy=params.is_greedy,
        steps=tuple(_narrow_early(active)),
        width=max(MIN_WIDTH, 1 << (params.top_k - 1).bit_length()) if params.top_k > 0 else 0,
        mirostat_mode=0 if params.is_greedy else params.mirostat_mode,
    )


def _narrow_early(steps: list[SamplerStep]) -> list[SamplerStep]:
    """The `top_k` likeliest tokens are the same ones at any temperature, and fewer to be scaled."""
    early = list(steps)
    for i, pair in enumerate(pairwise(steps)):
        if pair == (SamplerStep.TEMPERATURE, SamplerStep.TOP_K):
            early[i : i + 2] = reversed(pair)
    return early


@dataclass(frozen=True, slots=True)
class SamplerState:
    """What two of the steps learn from the tokens that were sampled."""

    mirostat_mu: float
    """Bits of surprise that the next token may have."""
    adaptive_sum: float
    """Probabilities of the tokens so far, each weighted by its age."""
    adaptive_weight: float
    """The sum of those weights."""


def start_state(params: SamplingParams) -> SamplerState:
    weight = 1 / (1 - params.adaptive_decay)
    return SamplerState(2 * params.mirostat_tau, (params.adaptive_target or 0) * weight, weight)


def find_adaptive_target(params: SamplingParams, state: SamplerState) -> float:
    """What keeps the average at the target, whatever it is now; in [0, 1]."""
    average = state.adaptive_sum / state.adaptive_weight
    return min(max(2 * (params.adaptive_target or 0) - average, 0), 1)


def learn(
    params: SamplingParams, state: SamplerState, prob: float, earlier_prob: float
) -> SamplerState:
    """The state after a token that had `prob` in the end, and `earlier_prob` before adaptive-p.

    The surprise that mirostat looks at is that of the distribution the token was drawn from.
    """
    mu, total, weight = state.mirostat_mu, state.adaptive_sum, state.adaptive_weight
    if params.mirostat_mode:
        mu += params.mirostat_eta * (params.mirostat_tau + math.log2(prob))
    if params.adaptive_target is not None:
        total = params.adaptive_decay * total + earlier_prob
        weight = params.adaptive_decay * weight + 1
    return SamplerState(mu, total, weight)
