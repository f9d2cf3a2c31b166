"""From prompts to a stream of text: encode, check the length, run the engine, detokenize, stop
strings.

Knows neither HTTP nor how tokens are chosen. What can be refused is refused before anything is
iterated.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

from modules.detokenizer import IncrementalDetokenizer
from modules.engine.outputs import FinishReason, TokenOutput
from modules.engine.sampling_params import SamplingParams
from modules.engine.sequence import SequenceRequest
from modules.errors import (
    ContextLengthExceededError,
    GenerationAbortedError,
    GenerationFailedError,
    InvalidRequestError,
)
from modules.models import LoadedModel

# Encoding a text of this many characters takes about as long as handing it to a thread.
MAX_INLINE_ENCODE_CHARS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    prompts: tuple[str | tuple[int, ...], ...]
    """Texts, or token ids of the model's own."""
    params: SamplingParams
    num_choices: int = 1
    """Generations per prompt."""
    stop_strings: tuple[str, ...] = ()
    add_special_tokens: bool = True
    """False for a rendered chat template, which already spells them out."""
    skip_special_tokens: bool = True
    prompt_param: str = "prompt"
    """Wire name of the field that the prompts came from, for errors."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of one choice, and the tokens that were read since the last delta of that choice.

    Tokens end with the one that completed a stop string, so they may say more than the text. Where
    a prompt is scored, its tokens come first, in a delta of their own that has no text.
    """

    index: int
    """prompt index × num_choices + choice."""
    text: str
    outputs: tuple[TokenOutput, ...]
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """An accepted generation. It starts with the first look at `deltas`; closing them ends it."""

    prompt_token_ids: tuple[tuple[int, ...], ...]
    """One tuple per prompt, as the model reads it."""
    deltas: AsyncGenerator[TextDelta, None]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompt_token_ids))


async def generate(model: LoadedModel, request: TextRequest) -> Generation:
    """Accept `request`, or raise.

    Raises:
        InvalidRequestError: a prompt is empty or holds a token id outside the vocabulary; or it is
            to be scored, and the model cannot do that.
        ContextLengthExceededError: a prompt leaves no room for a reply.
        EngineDeadError: nothing can be generated any more.
    """
    model.engine.check_health()
    if request.params.prompt_logprobs and not model.continues_prompt:
        message = "This model's reply is a text of its own: it gives its prompt no probabilities."
        raise InvalidRequestError(message, "echo")
    prompts = tuple([await _encode(model, prompt, request) for prompt in request.prompts])
    for prompt_token_ids in prompts:
        _check(model, prompt_token_ids, request.prompt_param)
    return Generation(prompts, _generate_text(model, prompts, request))


async def _encode(
    model: LoadedModel, prompt: str | tuple[int, ...], request: TextRequest
) -> tuple[int, ...]:
    if not isinstance(prompt, str):
        return prompt
    if len(prompt) < MAX_INLINE_ENCODE_CHARS:
        return model.encode(prompt, request.add_special_tokens)
    return await asyncio.to_thread(model.encode, prompt, request.add_special_tokens)


def _check(model: LoadedModel, prompt_token_ids: tuple[int, ...], param: str) -> None:
    if not prompt_token_ids:
        raise InvalidRequestError("The prompt is empty: it has no tokens.", param)
    unknown = next((i for i in prompt_token_ids if not 0 <= i < model.vocab_size), None)
    if unknown is not None:
        raise InvalidRequestError(
            f"Token id {unknown} is outside the model's vocabulary of {model.vocab_size}.", param
        )
    if len(prompt_token_ids) >= model.max_model_len:
        raise ContextLengthExceededError(model.max_model_len, len(prompt_token_ids), param)


async def _generate_text(
    model: LoadedModel, prompts: tuple[tuple[int, ...], ...], request: TextRequest
) -> AsyncGenerator[TextDelta, None]:
    choices = _build_choices(model, prompts, request)
    if request.params.max_tokens == 0 and not request.params.prompt_logprobs:
        for choice in choices.values():
            yield TextDelta(choice.index, "", (), FinishReason.LENGTH)
        return
    sequences = [choice.request for choice in choices.values()]
    async with aclosing(model.engine.generate(sequences)) as steps:
        async for outputs in steps:
            for choice, choice_outputs in _group_by_choice(choices, outputs):
                for delta in (choice.read_prompt(choice_outputs), choice.read(choice_outputs)):
                    if choice.detokenizer.is_stopped:
                        model.engine.abort(choice.request.request_id)
                    if delta is not None:
                        yield delta


def _build_choices(
    model: LoadedModel, prompts: tuple[tuple[int, ...], ...], request: TextRequest
) -> dict[str, _Choice]:
    group_id = uuid.uuid4().hex
    choices = {}
    for prompt_index, prompt_token_ids in enumerate(prompts):
        for choice_index in range(request.num_choices):
            index = prompt_index * request.num_choices + choice_index
            request_id = f"{group_id}-{index}"
            context = prompt_token_ids if model.continues_prompt else ()
            detokenizer = IncrementalDetokenizer(
                model, context, request.stop_strings, request.skip_special_tokens
            )
            params = _derive_seed(request.params, choice_index)
            sequence = SequenceRequest(request_id, prompt_token_ids, params)
            choices[request_id] = _Choice(index, sequence, detokenizer)
    return choices


def _derive_seed(params: SamplingParams, choice_index: int) -> SamplingParams:
    """The first choice draws what a single one would; each other has a seed of its own."""
    if params.seed is None or choice_index == 0:
        return params
    return replace(params, seed=params.seed + choice_index)


def _group_by_choice(
    choices: dict[str, _Choice], outputs: list[TokenOutput]
) -> list[tuple[_Choice, list[TokenOutput]]]:
    grouped: dict[str, list[TokenOutput]] = {}
    for output in outputs:
        grouped.setdefault(output.request_id, []).append(output)
    return [(choices[request_id], group) for request_id, group in grouped.items()]


class _Choice:
    """One sequence on its way to text."""

    def __init__(
        self, index: int, request: SequenceRequest, detokenizer: IncrementalDetokenizer
    ) -> None:
        self.index = index
        self.request = request
        self.detokenizer = detokenizer
        self._unsent: list[TokenOutput] = []
        self._scored: list[TokenOutput] = []

    def read_prompt(self, outputs: list[TokenOutput]) -> TextDelta | None:
        """The delta of the prompt's tokens, which has no text, once all of them are scored."""
        self._scored += [output for output in outputs if output.is_prompt]
        if len(self._scored) < len(self.request.prompt_token_ids):
            return None
        scored, self._scored = self._scored, []
        return TextDelta(self.index, "", tuple(scored), scored[-1].finish_reason)

    def read(self, outputs: list[TokenOutput]) -> TextDelta | None:
        """The delta that these tokens make; None while all of their text is held back."""
        if self.detokenizer.is_stopped:
            return None  # of a step that was already running when the stop string was found
        text = ""
        finish_reason = None
        for output in outputs:
            if output.is_prompt:
                continue
            if output.finish_reason is FinishReason.ABORT:
                raise GenerationAbortedError("The server ended this generation.")
            if output.finish_reason is FinishReason.ERROR:
                raise GenerationFailedError
            self._unsent.append(output)
            finish_reason = output.finish_reason
            # The token that ends a sequence is not part of its text.
            if finish_reason is not FinishReason.STOP:
                text += self.detokenizer.add(output.token_id)
            if finish_reason is not None:
                text += self.detokenizer.finish()
            if self.detokenizer.is_stopped:
                finish_reason = FinishReason.STOP
                break
        if not text and finish_reason is None:
            return None
        sent, self._unsent = self._unsent, []
        return TextDelta(self.index, text, tuple(sent), finish_reason)
