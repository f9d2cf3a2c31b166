"""The arithmetic of each sampler step: pure functions on logits, [num_rows, num_candidates],
float32, where minus infinity is what has been left out. Those on single tokens write in place.

Each takes one value per row. A filter finds a threshold per row, [num_rows, 1]: lower logits are
left out, equal ones share their fate. Nothing of a row depends on the others.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from modules.engine import cpu_kernels

# The draw and every share of probability are summed up in pieces of so many.
PIECE = 128
# How many tokens top_p looks at first.
HEAD = 256
# So many are summed up one by one.
MAX_SUMMED_SINGLY = 4096
# Times a probability of 0, it is 0, and its square is finite; minus infinity gives no number.
LOWEST = -1e15
# The shape of adaptive-p's preference.
ADAPTIVE_WIDTH, ADAPTIVE_PEAK, ADAPTIVE_SHARPNESS = 0.3, 5.0, 10.0
# How many of the likeliest tokens mirostat 1 looks at to estimate the exponent.
NUM_MIROSTAT_TOKENS = 100


# Single tokens, in place: `rows` and `token_ids` [num_pairs] say which


def penalize_repetition(logits: Tensor, rows: Tensor, token_ids: Tensor, penalty: Tensor) -> None:
    """Divide a positive logit by `penalty`, multiply a negative one (Keskar et al. 2019, "CTRL").

    A pair may be there several times, with the same `penalty` [num_pairs]; 1 is neutral. The
    inverse favours tokens instead (transformers' encoder repetition penalty).
    """
    seen = logits[rows, token_ids]
    seen = torch.where(seen > 0, seen / penalty, seen * penalty)
    logits.index_put_((rows, token_ids), seen)


def add_to_tokens(logits: Tensor, rows: Tensor, token_ids: Tensor, amounts: Tensor) -> None:
    """`amounts` [num_pairs]; each pair once. Minus infinity bans (OpenAI's `logit_bias`)."""
    logits.index_put_((rows, token_ids), logits[rows, token_ids] + amounts)


def keep_tokens(logits: Tensor, rows: Tensor, token_ids: Tensor, restricted: Tensor) -> None:
    """In the rows of which `restricted` [num_rows] is true, only the pairs' tokens."""
    allowed = ~restricted[:, None].expand_as(logits)
    logits.masked_fill_(~allowed.index_put((rows, token_ids), rows >= 0), -torch.inf)


# What changes the shape of the distribution, and not the order of the tokens


def apply_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """Divide by `temperature`, [num_rows, 1], which is not so small that anything overflows."""
    return logits / temperature


def find_dynamic_temperature(
    logits: Tensor, lowest: Tensor, highest: Tensor, exponent: Tensor
) -> Tensor:
    """Temperature [num_rows, 1] between `lowest` and `highest`, by how even the distribution is:
    its entropy over that of as many equally likely tokens, to the power of `exponent` (kalomaze
    2023, koboldcpp's dynamic temperature).
    """
    entropy = find_entropy(logits)
    most = logits.isfinite().sum(-1, keepdim=True).double().log()
    evenness = torch.where(most > 0, entropy / most, 0.0).clamp(0, 1)
    return (lowest + (highest - lowest) * evenness**exponent).float()


def apply_smoothing(logits: Tensor, factor: Tensor, curve: Tensor) -> Tensor:
    """Quadratic sampling (kalomaze 2024): with d the distance to the highest logit, which stays,
    −k·f·d² + s·f·d³ for k = (3 − c) / 2 and s = (c − 1) / 2. All [num_rows, 1].

    A `curve` outside of 1 to 3 may change the order of the tokens.
    """
    highest = logits.amax(-1, keepdim=True)
    distance = logits - highest
    square, cube = (3 - curve) / 2, (curve - 1) / 2
    smoothed = highest + factor * distance**2 * (cube * distance - square)
    return torch.where(logits.isfinite(), smoothed, -torch.inf)


# Filters. `descending` are the logits of each row, the highest first


def find_top_k_threshold(descending: Tensor, top_k: Tensor) -> Tensor:
    """The `top_k` likeliest tokens (Fan et al. 2018). `top_k` ≥ 1, [num_rows, 1]."""
    return descending.gather(-1, top_k.clamp(max=descending.shape[-1]) - 1)


def find_top_p_threshold(descending: Tensor, top_p: Tensor) -> Tensor:
    """The smallest head whose probability reaches `top_p`, at least one token (Holtzman et al.
    2020, nucleus sampling)."""
    probs = descending.softmax(-1)
    return descending.gather(-1, find_share(probs, top_p.double() * (1 - 1e-12)))


def find_top_p_threshold_unsorted(logits: Tensor, top_p: Tensor) -> Tensor:
    """The same, of logits in any order. Only of rows whose likeliest HEAD tokens are not likely
    enough together, the others are sorted too.
    """
    highest, places = logits.topk(min(HEAD, logits.shape[-1]))
    reached = logits.softmax(-1).gather(-1, places).double().cumsum(-1)
    place = torch.searchsorted(reached, top_p.double() * (1 - 1e-12), right=True)
    threshold = highest.gather(-1, place.clamp(max=highest.shape[-1] - 1))
    lacking = (place == highest.shape[-1])[:, 0].nonzero()[:, 0]
    if len(lacking):
        ordered = sort_descending(logits[lacking])
        threshold[lacking] = find_top_p_threshold(ordered, top_p[lacking])
    return threshold


def find_tail_free_threshold(descending: Tensor, tfs: Tensor) -> Tensor:
    """Tail-free sampling (Bricken 2020): where the curve of sorted probabilities has used up the
    share `tfs` of its curvature, the tail begins."""
    if descending.shape[-1] < 3:
        return descending[:, -1:]
    curvature = descending.softmax(-1).diff().diff().abs()
    return descending.gather(-1, find_share(curvature, tfs.double()))


def find_min_p_threshold(logits: Tensor, min_p: Tensor) -> Tensor:
    """At least `min_p` times as likely as the likeliest token (Nguyen et al. 2024)."""
    return (logits.amax(-1, keepdim=True) + min_p.double().log()).float()


def find_top_a_threshold(logits: Tensor, top_a: Tensor) -> Tensor:
    """At least as likely as `top_a` times the square of the highest probability (BlinkDL 2022)."""
    highest = logits.log_softmax(-1).amax(-1, keepdim=True).double()
    return _to_logit(logits, top_a * (2 * highest).exp())


def find_epsilon_threshold(logits: Tensor, epsilon: Tensor) -> Tensor:
    """At least as likely as `epsilon` (Hewitt et al. 2022)."""
    return _to_logit(logits, epsilon)


def find_eta_threshold(logits: Tensor, epsilon: Tensor) -> Tensor:
    """At least as likely as the smaller of `epsilon` and √epsilon·exp(−entropy) (Hewitt et al.
    2022, eta sampling)."""
    epsilon = epsilon.double()
    by_entropy = epsilon.sqrt() * (-find_entropy(logits)).exp()
    return _to_logit(logits, torch.minimum(epsilon, by_entropy))


def find_top_n_sigma_threshold(logits: Tensor, num_sigmas: Tensor) -> Tensor:
    """Within `num_sigmas` standard deviations of all logits from the highest (Tang et al. 2024)."""
    highest = logits.amax(-1, keepdim=True)
    is_there = (logits > -torch.inf).float()
    distance = (logits - highest).clamp(min=LOWEST) * is_there
    count = sum_rows(is_there)
    mean = sum_rows(distance) / count
    variance = sum_rows(distance**2) / count - mean**2
    return (highest - num_sigmas * variance.clamp(min=0).sqrt()).float()


def find_mirostat_1_threshold(descending: Tensor, mu: Tensor) -> Tensor:
    """As many tokens as a Zipf distribution of the same exponent needs for a surprise of `mu` bits
    (Basu et al. 2021, "Mirostat", algorithm 1)."""
    num_finite = descending.isfinite().sum(-1, keepdim=True).double()
    head = descending[:, :NUM_MIROSTAT_TOKENS].double().log_softmax(-1)
    rank = torch.arange(1, head.shape[-1], device=head.device, dtype=torch.float64)
    ratio = ((rank + 1) / rank).log()
    drop = torch.where(head[:, 1:].isfinite(), head[:, :-1] - head[:, 1:], 0)
    weight = torch.where(head[:, 1:].isfinite(), ratio, 0)
    exponent = (weight * drop).sum(-1, keepdim=True) / (weight**2).sum(-1, keepdim=True)
    epsilon = exponent - 1
    top_k = (epsilon * 2 ** mu.double() / (1 - num_finite**-epsilon)) ** (1 / exponent)
    # Where the exponent is 1 the formula has a gap, and where there is one token no exponent.
    top_k = top_k.nan_to_num(nan=1, posinf=descending.shape[-1]).clamp(1, descending.shape[-1])
    return find_top_k_threshold(descending, top_k.round().long())


def find_mirostat_2_threshold(logits: Tensor, mu: Tensor) -> Tensor:
    """At most `mu` bits of surprise (Basu et al. 2021, "Mirostat", algorithm 2)."""
    return _to_logit(logits, 2 ** -mu.double())


def leave_out_untypical(logits: Tensor, typical_p: Tensor) -> Tensor:
    """Keep the tokens whose surprise is nearest to the entropy, until they have the probability
    `typical_p` together (Meister et al. 2022, locally typical sampling).
    """
    logprobs = logits.log_softmax(-1)
    distance = (logprobs + find_entropy(logits).float()).abs()
    ordered, order = sort_ascending(distance)
    probs = logits.softmax(-1).gather(-1, order)
    farthest = ordered.gather(-1, find_share(probs, typical_p.double() * (1 - 1e-12)))
    return logits.masked_fill(distance > farthest, -torch.inf)


def leave_out_top_choices(logits: Tensor, threshold: Tensor, is_protected: Tensor) -> Tensor:
    """XTC (p-e-w 2024): leave out all tokens that have at least the probability `threshold`, but
    for the least likely of them. Where that would take away a protected token, nothing happens.

    A row is left alone by a threshold above 1. `is_protected` [num_rows, num_candidates].
    """
    is_choice = (logits.softmax(-1) >= threshold) & logits.isfinite()
    least = torch.where(is_choice, logits, torch.inf).amin(-1, keepdim=True)
    leaves_out = is_choice & (logits > least)
    is_spoilt = (leaves_out & is_protected).any(-1, keepdim=True)
    return logits.masked_fill(leaves_out & ~is_spoilt, -torch.inf)


def prefer_probability(logits: Tensor, target: Tensor) -> Tensor:
    """Adaptive-p (MrJackSpade 2025): new logits, by how near a probability is to `target`."""
    distance = (logits.softmax(-1) - target).abs() / ADAPTIVE_WIDTH
    preferred = ADAPTIVE_PEAK - ADAPTIVE_SHARPNESS * distance**2 / (1 + distance)
    return torch.where(logits.isfinite(), preferred, -torch.inf)


# What they share


def leave_out_below(logits: Tensor, threshold: Tensor) -> Tensor:
    """Minus infinity in place of what is lower than `threshold`, [num_rows, 1]."""
    if logits.device.type != "cpu":
        return logits.masked_fill(logits < threshold, -torch.inf)
    out = torch.empty(logits.shape)
    cpu_kernels.leave_out_below(logits.contiguous().numpy(), threshold.numpy(), out.numpy())
    return out


def _in_pieces(values: Tensor, size: int) -> Tensor:
    """[num_rows, n] → [num_rows, num_pieces, size], filled up with 0."""
    num_missing = -values.shape[-1] % size
    if num_missing:
        values = torch.nn.functional.pad(values, (0, num_missing))
    return values.reshape(len(values), -1, size)


def find_share(weights: Tensor, shares: Tensor) -> Tensor:
    """The first place up to which `weights` [num_rows, n] add up to more than `shares` of their
    sum, [num_rows, 1], float64; at most the last one that has a weight. [num_rows, 1].

    Of many weights, pieces are added up, and only one piece by single ones: a whole cumulative sum
    in float64 would take ten times as long.
    """
    if weights.shape[-1] <= MAX_SUMMED_SINGLY:
        return _find_place(weights.double().cumsum(-1), shares)[1]
    pieces = _in_pieces(weights, PIECE)
    ends = pieces.sum(-1, dtype=torch.float64).cumsum(-1)
    target, place = _find_place(ends, shares)
    start = torch.where(place > 0, ends.gather(-1, (place - 1).clamp(min=0)), 0)
    piece = pieces.gather(1, place[..., None].expand(-1, 1, PIECE))[:, 0]
    inner = piece.double().cumsum(-1)
    _, found = _find_place(inner, (target - start) / inner[:, -1:])
    return (place * PIECE + found).clamp_(max=weights.shape[-1] - 1)


def _find_place(ends: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Where sums that grow first exceed a share of the last one: that share, and the place."""
    total = ends[:, -1:]
    targets = torch.minimum(shares * total, torch.nextafter(total, torch.zeros_like(total)))
    # Behind the end only what is no number is looked for.
    return targets, torch.searchsorted(ends, targets, right=True).clamp_(max=ends.shape[-1] - 1)


def find_entropy(logits: Tensor) -> Tensor:
    """In nats, [num_rows, 1], float64."""
    return -sum_rows(logits.softmax(-1) * logits.log_softmax(-1).clamp(min=LOWEST))


def sum_rows(values: Tensor) -> Tensor:
    """[num_rows, n] → [num_rows, 1], float64. Torch adds a single row up in another order than one
    of many; but not these pieces."""
    return _in_pieces(values, PIECE).sum(-1, dtype=torch.float64).cumsum(-1)[:, -1:]


def sort_descending(logits: Tensor) -> Tensor:
    """On the CPU by numpy, which takes a tenth of torch's time."""
    if logits.device.type == "cpu":
        return torch.from_numpy(np.sort(logits.numpy(), axis=-1)).flip(-1)
    return logits.sort(-1, descending=True).values


def sort_ascending(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of values that are not negative; and where they were."""
    if values.device.type != "cpu":
        ordered, order = values.sort(-1)
        return ordered, order
    # Floats above 0 are in the order of their bits; a place below them makes one integer of both.
    places = torch.arange(values.shape[-1])
    keys = (values.view(torch.int32).long() << 32) | places
    order = torch.from_numpy(np.sort(keys.numpy(), axis=-1)) & 0xFFFFFFFF
    return values.gather(-1, order), order


def _to_logit(logits: Tensor, probability: Tensor) -> Tensor:
    """The logit of a token that has `probability`; the highest one at most, which is kept."""
    highest = logits.amax(-1, keepdim=True)
    # logsumexp adds a single row up in another order than one of many.
    log_total = highest.double() - logits.log_softmax(-1).amax(-1, keepdim=True)
    return torch.minimum((probability.double().log() + log_total).float(), highest)
