"""Contrastive search: a likely token that is not too like what was said before.

Su et al. 2022, "A Contrastive Framework for Neural Text Generation". Each of the likeliest tokens
is tried out: its hidden state is compared with those of all tokens before. A client of the engine.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from modules.engine.continuations import (
    Generate,
    find_finish_reason,
    read_continuations,
    to_step_params,
)
from modules.engine.outputs import FinishReason, TokenOutput
from modules.engine.sequence import SequenceRequest

Vectors = NDArray[np.float32]
"""[number, hidden_size]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastiveOptions:
    penalty_alpha: float
    """The weight of being unlike; that of being likely is the rest of 1."""
    top_k: int
    """How many tokens are tried out."""


async def search_contrastively(
    generate: Generate,
    request: SequenceRequest,
    options: ContrastiveOptions,
    eos_token_ids: frozenset[int],
) -> AsyncGenerator[list[TokenOutput], None]:
    """Yields each token as soon as it is chosen.

    `max_tokens` must be given. What only changes how tokens are drawn, such as the temperature, is
    not applied; log-probabilities are those after all other steps.

    Ends early if the engine is told to end it. Raises GenerationFailedError and
    GenerationAbortedError.
    """
    params = replace(to_step_params(request.params, options.top_k), hidden_states=True)
    of_prompt = replace(params, prompt_logprobs=True)
    prompt = await read_continuations(generate, request, of_prompt, [()])
    if prompt is None:
        return
    (read,) = prompt
    context = _Context(_stack(read))
    before, token_ids, reason = read[-1], tuple[int, ...](), None
    while reason is None:
        tops = [top for top in before.top_logprobs if top[1] > -math.inf]
        tried = [(*token_ids, token_id) for token_id, _ in tops]
        read_all = await read_continuations(generate, request, params, tried)
        if read_all is None:
            return
        outputs = [last for (last,) in read_all]
        states = _stack(outputs)
        probs = np.exp([logprob for _, logprob in tops])
        alpha = options.penalty_alpha
        best = int(np.argmax((1 - alpha) * probs - alpha * context.find_likeness(states)))
        token_ids = tried[best]
        reason = find_finish_reason(request.params, eos_token_ids, token_ids)
        yield [_build_output(request, before, tops[best], reason)]
        context.add(states[best : best + 1])
        before = outputs[best]


def _build_output(
    request: SequenceRequest,
    before: TokenOutput,
    chosen: tuple[int, float],
    reason: FinishReason | None,
) -> TokenOutput:
    num_tops = request.params.num_logprobs
    return replace(
        before,
        request_id=request.request_id,
        token_id=chosen[0],
        finish_reason=reason,
        logprob=None if num_tops is None else chosen[1],
        top_logprobs=before.top_logprobs[: num_tops or 0],
        hidden_state=None,
    )


def _stack(outputs: list[TokenOutput]) -> Vectors:
    return np.stack([o.hidden_state for o in outputs if o.hidden_state is not None])


class _Context:
    """The hidden states of a text, as unit vectors."""

    def __init__(self, states: Vectors) -> None:
        self._units = _normalize(states)
        self._size = len(states)

    def add(self, states: Vectors) -> None:
        if self._size + len(states) > len(self._units):
            self._units = np.concatenate([self._units, np.zeros_like(self._units), states])
        self._units[self._size : self._size + len(states)] = _normalize(states)
        self._size += len(states)

    def find_likeness(self, states: Vectors) -> Vectors:
        """The highest cosine that each of `states` has with one of the text: [number]."""
        likeness: Vectors = (_normalize(states) @ self._units[: self._size].T).max(axis=1)
        return likeness


def _normalize(states: Vectors) -> Vectors:
    units: Vectors = states / np.linalg.norm(states, axis=1, keepdims=True)
    return units
