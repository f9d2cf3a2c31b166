"""From prompts to a stream of text: encode, fit into the context, run the engine, detokenize, stop
strings.

Knows neither HTTP nor how tokens are chosen. What can be refused is refused before anything is
iterated.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from modules.detokenizer import IncrementalDetokenizer
from modules.engine.contrastive_search import ContrastiveOptions
from modules.engine.custom_processors import LogitsProcessor
from modules.engine.image_inputs import ImageInputs
from modules.engine.outputs import FinishReason, TokenOutput
from modules.engine.sampling_params import SamplingParams
from modules.engine.searches import SearchOptions, search
from modules.engine.sequence import SequenceRequest
from modules.errors import (
    ContextLengthExceededError,
    GenerationAbortedError,
    GenerationFailedError,
    InvalidRequestError,
)
from modules.fill_in_the_middle import enclose, find_fim_tokens
from modules.loaded_model import LoadedModel
from modules.prompt_tokens import EncodedPrompt, Truncation, encode_prompt
from modules.token_healing import heal

TokenIds = tuple[int, ...]

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
    add_bos_token: bool = True
    """False: texts lose the beginning-of-sequence tokens that they begin with."""
    skip_special_tokens: bool = True
    min_len: int = 0
    """Prompt and reply together do not end before so many tokens."""
    truncation: Truncation | None = None
    """None: a prompt that leaves no room is refused."""
    heals_tokens: bool = False
    """Texts only: read a text without its last token, which the reply must begin with."""
    suffix: str = ""
    """What comes after the reply, if it is to fill in the middle."""
    negative_prompt: str | None = None
    """What `params.guidance_scale` leads away from; empty: the prompt's last token."""
    search: SearchOptions | None = None
    is_background: bool = False
    """Nobody waits for it: it goes on only while nothing else is there to be generated."""
    max_tokens_per_second: int = 0
    """Of each choice; 0: as fast as they come."""
    prompt_param: str = "prompt"
    """Wire name of the field that the prompts came from, for errors."""
    edit_tokens: Callable[[str | TokenIds, TokenIds], TokenIds] | None = None
    """Given a prompt and its tokens, what is read in their place. Called in a thread."""
    make_logits_processors: Callable[[TokenIds], tuple[LogitsProcessor, ...]] | None = None
    """Given a prompt's tokens, what changes the logits of one choice. Called in a thread."""
    images: tuple[ImageInputs, ...] = ()
    """Of the prompt, which is then one of token ids: those of its images are in it."""


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
    num_repeated_chars: int = 0
    """With so many characters of the prompt's end do these tokens begin; the text does not."""


@dataclass(frozen=True, slots=True)
class Generation:
    """An accepted generation. It starts with the first look at `deltas`; closing them ends it."""

    prompt_token_ids: tuple[tuple[int, ...], ...]
    """One tuple per prompt, as the model reads it."""
    deltas: AsyncGenerator[TextDelta, None]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompt_token_ids))


@dataclass(frozen=True, slots=True)
class _Prompt:
    """What the engine is asked for."""

    token_ids: tuple[int, ...]
    params: SamplingParams
    num_repeated_chars: int = 0
    """So much of the prompt's text does the reply begin with."""
    negative_token_ids: tuple[int, ...] | None = None
    logits_processors: tuple[tuple[LogitsProcessor, ...], ...] = ()
    """Of each choice, if there are any."""


async def generate(model: LoadedModel, request: TextRequest) -> Generation:
    """Accept `request`, or raise.

    Raises:
        InvalidRequestError: a prompt is empty or holds a token id outside the vocabulary, or the
            model cannot fill in the middle, or not score a prompt.
        ContextLengthExceededError: a prompt leaves no room for a reply.
        EngineDeadError: nothing can be generated any more.
    """
    model.engine.check_health()
    if isinstance(request.search, ContrastiveOptions) and not model.continues_prompt:
        raise InvalidRequestError("Contrastive search is not for this model.", "penalty_alpha")
    if request.params.prompt_logprobs and not model.continues_prompt:
        message = "This model's reply is a text of its own: it gives its prompt no probabilities."
        raise InvalidRequestError(message, "echo")
    if request.params.prompt_logprobs and request.search is not None:
        raise InvalidRequestError("A search does not score its prompt.", "echo")
    prompts = tuple([await _prepare(model, prompt, request) for prompt in request.prompts])
    deltas = _generate_text(model, prompts, request)
    if request.max_tokens_per_second:
        deltas = _pace(deltas, request.max_tokens_per_second)
    return Generation(tuple(prompt.token_ids for prompt in prompts), deltas)


async def _prepare(
    model: LoadedModel, prompt: str | tuple[int, ...], request: TextRequest
) -> _Prompt:
    num_chars = len(prompt) + len(request.suffix) + len(request.negative_prompt or "")
    is_quick = num_chars < MAX_INLINE_ENCODE_CHARS and not request.heals_tokens
    if is_quick and request.edit_tokens is None and request.make_logits_processors is None:
        return _to_prompt(model, prompt, request)
    return await asyncio.to_thread(_to_prompt, model, prompt, request)


def _to_prompt(model: LoadedModel, prompt: str | tuple[int, ...], request: TextRequest) -> _Prompt:
    params = request.params
    encoded = encode_prompt(model, prompt, request.add_bos_token)
    if request.suffix:
        fim_tokens = find_fim_tokens(model)
        encoded = enclose(model, fim_tokens, encoded, request.suffix)
        stops = (*params.stop_token_ids, *fim_tokens.ends)
        params = replace(params, stop_token_ids=tuple(dict.fromkeys(stops)))
    max_len = _find_max_len(model, request)
    if request.truncation is not None:
        max_len = min(max_len, request.truncation.max_len)
        encoded = encoded.cut(request.truncation.max_prompt_len)
    if request.edit_tokens is not None:
        encoded = EncodedPrompt(request.edit_tokens(prompt, encoded.token_ids))
    if request.images and encoded.token_ids != prompt:
        message = "The prompt has images: it can be neither cut nor changed."
        raise InvalidRequestError(message, request.prompt_param)
    _check(model, encoded.token_ids, max_len, request.prompt_param)
    negative = _encode_negative(model, request, max_len)
    num_longest = max(len(encoded.token_ids), len(negative or ()))
    room = max_len - (num_longest if model.continues_prompt else 1)
    params = _fit_params(model, params, len(encoded.token_ids), request, room)
    accepted = _Prompt(encoded.token_ids, params)
    is_healed = request.heals_tokens and isinstance(prompt, str) and params.max_tokens != 0
    if is_healed and model.continues_prompt:
        accepted = _heal(model, encoded.token_ids, params, request.skip_special_tokens)
    if negative is not None:
        accepted = replace(accepted, negative_token_ids=negative or accepted.token_ids[-1:])
    return _add_logits_processors(accepted, request)


def _find_max_len(model: LoadedModel, request: TextRequest) -> int:
    if request.negative_prompt is not None and model.max_guided_len is not None:
        return model.max_guided_len
    return model.max_model_len


def _encode_negative(
    model: LoadedModel, request: TextRequest, max_len: int
) -> tuple[int, ...] | None:
    """Of an empty one, nothing."""
    if not request.negative_prompt:
        return None if request.negative_prompt is None else ()
    encoded = encode_prompt(model, request.negative_prompt, request.add_bos_token)
    _check(model, encoded.token_ids, max_len, "negative_prompt")
    return encoded.token_ids


def _fit_params(
    model: LoadedModel,
    params: SamplingParams,
    num_prompt_tokens: int,
    request: TextRequest,
    room: int,
) -> SamplingParams:
    """Limits on prompt and reply together become limits on the reply, which has `room`."""
    if request.min_len:
        num_counted = num_prompt_tokens if model.continues_prompt else 0
        params = replace(params, min_tokens=max(params.min_tokens, request.min_len - num_counted))
    if request.truncation is not None or request.search is not None:
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        params = replace(params, max_tokens=max_tokens)
    return params


def _heal(
    model: LoadedModel,
    token_ids: tuple[int, ...],
    params: SamplingParams,
    skip_special_tokens: bool,
) -> _Prompt:
    healed = heal(model, token_ids, params, skip_special_tokens)
    if healed is None:
        return _Prompt(token_ids, params)
    params = replace(params, first_token_ids=healed.first_token_ids)
    return _Prompt(healed.token_ids, params, healed.num_repeated_chars)


def _add_logits_processors(prompt: _Prompt, request: TextRequest) -> _Prompt:
    make = request.make_logits_processors
    if make is None:
        return prompt
    processors = tuple(make(prompt.token_ids) for _ in range(request.num_choices))
    return replace(prompt, logits_processors=processors)


def _check(model: LoadedModel, prompt_token_ids: tuple[int, ...], max_len: int, param: str) -> None:
    if not prompt_token_ids:
        raise InvalidRequestError("The prompt is empty: it has no tokens.", param)
    model.check_token_ids(prompt_token_ids, param)
    if len(prompt_token_ids) >= max_len:
        raise ContextLengthExceededError(max_len, len(prompt_token_ids), param)


async def _generate_text(
    model: LoadedModel, prompts: tuple[_Prompt, ...], request: TextRequest
) -> AsyncGenerator[TextDelta, None]:
    choices = _build_choices(model, prompts, request)
    if request.params.max_tokens == 0 and not request.params.prompt_logprobs:
        for choice in choices.values():
            yield TextDelta(choice.index, "", (), FinishReason.LENGTH)
        return
    for group in _group_by_run(list(choices.values()), request):
        async with aclosing(_run(model, group, request)) as deltas:
            async for delta in deltas:
                yield delta
    for choice in choices.values():
        if not choice.is_finished:  # the engine was told to end it
            yield choice.finish()


def _group_by_run(choices: list[_Choice], request: TextRequest) -> list[list[_Choice]]:
    """The engine takes all choices at once, a search those of one prompt."""
    size = len(choices) if request.search is None else request.num_choices
    return [choices[start : start + size] for start in range(0, len(choices), size)]


async def _run(
    model: LoadedModel, group: list[_Choice], request: TextRequest
) -> AsyncGenerator[TextDelta, None]:
    choices = {choice.request.request_id: choice for choice in group}
    async with aclosing(_start(model, [choice.request for choice in group], request)) as steps:
        async for outputs in steps:
            for choice, choice_outputs in _group_by_choice(choices, outputs):
                for delta in (choice.read_prompt(choice_outputs), choice.read(choice_outputs)):
                    if choice.detokenizer.is_stopped:
                        model.engine.abort(choice.request.request_id)
                    if delta is not None:
                        yield delta
            if all(choice.detokenizer.is_stopped for choice in group):
                return


def _start(
    model: LoadedModel, sequences: list[SequenceRequest], request: TextRequest
) -> AsyncGenerator[list[TokenOutput], None]:
    if request.search is None:
        return model.engine.generate(sequences)
    return search(model.engine.generate, sequences, request.search, model.eos_token_ids)


async def _pace(
    deltas: AsyncGenerator[TextDelta, None], max_tokens_per_second: int
) -> AsyncGenerator[TextDelta, None]:
    """Hold each choice's tokens back until they are due, counted from the first delta of all."""
    num_sent: Counter[int] = Counter()
    start = None
    async with aclosing(deltas):
        async for delta in deltas:
            now = asyncio.get_running_loop().time()
            start = now if start is None else start
            due = start + num_sent[delta.index] / max_tokens_per_second
            await asyncio.sleep(max(0.0, due - now))
            num_sent[delta.index] += sum(not output.is_prompt for output in delta.outputs)
            yield delta


def _build_choices(
    model: LoadedModel, prompts: tuple[_Prompt, ...], request: TextRequest
) -> dict[str, _Choice]:
    group_id = uuid.uuid4().hex
    choices = {}
    for prompt_index, prompt in enumerate(prompts):
        for choice_index in range(request.num_choices):
            index = prompt_index * request.num_choices + choice_index
            request_id = f"{group_id}-{index}"
            context = prompt.token_ids if model.continues_prompt else ()
            detokenizer = IncrementalDetokenizer(
                model,
                context,
                request.stop_strings,
                request.skip_special_tokens,
                prompt.num_repeated_chars,
            )
            params = _derive_seed(prompt.params, choice_index)
            processors = prompt.logits_processors
            sequence = SequenceRequest(
                request_id,
                prompt.token_ids,
                params,
                negative_prompt_token_ids=prompt.negative_token_ids,
                logits_processors=processors[choice_index] if processors else (),
                adapters=model.applied_adapters,
                is_background=request.is_background,
                images=request.images,
            )
            choices[request_id] = _Choice(index, sequence, detokenizer, prompt.num_repeated_chars)
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
        self,
        index: int,
        request: SequenceRequest,
        detokenizer: IncrementalDetokenizer,
        num_repeated_chars: int,
    ) -> None:
        self.index = index
        self.request = request
        self.detokenizer = detokenizer
        self.is_finished = False
        self._num_repeated = num_repeated_chars
        self._unsent: list[TokenOutput] = []
        self._scored: list[TokenOutput] = []

    def read_prompt(self, outputs: list[TokenOutput]) -> TextDelta | None:
        """The delta of the prompt's tokens, which has no text, once all of them are scored."""
        self._scored += [output for output in outputs if output.is_prompt]
        if len(self._scored) < len(self.request.prompt_token_ids):
            return None
        scored, self._scored = self._scored, []
        finish_reason = scored[-1].finish_reason
        self.is_finished = finish_reason is not None
        return TextDelta(self.index, "", tuple(scored), finish_reason)

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
                raise output.error or GenerationFailedError
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
        return self._send(text, finish_reason)

    def finish(self) -> TextDelta:
        """The last delta of a sequence that the engine does not go on with."""
        return self._send(self.detokenizer.finish(), FinishReason.STOP)

    def _send(self, text: str, finish_reason: FinishReason | None) -> TextDelta:
        self.is_finished = finish_reason is not None
        sent, self._unsent = self._unsent, []
        num_repeated, self._num_repeated = self._num_repeated, 0
        return TextDelta(self.index, text, tuple(sent), finish_reason, num_repeated)
