"""Draws against the distribution they should follow, steps in every order, and rows that must not
notice their company. The arithmetic of single steps is in test_logits_processors.py.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from modules.engine.sampler import sample
from modules.engine.sampler_plan import SamplerState, find_adaptive_target
from modules.engine.sampling_params import DEFAULT_SAMPLER_ORDER, SamplerStep, SamplingParams
from modules.engine.sequence import Sequence, SequenceRequest
from modules.errors import NoTokenLeftError


def random_logits(rows: int = 4, vocab: int = 50) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1)) * 3


def sequence(
    prompt: tuple[int, ...] = (1,),
    output: tuple[int, ...] = (),
    eos: frozenset[int] = frozenset(),
    **params: Any,
) -> Sequence:
    seq = Sequence(SequenceRequest("x", prompt, SamplingParams(**params)), 1000, eos)
    for token_id in output:
        seq.append(token_id)
    return seq


def find_distribution(logits: torch.Tensor, **wishes: Any) -> torch.Tensor:
    """What a token is drawn from: probabilities of one row."""
    vocab = logits.shape[-1]
    seq = sequence(num_logprobs=vocab, processed_logprobs=True, **wishes)
    (token,) = sample(logits, [seq])
    probs = torch.zeros(vocab)
    for token_id, logprob in token.logprobs.top:
        probs[token_id] = math.exp(logprob)
    return probs


def in_order(*steps: SamplerStep) -> tuple[SamplerStep, ...]:
    """These last; what is in no test comes before."""
    return (*(step for step in DEFAULT_SAMPLER_ORDER if step not in steps), *steps)


# Penalties


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    logits = torch.zeros(1, 5)
    logits[0, 4] = 0.1
    # 3 is in the prompt only; 4 was generated twice: 0.1 - 2 × 0.2 - 0.3
    seq = sequence((3, 3), (4, 4), temperature=0, presence_penalty=0.3, frequency_penalty=0.2)
    assert sample(logits, [seq])[0].token_id == 0
    mild = sequence((3, 3), (4,), temperature=0, frequency_penalty=0.05)
    assert sample(logits, [mild])[0].token_id == 4


def test_repetition_penalty_range_counts_the_prompt_too() -> None:
    logits = torch.tensor([[1.0, 0.9, 0.8]])
    prompt = (0, 1, 2, 2)
    for window, expected in ((0, 0), (3, 0), (2, 0)):
        seq = sequence(
            prompt, temperature=0, repetition_penalty=2.0, repetition_penalty_range=window
        )
        assert sample(logits, [seq])[0].token_id == expected
    near = sequence((1, 2, 0), temperature=0, repetition_penalty=2.0, repetition_penalty_range=1)
    assert sample(logits, [near])[0].token_id == 1, "only the last token, 0, is penalised"


def test_encoder_repetition_penalty_favours_the_prompt_alone() -> None:
    logits = torch.tensor([[1.0, 0.9, 0.8]])
    seq = sequence((1,), (2,), temperature=0, encoder_repetition_penalty=1.5)
    assert sample(logits, [seq])[0].token_id == 1


def test_dry_grows_with_the_length_of_the_repetition() -> None:
    logits = torch.zeros(1, 6)
    for repeated, expected in (((3,), 0.0), ((2, 3), 0.8), ((1, 2, 3), 0.8 * 1.75)):
        text = (1, 2, 3, 4, 5, *repeated)
        probs = find_distribution(logits, prompt=text, dry_multiplier=0.8)
        assert probs[0].log() - probs[4].log() == pytest.approx(expected, abs=1e-5)
    broken = find_distribution(
        logits, prompt=text, dry_multiplier=0.8, dry_breaker_token_ids=frozenset({2})
    )
    assert torch.allclose(broken, torch.full((6,), 1 / 6))


def test_ngrams_are_banned_before_anything_is_left_out() -> None:
    """In a loop, the likeliest token would be all that is left, and then nothing."""
    logits = torch.zeros(1, 9)
    logits[0, 7] = 12.0
    for wishes in ({"top_p": 0.9}, {"top_k": 1}, {"min_p": 0.5}):
        probs = find_distribution(logits, prompt=(5, 7, 5), no_repeat_ngram_size=2, **wishes)
        assert probs[7] == 0
        assert probs.sum() == pytest.approx(1)


def test_dry_looks_at_a_window_and_has_an_upper_limit() -> None:
    text = (1, 2, 3, 1, 2)
    near = find_distribution(
        torch.zeros(1, 5), prompt=text, dry_multiplier=0.8, repetition_penalty_range=3
    )
    assert torch.allclose(near, torch.full((5,), 0.2))
    wild = find_distribution(
        torch.zeros(1, 5), prompt=(1,) * 50 + (2,) + (1,) * 50, dry_multiplier=1e6, dry_base=1e6
    )
    assert wild.isfinite().all()
    assert wild[1] == 0
    only = {"dry_multiplier": 1e6, "dry_base": 1e6, "allowed_token_ids": (1,)}
    assert find_distribution(torch.zeros(1, 5), prompt=(1,) * 99, **only)[1] == 1, "it is no ban"


def test_no_ngram_is_repeated() -> None:
    probs = find_distribution(torch.zeros(1, 5), prompt=(1, 2, 3, 1, 2), no_repeat_ngram_size=3)
    assert [i for i in range(5) if not probs[i]] == [3]


# Single tokens


def test_bias_bans_and_forces() -> None:
    logits = random_logits(1)
    best = int(logits.argmax())
    banned = find_distribution(logits, logit_bias=((best, -math.inf), (7, 2.0)))
    plain = find_distribution(logits)
    assert banned[best] == 0
    ratio = (banned[7] / banned[8]) / (plain[7] / plain[8])
    assert ratio.log() == pytest.approx(2.0, abs=1e-4)
    only = find_distribution(logits, allowed_token_ids=(3, 9))
    assert set(only.nonzero()[:, 0].tolist()) == {3, 9}


def test_the_first_token_may_have_wishes_of_its_own() -> None:
    logits = random_logits(1)
    first = sequence(temperature=0, first_token_ids=(4, 5))
    assert sample(logits, [first])[0].token_id in (4, 5)
    first.append(4)
    assert sample(logits, [first])[0].token_id == int(logits.argmax())
    both = find_distribution(logits, first_token_ids=(4, 5), allowed_token_ids=(5, 6))
    assert set(both.nonzero()[:, 0].tolist()) == {5}


def test_nothing_ends_a_text_before_its_time() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    wishes = {"temperature": 0, "min_tokens": 2, "stop_token_ids": (2,), "eos": frozenset({1})}
    assert sample(logits, [sequence(output=(0,), **wishes)])[0].token_id == 3
    assert sample(logits, [sequence(output=(0, 0), **wishes)])[0].token_id == 1
    banned = sequence(output=(0,) * 9, temperature=0, ban_eos=True, eos=frozenset({1}))
    assert sample(logits, [banned])[0].token_id == 2


def test_what_ends_a_text_early_is_not_what_is_banned_for_good() -> None:
    logits = torch.zeros(1, 6)
    wishes = {"eos": frozenset({1}), "stop_token_ids": (2,), "logit_bias": ((3, -math.inf),)}

    def alive(**more: Any) -> set[int]:
        probs = find_distribution(logits, **wishes, **more)
        return set(probs.nonzero()[:, 0].tolist())

    assert alive() == {0, 1, 2, 4, 5}
    assert alive(min_tokens=1) == {0, 4, 5}
    assert alive(ban_eos=True) == {0, 2, 4, 5}


def test_where_no_token_is_left_nothing_is_made_up() -> None:
    logits = random_logits(1)
    for wishes in ({}, {"top_p": 0.5}, {"temperature": 0}):
        with pytest.raises(NoTokenLeftError):
            sample(
                logits, [sequence(allowed_token_ids=(3,), logit_bias=((3, -math.inf),), **wishes)]
            )


# Order


def test_the_default_order_is_that_of_transformers() -> None:
    logits = random_logits(1)
    seen = (3, 7, 9)
    theirs = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            TemperatureLogitsWarper(1.4),
            TopKLogitsWarper(30),
            TopPLogitsWarper(0.9),
            TypicalLogitsWarper(0.9),
            MinPLogitsWarper(0.01),
        ]
    )(torch.tensor([seen]), logits.clone())
    ours = find_distribution(
        logits,
        prompt=seen,
        repetition_penalty=1.3,
        temperature=1.4,
        top_k=30,
        top_p=0.9,
        typical_p=0.9,
        min_p=0.01,
    )
    torch.testing.assert_close(ours, theirs.softmax(-1)[0])


STEPS: dict[SamplerStep, tuple[dict[str, Any], Any]] = {
    SamplerStep.TEMPERATURE: ({"temperature": 2.0}, TemperatureLogitsWarper(2.0)),
    SamplerStep.TOP_K: ({"top_k": 12}, TopKLogitsWarper(12)),
    SamplerStep.TOP_P: ({"top_p": 0.8}, TopPLogitsWarper(0.8)),
    SamplerStep.TYPICAL_P: ({"typical_p": 0.7}, TypicalLogitsWarper(0.7)),
    SamplerStep.MIN_P: ({"min_p": 0.08}, MinPLogitsWarper(0.08)),
    SamplerStep.REPETITION_PENALTY: (
        {"repetition_penalty": 3.0},
        RepetitionPenaltyLogitsProcessor(3.0),
    ),
}


@pytest.mark.parametrize("seed", range(30))
def test_steps_are_taken_in_the_order_asked_for(seed) -> None:
    logits = random_logits(1)
    order = random.Random(seed).sample(sorted(STEPS), len(STEPS))
    seen = tuple(logits[0].topk(5).indices.tolist())
    theirs = logits.clone()
    wishes: dict[str, Any] = {}
    for step in order:
        theirs = STEPS[step][1](torch.tensor([seen]), theirs)
        wishes |= STEPS[step][0]
    # Of what a processor penalizes, what was left out stays left out.
    ours = find_distribution(logits, prompt=seen, sampler_order=in_order(*order), **wishes)
    torch.testing.assert_close(ours, theirs.softmax(-1)[0])


@pytest.mark.parametrize(
    ("later", "wishes"),
    [
        (SamplerStep.TOP_K, {"top_k": 6}),
        (SamplerStep.REPETITION_PENALTY, {"repetition_penalty": 1.5, "top_k": 20}),
    ],
)
def test_adaptive_p_learns_what_tokens_were_worth_before_it(later, wishes) -> None:
    logits = random_logits(1, 5000)
    order = in_order(SamplerStep.TOP_K, SamplerStep.ADAPTIVE_P, later)
    order = tuple(dict.fromkeys(reversed(order)))[::-1]  # of what is named twice, the last
    probs = logits.softmax(-1)[0]
    if later is not SamplerStep.TOP_K:
        probs = TopKLogitsWarper(20)(None, logits).softmax(-1)[0]
    seq = sequence((3, 7), seed=4, adaptive_target=0.2, sampler_order=order, **wishes)
    (token,) = sample(logits, [seq])
    before = seq.sampler_state.adaptive_sum
    expected = 0.9 * before + probs[token.token_id].item()
    assert token.sampler_state.adaptive_sum == pytest.approx(expected, rel=1e-5)


def test_steep_curves_may_change_the_order() -> None:
    """With a curve of 9 the cube wins far from the top: what is sorted before is not afterwards."""
    logits = random_logits(1, 200)
    first = in_order(SamplerStep.TFS, SamplerStep.QUADRATIC_SAMPLING, SamplerStep.TOP_P)
    wishes = {"tfs": 0.999, "smoothing_factor": 0.05, "smoothing_curve": 9.0, "top_p": 0.5}
    probs = find_distribution(logits, sampler_order=first, **wishes)
    full = find_distribution(logits, sampler_order=first, **{**wishes, "top_p": 1.0})
    theirs = TopPLogitsWarper(0.5)(None, full.log()[None]).softmax(-1)[0]
    torch.testing.assert_close(probs, theirs)


def test_order_matters() -> None:
    logits = random_logits(1)
    wishes = {"temperature": 3.0, "min_p": 0.1}
    late = find_distribution(
        logits, sampler_order=in_order(SamplerStep.MIN_P, SamplerStep.TEMPERATURE), **wishes
    )
    assert (late > 0).sum() < (find_distribution(logits, **wishes) > 0).sum()


# Draws

DRAWS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"top_k": 4},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"typical_p": 0.7},
    {"tfs": 0.7},
    {"top_a": 0.3},
    {"epsilon_cutoff": 0.05},
    {"eta_cutoff": 0.05},
    {"top_n_sigma": 1.0},
    {"smoothing_factor": 0.4, "smoothing_curve": 1.5},
    {"dynamic_temperature": (0.5, 2.0, 1.0)},
    {"mirostat_mode": 2, "mirostat_tau": 1.2},
    {"mirostat_mode": 1, "mirostat_tau": 1.2},
    {"adaptive_target": 0.2},
    {"xtc_threshold": 0.1, "xtc_probability": 1.0},
    {"logit_bias": ((3, 1.5),), "repetition_penalty": 1.5},
    {"temperature": 1.3, "top_k": 8, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("params", DRAWS, ids=str)
def test_draws_follow_the_filtered_distribution(params) -> None:
    logits = random_logits(1, 12) / 2
    count = 4000
    seqs = [sequence(seed=seed, **params) for seed in range(count)]
    drawn = Counter(token.token_id for token in sample(logits.expand(count, -1), seqs))
    assert_follows(drawn, find_distribution(logits, **params), count)


def assert_follows(drawn: Counter[int], expected: torch.Tensor, count: int) -> None:
    """Pearson's chi-square at a level of 1e-4, with a fixed seed per draw."""
    alive = expected.nonzero()[:, 0].tolist()
    assert set(drawn) <= set(alive)
    chi_square = sum(
        (drawn[i] - count * expected[i].item()) ** 2 / (count * expected[i].item()) for i in alive
    )
    degrees = max(len(alive) - 1, 1)
    # Wilson–Hilferty approximation of the 0.9999 quantile of the chi-square distribution
    limit = degrees * (1 - 2 / (9 * degrees) + 3.719 * math.sqrt(2 / (9 * degrees))) ** 3
    assert chi_square < limit


def test_xtc_happens_as_often_as_asked() -> None:
    logits = torch.tensor([[2.0, 1.9, 1.8, 0.0]])
    count = 4000
    wishes = {"xtc_threshold": 0.2, "xtc_probability": 0.3}
    seqs = [sequence(seed=seed, **wishes) for seed in range(count)]
    drawn = Counter(token.token_id for token in sample(logits.expand(count, -1), seqs))
    with_xtc = find_distribution(logits, xtc_threshold=0.2, xtc_probability=1.0)
    assert with_xtc[0] == 0
    assert_follows(drawn, 0.3 * with_xtc + 0.7 * logits.softmax(-1)[0], count)


def test_a_draw_never_leaves_the_kept_tokens() -> None:
    """Not even with the largest random number there is."""

    class Largest:
        def random(self) -> float:
            return 1 - 2**-53

    logits = torch.full((1, 1000), -torch.inf)
    logits[0, :3] = 0.0
    seq = sequence()
    seq.generator = Largest()
    assert sample(logits, [seq])[0].token_id == 2


def test_top_k_above_the_vocabulary() -> None:
    assert 0 <= sample(random_logits(1), [sequence(top_k=2**70)])[0].token_id < 50


def test_a_tiny_temperature_is_greedy() -> None:
    logits = random_logits(1)
    assert sample(logits, [sequence(temperature=1e-30)])[0].token_id == int(logits.argmax())


# What is learnt from token to token


def generate(logits: torch.Tensor, count: int, **wishes: Any) -> tuple[Sequence, list[float]]:
    """Tokens from always the same logits, and the probabilities that the model gave them."""
    seq = sequence(seed=1, **wishes)
    probs = logits.softmax(-1)[0]
    for _ in range(count):
        (token,) = sample(logits, [seq])
        seq.append(token.token_id, token.sampler_state)
    return seq, [probs[token_id].item() for token_id in seq.token_ids[1:]]


@pytest.mark.parametrize("mode", [1, 2])
@pytest.mark.parametrize("tau", [2.0, 3.0])
def test_mirostat_starts_at_twice_its_aim(mode, tau) -> None:
    assert sequence(mirostat_mode=mode, mirostat_tau=tau).sampler_state.mirostat_mu == 2 * tau


@pytest.mark.parametrize("mode", [1, 2])
@pytest.mark.parametrize("tau", [2.0, 3.0])
def test_mirostat_holds_the_surprise(mode, tau) -> None:
    logits = random_logits(1, 2000)
    seq = sequence(seed=3, mirostat_mode=mode, mirostat_tau=tau, mirostat_eta=0.2)
    surprises = []
    for _ in range(600):
        (token,) = sample(logits, [seq])
        mu = seq.sampler_state.mirostat_mu
        # mu' = mu - eta × (surprise - tau)
        surprises.append((mu - token.sampler_state.mirostat_mu) / 0.2 + tau)
        seq.append(token.token_id, token.sampler_state)
    assert sum(surprises[100:]) / 500 == pytest.approx(tau, abs=0.15)


def test_adaptive_p_holds_the_probability() -> None:
    logits = torch.tensor([[3.0, 2.6, 2.2, 1.8, 1.4, 1.0, 0.6, 0.2, -0.2, -0.6]])
    for target in (0.1, 0.25):
        _, probs = generate(logits, 500, adaptive_target=target)
        assert sum(probs) / len(probs) == pytest.approx(target, abs=0.03)


def test_adaptive_p_aims_between_0_and_1() -> None:
    params = SamplingParams(adaptive_target=0.9)
    low = SamplerState(0.0, adaptive_sum=0.0, adaptive_weight=5.0)
    high = SamplerState(0.0, adaptive_sum=5.0, adaptive_weight=5.0)
    assert find_adaptive_target(params, low) == 1
    assert find_adaptive_target(params, high) == pytest.approx(0.8)
    assert find_adaptive_target(SamplingParams(adaptive_target=0.1), high) == 0


def test_adaptive_p_averages_with_decay() -> None:
    seq, probs = generate(random_logits(1, 8), 30, adaptive_target=0.4, adaptive_decay=0.8)
    total, weight = 0.4 / (1 - 0.8), 1 / (1 - 0.8)
    for prob in probs:
        total, weight = 0.8 * total + prob, 0.8 * weight + 1
    assert seq.sampler_state.adaptive_sum == pytest.approx(total, rel=1e-5)
    assert seq.sampler_state.adaptive_weight == pytest.approx(weight)


# Company


def wish_at_random(generator: random.Random) -> dict[str, Any]:
    """Some parameters of all kinds, in some order."""
    everything: dict[str, Any] = {
        "temperature": generator.choice([0.0, 0.4, 0.7, 1.0, 1.6]),
        "dynamic_temperature": (0.4, 1.7, 0.8),
        "smoothing_factor": 0.3,
        "smoothing_curve": generator.choice([1.0, 2.0, 5.0]),
        "top_k": generator.choice([3, 40, 100, 2000]),
        "top_p": generator.uniform(0.3, 0.99),
        "min_p": generator.uniform(0.001, 0.1),
        "typical_p": generator.uniform(0.3, 0.99),
        "tfs": generator.uniform(0.5, 0.99),
        "top_a": 0.1,
        "epsilon_cutoff": 3e-4,
        "eta_cutoff": 3e-4,
        "top_n_sigma": 1.5,
        "xtc_probability": 0.5,
        "mirostat_mode": generator.choice([1, 2]),
        "adaptive_target": 0.3,
        "repetition_penalty": generator.uniform(0.8, 1.5),
        "repetition_penalty_range": generator.choice([0, 5, 1024]),
        "encoder_repetition_penalty": 1.1,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "no_repeat_ngram_size": generator.choice([2, 3]),
        "dry_multiplier": 0.8,
        "logit_bias": ((5, 3.0), (9, -math.inf)),
        "min_tokens": 30,
        "sampler_order": tuple(generator.sample(DEFAULT_SAMPLER_ORDER, len(DEFAULT_SAMPLER_ORDER))),
    }
    names = generator.sample(sorted(everything), generator.randrange(6))
    return {name: everything[name] for name in names}


@pytest.mark.parametrize("seed", range(8))
def test_each_row_gets_what_it_gets_alone(seed) -> None:
    """Thirty rows with thirty sets of wishes, over several steps, to the last bit."""
    generator = random.Random(seed)
    wishes = [wish_at_random(generator) for _ in range(30)]

    def build() -> list[Sequence]:
        return [
            sequence((4, 5, 6, 4, 5), seed=i, eos=frozenset({2}), num_logprobs=3, **wish)
            for i, wish in enumerate(wishes)
        ]

    together, alone = build(), build()
    for step in range(6):
        logits = torch.randn(30, 600, generator=torch.Generator().manual_seed(100 * seed + step))
        logits *= 2.5
        tokens = sample(logits, together)
        for row, (seq, token) in enumerate(zip(alone, tokens, strict=True)):
            (single,) = sample(logits[row : row + 1], [seq])
            assert single == token, wishes[row]
            seq.append(single.token_id, single.sampler_state)
            together[row].append(token.token_id, token.sampler_state)


def test_a_step_that_failed_has_taken_no_random_number() -> None:
    logits = random_logits(2).repeat(1, 20)
    wishes = [{"seed": 1}, {"seed": 2, "xtc_probability": 0.5}]
    expected = sample(logits, [sequence(**wish) for wish in wishes])
    seqs = [sequence(**wish) for wish in wishes]
    broken = logits.clone()
    broken[0, 0] = torch.nan
    with pytest.raises(FloatingPointError):
        sample(broken, seqs)
    assert sample(logits, seqs) == expected
    for seq, token in zip(seqs, expected, strict=True):
        seq.append(token.token_id)
    others = [seq.uniform() for seq in seqs]
    assert others != [sequence(seed=1).uniform(), sequence(seed=2).uniform()]


@pytest.mark.parametrize("step", [None, *SamplerStep])
def test_what_is_no_number_is_refused(step) -> None:
    logits = random_logits(2)
    logits[1, 7] = torch.nan
    wishes = {} if step is None else next(w for w in ACTIVE if w[0] is step)[1]
    with pytest.raises(FloatingPointError):
        sample(logits, [sequence(temperature=0), sequence((1, 7, 1, 7), (1, 7), **wishes)])


ACTIVE: list[tuple[SamplerStep, dict[str, Any]]] = [
    (SamplerStep.REPETITION_PENALTY, {"repetition_penalty": 1.2}),
    (SamplerStep.PRESENCE_PENALTY, {"presence_penalty": 0.5}),
    (SamplerStep.FREQUENCY_PENALTY, {"frequency_penalty": 0.5}),
    (SamplerStep.DRY, {"dry_multiplier": 0.8}),
    (SamplerStep.TOP_N_SIGMA, {"top_n_sigma": 1.0}),
    (SamplerStep.TEMPERATURE, {"temperature": 0.5}),
    (SamplerStep.DYNAMIC_TEMPERATURE, {"dynamic_temperature": (0.5, 1.5, 1.0)}),
    (SamplerStep.QUADRATIC_SAMPLING, {"smoothing_factor": 0.3}),
    (SamplerStep.TOP_K, {"top_k": 3}),
    (SamplerStep.TOP_P, {"top_p": 0.5}),
    (SamplerStep.TYPICAL_P, {"typical_p": 0.5}),
    (SamplerStep.EPSILON_CUTOFF, {"epsilon_cutoff": 0.01}),
    (SamplerStep.ETA_CUTOFF, {"eta_cutoff": 0.01}),
    (SamplerStep.TFS, {"tfs": 0.5}),
    (SamplerStep.TOP_A, {"top_a": 0.2}),
    (SamplerStep.MIN_P, {"min_p": 0.1}),
    (SamplerStep.ADAPTIVE_P, {"adaptive_target": 0.3}),
    (SamplerStep.MIROSTAT, {"mirostat_mode": 2}),
    (SamplerStep.XTC, {"xtc_probability": 1.0}),
    (SamplerStep.ENCODER_REPETITION_PENALTY, {"encoder_repetition_penalty": 1.2}),
    (SamplerStep.NO_REPEAT_NGRAM, {"no_repeat_ngram_size": 2}),
]


@pytest.mark.parametrize(("step", "wishes"), ACTIVE)
def test_a_neutral_value_is_in_no_plan(step, wishes) -> None:
    assert sequence(**wishes).plan.steps == (step,)
    assert sequence().plan.steps == ()


# Logprobs


def test_logprobs_are_those_of_the_model_and_only_where_asked() -> None:
    logits = random_logits(2)
    penalized = sequence(
        (1,), (5,), temperature=0, num_logprobs=2, presence_penalty=1.0, logit_bias=((3, 99.0),)
    )
    tokens = sample(logits, [penalized, sequence(temperature=0.0)])
    expected = logits.log_softmax(-1)[0]
    assert tokens[0].token_id == 3
    assert tokens[0].logprobs.logprob == pytest.approx(expected[3].item(), abs=1e-5)
    best = expected.topk(2)
    assert [token_id for token_id, _ in tokens[0].logprobs.top] == best.indices.tolist()
    assert [logprob for _, logprob in tokens[0].logprobs.top] == pytest.approx(best.values.tolist())
    assert tokens[1].logprobs is None


def test_processed_logprobs_are_those_of_the_draw() -> None:
    logits = random_logits(3)
    rows: list[dict[str, Any]] = [{"top_k": 3}, {"temperature": 0.5}, {"num_logprobs": None}]
    seqs = [
        sequence(**({"num_logprobs": 5, "processed_logprobs": True} | wishes)) for wishes in rows
    ]
    tokens = sample(logits, seqs)
    top = dict(tokens[0].logprobs.top)
    assert len(top) == 5
    assert sum(math.exp(logprob) > 0 for logprob in top.values()) == 3
    assert top[tokens[0].token_id] == tokens[0].logprobs.logprob
    expected = (logits[1] / 0.5).log_softmax(-1)[tokens[1].token_id].item()
    assert tokens[1].logprobs.logprob == pytest.approx(expected, abs=1e-5)
    assert tokens[2].logprobs is None


def test_a_draft_that_came_to_nothing_has_taken_no_random_number() -> None:
    """The step has failed after it: what is tried again draws the same."""
    logits = random_logits(40)
    wishes = {"seed": 5, "xtc_probability": 0.5, "temperature": 2.0}
    expected, drawn = sequence(**wishes), []
    for row in logits:
        (token,) = sample(row[None], [expected])
        expected.append(token.token_id, token.sampler_state)
        drawn.append(token.token_id)
    seq = sequence(**wishes)
    for _ in range(2):
        fork = seq.fork()
        for row in logits[:20]:
            (token,) = sample(row[None], [fork])
            fork.append(token.token_id, token.sampler_state)
        assert fork.token_ids[1:] == drawn[:20]
    for token_id in drawn[:20]:
        seq.append(token_id)
    for row in logits[20:]:
        (token,) = sample(row[None], [seq])
        seq.append(token.token_id, token.sampler_state)
    assert seq.token_ids[1:] == drawn


def test_of_rows_with_one_plan_each_gets_its_own_processed_logprobs() -> None:
    logits = random_logits(3)
    wishes: dict[str, Any] = {"temperature": 0.5, "processed_logprobs": True}
    seqs = [sequence(seed=i, num_logprobs=None if i == 1 else 2, **wishes) for i in range(3)]
    tokens = sample(logits, seqs)
    assert tokens[1].logprobs is None
    for row in (0, 2):
        best = (logits[row] / 0.5).log_softmax(-1).topk(2)
        assert [token_id for token_id, _ in tokens[row].logprobs.top] == best.indices.tolist()


def test_a_fork_has_a_history_of_its_own() -> None:
    logits = torch.zeros(1, 6)
    seq = sequence((1, 2, 3, 1), temperature=0, no_repeat_ngram_size=2)
    fork = seq.fork()
    fork.append(4)
    fork.append(1)
    assert sample(logits, [fork])[0].token_id not in (2, 4)
    assert 4 not in seq.history.values


def test_a_dynamic_temperature_of_0_is_the_best_token() -> None:
    probs = find_distribution(random_logits(1), dynamic_temperature=(0.0, 0.0, 1.0))
    assert probs.max() == pytest.approx(1)


def test_ties_beyond_top_k_share_their_fate() -> None:
    probs = find_distribution(torch.zeros(1, 50), top_k=3)
    assert torch.allclose(probs, torch.full((50,), 0.02))
