"""Sequence: the state of one generation inside the engine."""

from __future__ import annotations

import copy
import random
from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from modules.engine.outputs import FinishReason
from modules.engine.prompt_lookup import PromptLookup
from modules.engine.sampler_plan import SamplerState, plan, start_state
from modules.engine.sampling_params import SamplingParams
from modules.engine.token_history import GrowingArray, Ids, TokenCounts
from modules.engine.token_rules import to_token_rules

if TYPE_CHECKING:  # it knows torch
    from modules.engine.custom_processors import LogitsProcessor
    from modules.engine.image_embeddings import PlacedImage
    from modules.engine.image_inputs import ImageInputs
    from modules.engine.low_rank import Adapter


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
    output_token_ids: tuple[int, ...] = ()
    """What has been generated already; `max_tokens` counts it."""
    negative_prompt_token_ids: tuple[int, ...] | None = None
    """What `params.guidance_scale` leads away from, at least one token; None: nothing."""
    logits_processors: tuple[LogitsProcessor, ...] = ()
    adapters: tuple[Adapter, ...] = ()
    """Their updates are added up. They must have been prepared for the engine's own layers."""
    is_background: bool = False
    """Nobody waits for it: it goes on only while nothing else is there to be generated."""
    images: tuple[ImageInputs, ...] = ()
    """Whose tokens are in the prompt, in order."""

    @property
    def num_longest_prompt_tokens(self) -> int:
        return max(len(self.prompt_token_ids), len(self.negative_prompt_token_ids or ()))


class Sequence:
    """Tokens of a prompt and its output, and how far the model has read them.

    Owned by the scheduler (status, counts); the block table belongs to the cache manager. One that
    is guided has a companion, which has another prompt and gets the same tokens.
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
        self.is_background = request.is_background
        self.adapters = request.adapters
        self.cache_salt: Hashable = tuple(adapter.number for adapter in request.adapters)
        """What keys and values depend on beside the tokens: those of another salt are of no use."""
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
        room = max_model_len - request.num_longest_prompt_tokens
        self.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        # One generator per sequence: what else runs cannot change what it draws.
        self.generator = random.Random(params.seed)
        self._uniforms: list[float] = []
        self.plan = plan(params)
        self.sampler_state = start_state(params)
        self.token_rules = to_token_rules(params, eos_token_ids)
        self.logits_processors = request.logits_processors
        self.images = request.images
        self.image_places: list[range] = []
        for group in request.images:
            start = self.image_places[-1].stop if self.image_places else 0
            self.image_places += group.find_places(self.token_ids, start)
        self.placed_images: tuple[PlacedImage, ...] = ()
        """What is read there. Only the runner knows, once it has looked."""
        # Only what a step looks at is kept.
        self.history = GrowingArray(self.token_ids) if self.plan.needs_history else None
        self.output_counts = TokenCounts() if self.plan.needs_counts else None
        num_lookup_tokens = params.prompt_lookup_num_tokens
        self.lookup = PromptLookup(num_lookup_tokens) if num_lookup_tokens > 0 else None
        self.primary: Sequence | None = None
        self.companion: Sequence | None = None
        if request.negative_prompt_token_ids is not None and not self.only_scores:
            self.companion = self._build_companion(request.negative_prompt_token_ids, max_model_len)
            self.lookup = None
        for token_id in request.output_token_ids:
            self.append(token_id)

    def _build_companion(self, prompt_token_ids: tuple[int, ...], max_model_len: int) -> Sequence:
        params = SamplingParams(max_tokens=self.max_tokens)
        request = SequenceRequest(
            self.request_id,
            prompt_token_ids,
            params,
            adapters=self.adapters,
            is_background=self.is_background,
        )
        companion = Sequence(request, max_model_len)
        companion.primary = self
        return companion

    @property
    def unit(self) -> tuple[Sequence, ...]:
        """What runs or waits together: a sequence, and its companion after it."""
        primary = self.primary or self
        return (primary, primary.companion) if primary.companion else (primary,)

    @property
    def must_look(self) -> bool:
        """It has images that have not been looked at."""
        return bool(self.images) and not self.placed_images

    @property
    def only_scores(self) -> bool:
        """It ends with its prompt."""
        return self.params.prompt_logprobs and self.max_tokens == 0

    @property
    def is_scored(self) -> bool:
        return self.num_scored_tokens == self.num_prompt_tokens

    def uniform(self, number: int = 0) -> float:
        """A random number in [0, 1) for the next token, the same however often it is tried."""
        while len(self._uniforms) <= number:
            self._uniforms.append(self.generator.random())
        return self._uniforms[number]

    def append(self, token_id: int, sampler_state: SamplerState | None = None) -> None:
        """`sampler_state` is what the sampler has learnt from that token."""
        # Of a token that a fork has drawn, this one has taken no number yet.
        for number in range(self.plan.num_uniforms):
            self.uniform(number)
        self._uniforms = []
        self.token_ids.append(token_id)
        self.sampler_state = sampler_state or self.sampler_state
        if self.history is not None:
            self.history.append(token_id)
        if self.output_counts is not None:
            self.output_counts.add(token_id)
        if self.companion is not None:
            self.companion.append(token_id)

    def read_content(self, start: int, end: int) -> tuple[int, ...]:
        """What is read at [start, end): tokens, and negative numbers where an image is."""
        content = self.token_ids[start:end]
        keys = chain.from_iterable(group.keys for group in self.images)
        for place, key in zip(self.image_places, keys, strict=True):
            own = range(max(start, place.start), min(end, place.stop))
            content[own.start - start : own.start - start + len(own)] = [-1 - key] * len(own)
        return tuple(content)

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
        """One that goes on apart, and draws the random numbers that this one would."""
        other = copy.copy(self)
        other.generator = copy.copy(self.generator)
        other._uniforms = self._uniforms.copy()
        other.token_ids = self.token_ids.copy()
        other.history = self.history and self.history.copy()
        other.output_counts = self.output_counts and self.output_counts.copy()
        return other

    @cached_property
    def prompt_vocabulary(self) -> Ids:
        """The prompt's tokens, each once."""
        return np.unique(np.array(self.token_ids[: self.num_prompt_tokens], np.int64))

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
