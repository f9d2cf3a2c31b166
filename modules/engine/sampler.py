"""Which token comes next: logits of a batch and the wishes of its sequences in, one token per
sequence out.

Rows whose sequences have the same plan go through its steps together, each with its own values.
What happens to a row depends on nothing but that row, and its random numbers come from its own
generator, so a sequence gets the same tokens in any company.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from modules.engine.candidates import Candidates
from modules.engine.logits_processors import add_to_tokens, keep_tokens
from modules.engine.logprobs import Logprobs, compute_logprobs
from modules.engine.sampler_chain import STEPS, join
from modules.engine.sampler_plan import Plan, learn
from modules.engine.scheduler import SampledToken
from modules.engine.sequence import Sequence
from modules.engine.transfer import upload
from modules.errors import NoTokenLeftError


@dataclass(frozen=True, slots=True)
class _Choice:
    """The tokens of the rows with one plan, and the candidates that they were chosen from."""

    plan: Plan
    rows: list[int]
    candidates: Candidates
    places: Tensor
    """[num_rows, 1]"""


def sample(logits: Tensor, seqs: list[Sequence]) -> list[SampledToken]:
    """One token for each of `seqs`; `logits` [num_seqs, vocab_size], float32.

    Raises FloatingPointError when the model has computed something that is no number, and
    NoTokenLeftError when no token is left that may be generated.
    """
    own = logits.clone() if any(map(_edits_tokens, seqs)) else logits
    _restrict(own, seqs)
    groups: dict[Plan, list[int]] = defaultdict(list)
    for row, seq in enumerate(seqs):
        groups[seq.plan].append(row)
    choices = [_choose(own, seqs, plan, rows) for plan, rows in groups.items()]
    tokens = _fetch(logits, seqs, choices)
    for row, logprobs in _report(logits, seqs, choices, tokens).items():
        tokens[row] = replace(tokens[row], logprobs=logprobs)
    return tokens


def _choose(logits: Tensor, seqs: list[Sequence], plan: Plan, rows: list[int]) -> _Choice:
    group = [seqs[row] for row in rows]
    if len(rows) < len(seqs):
        logits = logits[upload(rows, logits.device)]
    candidates = Candidates(logits.shape[-1], logits)
    for step in plan.steps:
        candidates = STEPS[step](candidates, group)
    if plan.is_greedy:
        return _Choice(plan, rows, candidates, candidates.logits.argmax(-1, keepdim=True))
    uniforms = upload([[seq.uniform()] for seq in group], logits.device, torch.float64)
    return _Choice(plan, rows, candidates, candidates.draw(uniforms))


def _fetch(logits: Tensor, seqs: list[Sequence], choices: list[_Choice]) -> list[SampledToken]:
    """What there is to know on the host, in one copy: a card is waited for once."""
    places = [row for choice in choices for row in choice.rows]
    chosen = torch.cat([_look_up(choice) for choice in choices], dim=-1)
    # float64 holds every token id
    *columns, highest = torch.cat([chosen, logits.amax(-1).double()[None]]).tolist()
    if not all(map(math.isfinite, highest)):
        raise FloatingPointError("logits are not finite")
    tokens: dict[int, SampledToken] = {}
    for row, token_id, logit, prob, earlier in zip(places, *columns, strict=True):
        if not math.isfinite(logit):
            raise NoTokenLeftError
        seq = seqs[row]
        state = learn(seq.params, seq.sampler_state, prob, earlier)
        tokens[row] = SampledToken(int(token_id), sampler_state=state)
    return [tokens[row] for row in range(len(seqs))]


def _look_up(choice: _Choice) -> Tensor:
    """Token ids, logits and probabilities of what was chosen, the latter also as they were before
    adaptive-p: [4, num_rows], float64."""
    candidates, places = choice.candidates, choice.places
    logits = candidates.logits.gather(-1, places)
    # Nobody looks at what has not been computed for a reason.
    prob = earlier = torch.ones_like(logits)
    if choice.plan.mirostat_mode:
        prob = candidates.logits.softmax(-1).gather(-1, places)
    if candidates.earlier_probs is not None:
        earlier = candidates.earlier_probs.gather(-1, places)
    ids = candidates.find_ids(places)
    return torch.cat([ids.double(), logits.double(), prob.double(), earlier.double()], -1).T


def _report(
    logits: Tensor, seqs: list[Sequence], choices: list[_Choice], tokens: list[SampledToken]
) -> dict[int, Logprobs]:
    """By row, for those that asked: of the model's own logits, or of what became of them."""
    found: dict[int, Logprobs] = {}
    asked = [row for row, seq in enumerate(seqs) if seq.params.num_logprobs is not None]
    plain = [row for row in asked if not seqs[row].params.processed_logprobs]
    if plain:
        found |= _score(logits, plain, plain, seqs, tokens)
    for choice in choices:
        rows = [row for row in choice.rows if row in asked and row not in plain]
        if rows:
            places = [choice.rows.index(row) for row in rows]
            found |= _score(choice.candidates.widen().logits, places, rows, seqs, tokens)
    return found


def _score(
    logits: Tensor,
    places: list[int],
    rows: list[int],
    seqs: list[Sequence],
    tokens: list[SampledToken],
) -> dict[int, Logprobs]:
    """Of `rows`, whose logits are at `places`."""
    logprobs = compute_logprobs(
        logits[upload(places, logits.device)],
        [tokens[row].token_id for row in rows],
        [seqs[row].params.num_logprobs or 0 for row in rows],
    )
    return dict(zip(rows, logprobs, strict=True))


# What comes before every step


def _edits_tokens(seq: Sequence) -> bool:
    return seq.plan.edits_tokens or _find_allowed(seq) is not None or bool(_find_biases(seq))


def _restrict(logits: Tensor, seqs: list[Sequence]) -> None:
    """Leave out what must not be generated now, and add what single tokens were given; in place."""
    allowed = {row: ids for row, seq in enumerate(seqs) if (ids := _find_allowed(seq)) is not None}
    if allowed:
        rows = range(len(seqs))
        pairs = join([np.array(allowed.get(row, ()), np.int64) for row in rows], logits.device)
        restricted = upload([row in allowed for row in rows], logits.device)
        keep_tokens(logits, *pairs, restricted)
    biases = [_find_biases(seq) for seq in seqs]
    if any(biases):
        pairs = join([np.array([*bias], np.int64) for bias in biases], logits.device)
        amounts = upload([a for bias in biases for a in bias.values()], logits.device)
        add_to_tokens(logits, *pairs, amounts)


def _find_allowed(seq: Sequence) -> tuple[int, ...] | None:
    always, first = seq.params.allowed_token_ids, seq.params.first_token_ids
    if first is None or seq.num_output_tokens:
        return always
    return first if always is None else tuple(set(first).intersection(always))


def _find_biases(seq: Sequence) -> dict[int, float]:
    params = seq.params
    biases = dict(params.logit_bias)
    is_too_short = seq.num_output_tokens < params.min_tokens
    if is_too_short or params.ban_eos:
        biases |= dict.fromkeys(seq.eos_token_ids, -math.inf)
    if is_too_short:
        biases |= dict.fromkeys(params.stop_token_ids, -math.inf)
    return biases
