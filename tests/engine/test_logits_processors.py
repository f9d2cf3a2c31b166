"""Each step's arithmetic against transformers' own where it has the step, and against plain numpy,
one row at a time, where it has not.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import (
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from modules.engine.logits_processors import (
    add_to_tokens,
    apply_smoothing,
    apply_temperature,
    find_dynamic_temperature,
    find_entropy,
    find_epsilon_threshold,
    find_eta_threshold,
    find_min_p_threshold,
    find_mirostat_1_threshold,
    find_mirostat_2_threshold,
    find_share,
    find_tail_free_threshold,
    find_top_a_threshold,
    find_top_k_threshold,
    find_top_n_sigma_threshold,
    find_top_p_threshold,
    find_top_p_threshold_unsorted,
    keep_tokens,
    leave_out_below,
    leave_out_top_choices,
    leave_out_untypical,
    penalize_repetition,
    prefer_probability,
    sort_descending,
    sum_rows,
)

ROWS, VOCAB = 6, 300


def random_logits(rows: int = ROWS, vocab: int = VOCAB) -> torch.Tensor:
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rows)) * 3
    logits[0, :20] = -torch.inf  # left out by a step before
    return logits


def column(values: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)[:, None]


def cut(logits: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill(logits < threshold, -torch.inf)


def softmax(row: np.ndarray) -> np.ndarray:
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def kept(logits: torch.Tensor) -> list[set[int]]:
    return [set(row.isfinite().nonzero()[:, 0].tolist()) for row in logits]


# Against transformers

SORTED_FILTERS = [
    (find_top_k_threshold, TopKLogitsWarper, [1, 7, 49, 250, 299, 300]),
    (find_top_p_threshold, TopPLogitsWarper, [0.01, 0.3, 0.6, 0.9, 0.99, 0.999]),
]
FILTERS = [
    (find_top_p_threshold_unsorted, TopPLogitsWarper, [0.01, 0.3, 0.6, 0.9, 0.99, 0.999]),
    (find_min_p_threshold, MinPLogitsWarper, [0.001, 0.01, 0.05, 0.2, 0.5, 1.0]),
    (find_epsilon_threshold, EpsilonLogitsWarper, [3e-4, 1e-3, 9e-3, 0.05, 0.2, 0.9]),
    (find_eta_threshold, EtaLogitsWarper, [3e-4, 1e-3, 9e-3, 0.05, 0.2, 0.9]),
]


@pytest.mark.parametrize(("find", "warper", "values"), SORTED_FILTERS)
def test_sorted_filters_equal_transformers(find, warper, values) -> None:
    logits = random_logits()
    dtype = torch.long if isinstance(values[0], int) else torch.float32
    ours = cut(logits, find(sort_descending(logits), column(values, dtype)))
    for row, value in enumerate(values):
        assert torch.equal(ours[row], warper(value)(None, logits[row : row + 1].clone())[0]), value


@pytest.mark.parametrize(("find", "warper", "values"), FILTERS)
def test_filters_equal_transformers(find, warper, values) -> None:
    logits = random_logits()
    ours = cut(logits, find(logits, column(values)))
    for row, value in enumerate(values):
        assert torch.equal(ours[row], warper(value)(None, logits[row : row + 1].clone())[0]), value


def test_top_p_of_rows_that_need_much_and_little_more_than_the_head() -> None:
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(3))
    logits[1] *= 6
    logits[2] *= 0
    values = column([0.9, 0.9, 0.5, 0.02])
    expected = find_top_p_threshold(sort_descending(logits), values)
    assert torch.equal(find_top_p_threshold_unsorted(logits, values), expected)


def test_typical_p_equals_transformers() -> None:
    logits, values = random_logits(), [0.05, 0.2, 0.5, 0.8, 0.95, 0.99]
    ours = leave_out_untypical(logits, column(values))
    for row, value in enumerate(values):
        theirs = TypicalLogitsWarper(value)(None, logits[row : row + 1].clone())[0]
        assert torch.equal(ours[row], theirs), value


def test_temperature_gives_the_probabilities_of_transformers() -> None:
    logits, values = random_logits(), [0.1, 0.5, 0.9, 1.0, 1.5, 5.0]
    ours = apply_temperature(logits, column(values)).softmax(-1)
    for row, value in enumerate(values):
        theirs = TemperatureLogitsWarper(value)(None, logits[row : row + 1]).softmax(-1)[0]
        torch.testing.assert_close(ours[row], theirs)


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3])
def test_repetition_penalties_equal_transformers(penalty) -> None:
    logits = random_logits(1)
    seen = torch.tensor([[3, 29, 29, 120]])
    rows, penalties = torch.zeros(4, dtype=torch.long), torch.full((4,), penalty)
    ours = logits.clone()
    penalize_repetition(ours, rows, seen[0], penalties)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone())
    torch.testing.assert_close(ours, theirs)
    ours = logits.clone()
    penalize_repetition(ours, rows, seen[0], 1 / penalties)
    theirs = EncoderRepetitionPenaltyLogitsProcessor(penalty, seen)(None, logits.clone())
    torch.testing.assert_close(ours, theirs)


# Against numpy


def each_row(logits: torch.Tensor, values: list[float]):
    yield from zip(logits.double().numpy(), values, strict=True)


def test_tail_free_sampling() -> None:
    logits, values = random_logits(), [0.1, 0.5, 0.8, 0.95, 0.99, 0.999]
    ours = kept(cut(logits, find_tail_free_threshold(sort_descending(logits), column(values))))
    for found, (row, z) in zip(ours, each_row(logits, values), strict=True):
        order = np.argsort(-row)
        curvature = np.abs(np.diff(np.diff(softmax(row)[order])))
        used = np.cumsum(curvature / curvature.sum())
        # A token goes once the curvature before it is used up; the first stays, the last goes.
        goes = np.concatenate([[False], used > z, [True]])
        assert found == {int(i) for i in order[~goes] if np.isfinite(row[i])}, z


def test_tail_free_sampling_of_equal_or_few_tokens_keeps_some() -> None:
    for logits in (torch.zeros(1, 50), torch.zeros(1, 2), torch.zeros(1, 1)):
        threshold = find_tail_free_threshold(sort_descending(logits), column([0.5]))
        assert kept(cut(logits, threshold))[0]


def test_top_a() -> None:
    logits, values = random_logits(), [0.01, 0.1, 0.2, 0.5, 0.9, 1.0]
    ours = kept(cut(logits, find_top_a_threshold(logits, column(values))))
    for found, (row, a) in zip(ours, each_row(logits, values), strict=True):
        probs = softmax(row)
        assert found == set(np.flatnonzero(probs >= a * probs.max() ** 2).tolist()), a


def test_top_n_sigma() -> None:
    logits, values = random_logits(), [0.1, 0.5, 1.0, 1.5, 2.0, 5.0]
    ours = kept(cut(logits, find_top_n_sigma_threshold(logits, column(values))))
    for found, (row, n) in zip(ours, each_row(logits, values), strict=True):
        lowest = row.max() - n * row[np.isfinite(row)].std()
        assert found == set(np.flatnonzero(row >= lowest).tolist()), n


def test_dynamic_temperature() -> None:
    logits = random_logits()
    lowest, highest, exponent = (
        [0.1, 0.5, 1.0, 0.2, 0.3, 0.0],
        [1.0, 1.5, 2.0, 0.2, 4.0, 1.0],
        [1.0, 0.5, 2.0, 1.0, 3.0, 1.0],
    )
    ours = find_dynamic_temperature(logits, column(lowest), column(highest), column(exponent))
    for found, row, low, high, power in zip(
        ours[:, 0].tolist(), logits.double().numpy(), lowest, highest, exponent, strict=True
    ):
        probs = softmax(row)[np.isfinite(row)]
        evenness = -(probs * np.log(probs)).sum() / math.log(len(probs))
        assert found == pytest.approx(low + (high - low) * evenness**power, rel=1e-5)


def test_dynamic_temperature_of_a_single_token_is_the_lowest() -> None:
    logits = torch.full((1, 9), -torch.inf)
    logits[0, 3] = 1.0
    ours = find_dynamic_temperature(logits, column([0.5]), column([2.0]), column([1.0]))
    assert ours.item() == 0.5


@pytest.mark.parametrize("curve", [0.5, 1.0, 2.0, 3.0, 4.0])
def test_quadratic_sampling(curve) -> None:
    logits, factors = random_logits(), [0.1, 0.2, 0.3, 0.5, 1.0, 2.0]
    ours = apply_smoothing(logits, column(factors), column([curve] * ROWS))
    for found, (row, f) in zip(ours.double().numpy(), each_row(logits, factors), strict=True):
        finite = np.isfinite(row)
        d = row[finite] - row.max()
        expected = row.max() - (3 - curve) / 2 * f * d**2 + (curve - 1) / 2 * f * d**3
        np.testing.assert_allclose(found[finite], expected, rtol=1e-4, atol=1e-4)
        assert (found[~finite] == -np.inf).all()


def test_mirostat_1() -> None:
    logits, values = random_logits(), [0.5, 2.0, 4.0, 5.0, 8.0, 12.0]
    ours = kept(cut(logits, find_mirostat_1_threshold(sort_descending(logits), column(values))))
    for found, (row, mu) in zip(ours, each_row(logits, values), strict=True):
        probs = np.sort(softmax(row))[::-1]
        head = probs[:100]
        t = [math.log((i + 2) / (i + 1)) for i in range(len(head) - 1)]
        b = [math.log(head[i] / head[i + 1]) for i in range(len(head) - 1)]
        s = sum(x * y for x, y in zip(t, b, strict=True)) / sum(x * x for x in t)
        size = np.isfinite(row).sum()
        k = ((s - 1) * 2**mu / (1 - size ** -(s - 1))) ** (1 / s)
        k = min(max(round(k), 1), size)
        assert found == {int(i) for i in np.argsort(-row)[:k]}, mu


def test_mirostat_1_of_few_tokens_keeps_one() -> None:
    logits = torch.full((2, 200), -torch.inf)
    logits[0, 5] = 1.0
    logits[1, :2] = 0.0
    found = kept(cut(logits, find_mirostat_1_threshold(sort_descending(logits), column([5.0] * 2))))
    assert found[0] == {5}
    assert found[1]


def test_mirostat_2() -> None:
    logits, values = random_logits(), [0.0, 1.0, 2.0, 4.0, 6.0, 10.0]
    ours = kept(cut(logits, find_mirostat_2_threshold(logits, column(values))))
    for found, (row, mu) in zip(ours, each_row(logits, values), strict=True):
        with np.errstate(divide="ignore"):
            expected = set(np.flatnonzero(-np.log2(softmax(row)) <= mu).tolist())
        assert found == (expected or {int(row.argmax())}), mu


def test_xtc() -> None:
    logits, values = random_logits(), [0.01, 0.05, 0.1, 0.2, 0.5, math.inf]
    nothing = torch.zeros_like(logits, dtype=torch.bool)
    ours = kept(leave_out_top_choices(logits, column(values), nothing))
    for found, (row, threshold) in zip(ours, each_row(logits, values), strict=True):
        probs = softmax(row)
        choices = sorted(np.flatnonzero(probs >= threshold), key=lambda i: probs[i])
        expected = set(np.flatnonzero(np.isfinite(row)).tolist()) - {int(i) for i in choices[1:]}
        assert found == expected, threshold


def test_xtc_keeps_nothing_that_is_left_out_already() -> None:
    logits = torch.tensor([[3.0, 2.0, -math.inf]])
    nothing = torch.zeros_like(logits, dtype=torch.bool)
    assert kept(leave_out_top_choices(logits, column([0.0]), nothing)) == [{1}]


def test_xtc_takes_no_protected_token_away() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    protected = torch.tensor([[False, True, False], [False, False, True]])
    ours = leave_out_top_choices(logits, column([0.05, 0.05]), protected)
    assert kept(ours) == [{0, 1, 2}, {2}], "the least likely choice stays anyway"


def test_adaptive_p() -> None:
    logits, targets = random_logits(), [0.0, 0.1, 0.3, 0.5, 0.9, 1.0]
    ours = prefer_probability(logits, column(targets)).double().numpy()
    for found, (row, target) in zip(ours, each_row(logits, targets), strict=True):
        distance = np.abs(softmax(row) - target) / 0.3
        expected = 5 - 10 * distance**2 / (1 + distance)
        expected[~np.isfinite(row)] = -np.inf
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_entropy_and_sums() -> None:
    logits = random_logits()
    for found, row in zip(
        find_entropy(logits)[:, 0].tolist(), logits.double().numpy(), strict=True
    ):
        probs = softmax(row)[np.isfinite(row)]
        assert found == pytest.approx(-(probs * np.log(probs)).sum(), rel=1e-5)
    values = torch.rand(3, 1000)
    torch.testing.assert_close(sum_rows(values), values.double().sum(-1, keepdim=True))


# Single tokens


def test_adding_to_tokens_and_keeping_tokens() -> None:
    logits = torch.zeros(2, 4)
    rows, ids = torch.tensor([0, 0, 1]), torch.tensor([1, 3, 3])
    added = logits.clone()
    add_to_tokens(added, rows, ids, torch.tensor([2.0, -torch.inf, -1.0]))
    assert added.tolist() == [[0, 2, 0, -torch.inf], [0, 0, 0, -1]]
    keep_tokens(logits, rows[:2], ids[:2], torch.tensor([True, False]))
    assert kept(logits) == [{1, 3}, {0, 1, 2, 3}]


# What they share


@pytest.mark.parametrize("size", [1, 5, 127, 128, 129, 1000])
def test_find_share_is_the_inverse_of_the_cumulative_sum(size) -> None:
    weights = torch.rand(1, size, generator=torch.Generator().manual_seed(size))
    weights[0, ::3] = 0
    weights[0, -1] = 0.3
    ends = weights.double().cumsum(-1)[0] / weights.double().sum()
    for share in [0.0, 1e-9, 0.1, 0.5, 0.99, 1 - 2**-53]:
        place = find_share(weights, torch.tensor([[share]], dtype=torch.float64)).item()
        assert weights[0, place] > 0
        assert ends[place] > share - 1e-12
        assert place == 0 or ends[place - 1] <= share + 1e-12


def test_find_share_ends_at_the_last_weight() -> None:
    weights = torch.zeros(1, 1000)
    weights[0, :3] = 1.0
    place = find_share(weights, torch.tensor([[1 - 2**-53]], dtype=torch.float64))
    assert place.item() == 2


def test_what_is_no_number_stays_within_bounds() -> None:
    weights = torch.full((1, 300), torch.nan)
    assert 0 <= find_share(weights, torch.tensor([[0.5]], dtype=torch.float64)).item() < 300


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_a_row_is_the_same_to_the_last_bit_in_any_company(rows) -> None:
    """With a vocabulary that torch would share out among threads."""
    logits = torch.randn(rows, 49_152, generator=torch.Generator().manual_seed(5)) * 3
    alone, batch = logits[:1].clone(), logits
    p = column([0.8])

    def many(value):
        return value.expand(rows, 1)

    for one, all_rows in (
        (sum_rows(alone), sum_rows(batch)),
        (find_entropy(alone), find_entropy(batch)),
        (
            find_share(alone.softmax(-1), p.double()),
            find_share(batch.softmax(-1), many(p.double())),
        ),
        (
            find_top_p_threshold(sort_descending(alone), p),
            find_top_p_threshold(sort_descending(batch), many(p)),
        ),
        (
            find_top_p_threshold_unsorted(alone, p),
            find_top_p_threshold_unsorted(batch, many(p)),
        ),
        (leave_out_untypical(alone, p), leave_out_untypical(batch, many(p))),
        (prefer_probability(alone, p), prefer_probability(batch, many(p))),
        (find_top_a_threshold(alone, p), find_top_a_threshold(batch, many(p))),
        (find_eta_threshold(alone, p), find_eta_threshold(batch, many(p))),
        (find_top_n_sigma_threshold(alone, p), find_top_n_sigma_threshold(batch, many(p))),
    ):
        assert torch.equal(one, all_rows[:1])


def test_what_is_below_is_left_out() -> None:
    logits = torch.tensor([[1.0, 2.0, -torch.inf], [5.0, 6.0, 7.0]])
    kept_logits = leave_out_below(logits, torch.tensor([[2.0], [-torch.inf]]))
    assert kept_logits.tolist() == [[-torch.inf, 2, -torch.inf], [5, 6, 7]]
    assert torch.equal(leave_out_below(logits[:1].expand(2, -1), logits[:, :1])[0], logits[0])


def test_xtc_counts_no_token_that_was_left_out() -> None:
    """Not even where every probability is a top choice."""
    logits = torch.tensor([[1.0, -torch.inf, 3.0, 2.0]])
    left = leave_out_top_choices(logits, torch.tensor([[0.0]]), torch.zeros(1, 4, dtype=torch.bool))
    assert left.isfinite().tolist() == [[True, False, False, False]]
