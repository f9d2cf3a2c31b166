"""Beam search: several continuations at a time, of which the likeliest as a whole is kept.

A client of the engine: each step asks it for one token after each beam. What is kept and when it
ends is as in transformers' `generate`, so that the results are the same.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

from modules.engine.continuations import (
    Generate,
    find_finish_reason,
    find_stop_token_ids,
    read_continuations,
    to_step_params,
)
from modules.engine.outputs import TokenOutput
from modules.engine.sampling_params import SamplingParams
from modules.engine.sequence import SequenceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamOptions:
    num_beams: int
    length_penalty: float = 1.0
    """The sum of a beam's log-probabilities is divided by its length to this power."""
    early_stopping: bool = False
    """End as soon as `num_beams` beams are complete."""


async def search_beams(
    generate: Generate,
    requests: list[SequenceRequest],
    options: BeamOptions,
    eos_token_ids: frozenset[int],
) -> AsyncGenerator[list[TokenOutput], None]:
    """Yields the outputs of the best beams when they are known, the best one's as the answer to the
    first of `requests`, which only differ in their ids.

    Their `max_tokens` must be given. What only changes how tokens are drawn, such as the
    temperature, is not applied; log-probabilities are those after all other steps.

    If the engine is told to end them, the best ones until then. Raises GenerationFailedError and
    GenerationAbortedError.
    """
    first = requests[0]
    num_stop_token_ids = len(find_stop_token_ids(first.params, eos_token_ids))
    # Those that go on, and those that end.
    params = to_step_params(first.params, options.num_beams + num_stop_token_ids)
    search = _Search(options, first.params, eos_token_ids)
    while search.live:
        beams = [beam.token_ids for beam in search.live]
        outputs = await read_continuations(generate, first, params, beams)
        if outputs is None:
            break
        search.advance([output for (output,) in outputs])
    best = search.complete or search.live
    for rank, request in enumerate(requests):
        beam = best[min(rank, len(best) - 1)]
        yield [replace(output, request_id=request.request_id) for output in beam.outputs]


@dataclass(frozen=True, slots=True)
class _Beam:
    outputs: tuple[TokenOutput, ...] = ()
    sum_logprobs: float = 0.0

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(output.token_id for output in self.outputs)


class _Search:
    """The beams of one prompt."""

    def __init__(
        self, options: BeamOptions, params: SamplingParams, eos_token_ids: frozenset[int]
    ) -> None:
        self._options = options
        self._params = params
        self._eos_token_ids = eos_token_ids
        self.live = [_Beam()]
        self.complete: list[_Beam] = []
        """The best ones, the best first."""

    def advance(self, outputs: list[TokenOutput]) -> None:
        """`outputs`: one for each live beam, in order, with the tokens that may come next."""
        num_beams = self._options.num_beams
        candidates = [
            (beam.sum_logprobs + logprob, beam, output, token_id, logprob)
            for beam, output in zip(self.live, outputs, strict=True)
            for token_id, logprob in output.top_logprobs
            if logprob > -math.inf
        ]
        num_ending = len(self.live) * len(find_stop_token_ids(self._params, self._eos_token_ids))
        best = heapq.nlargest(num_beams + num_ending, candidates, key=lambda c: c[0])
        beams = [self._extend(*candidate) for candidate in best]
        self.live = [beam for beam in beams if not _is_complete(beam)][:num_beams]
        self.complete += [beam for beam in beams[:num_beams] if _is_complete(beam)]
        self.complete.sort(key=self._score, reverse=True)
        del self.complete[num_beams:]
        if self._is_over():
            self.live = []

    def _extend(
        self, total: float, beam: _Beam, output: TokenOutput, token_id: int, logprob: float
    ) -> _Beam:
        reason = find_finish_reason(self._params, self._eos_token_ids, (*beam.token_ids, token_id))
        num_tops = self._params.num_logprobs
        output = replace(
            output,
            token_id=token_id,
            finish_reason=reason,
            logprob=None if num_tops is None else logprob,
            top_logprobs=output.top_logprobs[: num_tops or 0],
        )
        return _Beam((*beam.outputs, output), total)

    def _score(self, beam: _Beam) -> float:
        """Sorts as the sum of log-probabilities over length to the power of the penalty, which may
        be beyond every number: minus the logarithm of minus that.
        """
        if beam.sum_logprobs >= 0:
            return math.inf
        length = math.log(len(beam.outputs))
        return self._options.length_penalty * length - math.log(-beam.sum_logprobs)

    def _is_over(self) -> bool:
        """No better beam is to be expected; exact only where longer ones do not score higher."""
        if not self.live or len(self.complete) < self._options.num_beams:
            return not self.live
        return self._options.early_stopping or (
            self._score(self.live[0]) <= self._score(self.complete[-1])
        )


def _is_complete(beam: _Beam) -> bool:
    return beam.outputs[-1].finish_reason is not None
