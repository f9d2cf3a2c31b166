"""Sequence: the state of one generation inside the engine."""

from __future__ import annotations

import copy
import random
from collections import Counter
from dataclasses import dataclass
from enum import Enum, auto

from modules.engine.outputs import FinishReason
from modules.engine.prompt_lookup import PromptLookup
from modules.engine.sampling_params import SamplingParams


class SequenceStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """What a caller asks of the engine: continue these token ids in that way."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = SamplingParams()


class Sequence:
    """Tokens of a prompt and its output, and how far the model has read them.

    Owned by the scheduler (status, counts); the block table belongs to the cache manager.
    """

    def __init__(
        self,
        request: SequenceRequest,
        max_model_len: int,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        params = request.params
        self.request_id = request.request_id
        self.params = params
        self.eos_token_ids = eos_token_ids
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_computed_tokens = 0
        self.num_cached_tokens: int | None = None
        """Prompt tokens that were there when it was admitted first."""
        self.num_scored_tokens = 0 if params.prompt_logprobs else self.num_prompt_tokens
        """Prompt tokens that have been reported, or need not be."""
        self.block_table: list[int] = []
        self.output_counts: Counter[int] = Counter()
        room = max_model_len - self.num_prompt_tokens
        self.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        # One generator per sequence: what else runs cannot change what it draws.
        self.generator = random.Random(params.seed)
        self._uniform: float | None = None
        num_lookup_tokens = params.prompt_lookup_num_tokens
        self.lookup = PromptLookup(num_lookup_tokens) if num_lookup_tokens > 0 else None

    @property
    def uniform(self) -> float:
        """The random number in [0, 1) that decides the next token, however often it is tried."""
        if self._uniform is None:
            self._uniform = self.generator.random()
        return self._uniform

    @property
    def only_scores(self) -> bool:
        """It ends with its prompt."""
        return self.params.prompt_logprobs and self.max_tokens == 0

    @property
    def is_scored(self) -> bool:
        return self.num_scored_tokens == self.num_prompt_tokens

    def append(self, token_id: int) -> None:
        self._uniform = None
        self.token_ids.append(token_id)
        self.output_counts[token_id] += 1

    def find_finish_reason(self) -> FinishReason | None:
        """Why the last token ends the sequence; None if it does not."""
        token_id = self.token_ids[-1]
        if token_id in self.params.stop_token_ids:
            return FinishReason.STOP
        if token_id in self.eos_token_ids and not self.params.ignore_eos:
            return FinishReason.STOP
        if self.num_output_tokens >= self.max_tokens:
            return FinishReason.LENGTH
        return None

    def fork(self) -> Sequence:
        """One that goes on apart, but draws from the same random numbers."""
        other = copy.copy(self)
        other.token_ids = self.token_ids.copy()
        other.output_counts = self.output_counts.copy()
        return other

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose keys and values are still to be computed; 1 while decoding."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED
