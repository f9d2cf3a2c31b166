"""Filters against transformers' own warpers, draws against the distribution they should follow."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from modules.engine.logits_processors import (
    apply_min_p,
    apply_repetition_penalty,
    apply_temperature,
    apply_top_k,
    apply_top_p,
)
from modules.engine.sampler import sample
from modules.engine.sampling_params import SamplingParams
from modules.engine.sequence import Sequence, SequenceRequest


def random_logits(rows: int = 4, vocab: int = 50) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1)) * 3


def sequence(prompt: tuple[int, ...] = (1,), output: tuple[int, ...] = (), **params) -> Sequence:
    seq = Sequence(SequenceRequest("x", prompt, SamplingParams(**params)), 1000)
    for token_id in output:
        seq.append(token_id)
    return seq


def on_sorted(apply, logits: torch.Tensor, values: list[float]) -> torch.Tensor:
    """`apply` works on sorted logits; the result in vocabulary order again."""
    ordered, order = logits.sort(-1, descending=True)
    kept = apply(ordered, torch.tensor(values))
    return torch.empty_like(logits).scatter(-1, order, kept)


@pytest.mark.parametrize(
    ("apply", "warper", "values"),
    [
        (apply_top_k, TopKLogitsWarper, [1, 7, 49, 50]),
        (apply_top_p, TopPLogitsWarper, [0.01, 0.3, 0.9, 0.999]),
    ],
)
def test_sorted_filters_equal_transformers(apply, warper, values) -> None:
    logits = random_logits()
    ours = on_sorted(apply, logits, values)
    for row, value in enumerate(values):
        assert torch.equal(ours[row], warper(value)(None, logits[row : row + 1].clone())[0])


def test_min_p_equals_transformers() -> None:
    logits = random_logits()
    values = [0.001, 0.05, 0.5, 1.0]
    ours = apply_min_p(logits, torch.tensor(values))
    for row, value in enumerate(values):
        assert torch.equal(ours[row], MinPLogitsWarper(value)(None, logits[row : row + 1])[0])


def test_neutral_values_leave_a_row_alone_beside_active_ones() -> None:
    logits = random_logits(2)
    assert torch.equal(on_sorted(apply_top_k, logits, [0, 3])[0], logits[0])
    assert torch.equal(on_sorted(apply_top_p, logits, [1.0, 0.3])[0], logits[0])
    assert torch.equal(apply_min_p(logits, torch.tensor([0.0, 0.3]))[0], logits[0])


def test_top_p_zero_keeps_the_best_token() -> None:
    kept = on_sorted(apply_top_p, random_logits(1), [0.0])
    assert kept.isfinite().sum() == 1


def test_repetition_penalty_equals_transformers() -> None:
    logits = random_logits(1)
    seen = torch.tensor([[3, 9, 9, 20]])
    expected = RepetitionPenaltyLogitsProcessor(1.3)(seen, logits.clone())
    rows = torch.zeros(3, dtype=torch.long)
    ours = apply_repetition_penalty(logits, rows, seen.unique(), torch.tensor([1.3] * 3))
    assert torch.allclose(ours, expected)


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    logits = torch.zeros(1, 5)
    logits[0, 4] = 0.1
    # 3 is in the prompt only; 4 was generated twice: 0.1 - 2 × 0.2 - 0.3
    seq = sequence((3, 3), (4, 4), temperature=0, presence_penalty=0.3, frequency_penalty=0.2)
    assert sample(logits, [seq])[0].token_id == 0
    mild = sequence((3, 3), (4,), temperature=0, frequency_penalty=0.05)
    assert sample(logits, [mild])[0].token_id == 4


def test_repetition_penalty_range() -> None:
    logits = torch.tensor([[1.0, 0.9, 0.8]])
    prompt = (0, 1, 2, 2)
    for window, expected in ((0, 0), (3, 0), (2, 0)):
        seq = sequence(
            prompt, temperature=0, repetition_penalty=2.0, repetition_penalty_range=window
        )
        assert sample(logits, [seq])[0].token_id == expected
    near = sequence((1, 2, 0), temperature=0, repetition_penalty=2.0, repetition_penalty_range=1)
    assert sample(logits, [near])[0].token_id == 1, "only the last token, 0, is penalised"


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    logits = random_logits(1)
    scaled = apply_temperature(logits, torch.tensor([1e-30]))
    assert not scaled.isnan().any()
    assert sample(logits, [sequence(temperature=1e-30)])[0].token_id == int(logits.argmax())


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2}],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(params) -> None:
    """Pearson's chi-square at a level of 1e-4, with a fixed seed per draw."""
    logits = random_logits(1, 12) / 2
    scaled = logits / params.get("temperature", 1.0)
    if "top_k" in params:
        scaled = TopKLogitsWarper(params["top_k"])(None, scaled)
    if "top_p" in params:
        scaled = TopPLogitsWarper(params["top_p"])(None, scaled)
    if "min_p" in params:
        scaled = MinPLogitsWarper(params["min_p"])(None, scaled)
    expected = scaled.softmax(-1)[0]

    count = 4000
    seqs = [sequence(seed=seed, **params) for seed in range(count)]
    drawn = Counter(token.token_id for token in sample(logits.expand(count, -1), seqs))
    assert all(expected[token_id] > 0 for token_id in drawn)
    alive = [i for i in range(12) if expected[i] > 0]
    chi_square = sum(
        (drawn[i] - count * expected[i].item()) ** 2 / (count * expected[i].item()) for i in alive
    )
    degrees = len(alive) - 1
    # Wilson–Hilferty approximation of the 0.9999 quantile of the chi-square distribution
    limit = degrees * (1 - 2 / (9 * degrees) + 3.719 * math.sqrt(2 / (9 * degrees))) ** 3
    assert chi_square < limit


def test_what_is_no_number_is_refused() -> None:
    logits = random_logits(2)
    logits[1, 7] = torch.nan
    for params in ({}, {"top_p": 0.5}, {"temperature": 0}):
        with pytest.raises(FloatingPointError):
            sample(logits, [sequence(temperature=0), sequence(**params)])


def test_a_step_that_failed_has_taken_no_random_number() -> None:
    logits = random_logits(2).repeat(1, 20)
    expected = sample(logits, [sequence(seed=1), sequence(seed=2)])
    seqs = [sequence(seed=1), sequence(seed=2)]
    broken = logits.clone()
    broken[0, 0] = torch.nan
    with pytest.raises(FloatingPointError):
        sample(broken, seqs)
    assert sample(logits, seqs) == expected
    for seq, token in zip(seqs, expected, strict=True):
        seq.append(token.token_id)
    others = [seq.uniform for seq in seqs]
    assert others != [sequence(seed=1).uniform, sequence(seed=2).uniform]


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


def test_logprobs_are_those_of_the_model_and_only_where_asked() -> None:
    logits = random_logits(2)
    penalized = sequence(output=(5,), temperature=0, num_logprobs=0, presence_penalty=1.0)
    tokens = sample(logits, [penalized, sequence(temperature=0.0)])
    expected = logits.log_softmax(-1)[0, tokens[0].token_id].item()
    assert tokens[0].logprobs.logprob == pytest.approx(expected, abs=1e-5)
    assert tokens[1].logprobs is None
