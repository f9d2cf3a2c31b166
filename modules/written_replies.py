"""Replies that an extension writes in the model's place, as a generation like any other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing

from modules.detokenizer import IncrementalDetokenizer
from modules.engine.outputs import FinishReason, TokenOutput
from modules.errors import InvalidRequestError
from modules.extensions import Extensions
from modules.hooks import State
from modules.loaded_model import LoadedModel
from modules.prompt_tokens import encode_prompt
from modules.text_generation import Generation, TextDelta, TextRequest, TokenIds

REPLY_HOOK = "custom_generate_reply"

Prompt = str | TokenIds
Texts = Generator[str, None, None]
"""A reply so far, longer each time; it runs in the hooks' thread."""


async def write_replies(
    model: LoadedModel,
    request: TextRequest,
    original_prompts: Sequence[Prompt],
    extensions: Extensions,
    state: State,
    is_chat: bool,
) -> Generation | None:
    """None if no extension writes them. Raises HookError, and InvalidRequestError where there must
    be log-probabilities.
    """
    if not extensions.has(REPLY_HOOK) or request.params.max_tokens == 0:
        return None
    replies = []
    for prompt, original in zip(request.prompts, original_prompts, strict=True):
        question, asked = (_to_text(model, text) for text in (prompt, original))
        for choice in range(request.num_choices):
            seed = -1 if request.params.seed is None else request.params.seed + choice
            args = (question, asked, seed, state, [*request.stop_strings], is_chat)
            replies.append(await asyncio.wrap_future(extensions.first(REPLY_HOOK, *args)))
    if None in replies:
        return None
    if request.params.num_logprobs is not None:
        message = "The reply is written by an extension, which knows no probabilities."
        raise InvalidRequestError(message, "logprobs")
    prompts = await asyncio.to_thread(_encode, model, request)
    return Generation(prompts, _write_all(model, request, extensions, replies))


def _to_text(model: LoadedModel, prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else model.decode(prompt, skip_special_tokens=False)


def _encode(model: LoadedModel, request: TextRequest) -> tuple[TokenIds, ...]:
    return tuple(
        encode_prompt(model, prompt, request.add_bos_token).token_ids for prompt in request.prompts
    )


async def _write_all(
    model: LoadedModel, request: TextRequest, extensions: Extensions, replies: Sequence[Texts]
) -> AsyncGenerator[TextDelta, None]:
    """One choice after the other. The last delta of each brings its tokens, to be counted."""
    for index, texts in enumerate(replies):
        whole = ""
        async with aclosing(_write(texts, request.stop_strings, extensions)) as pieces:
            async for piece in pieces:
                whole += piece
                yield TextDelta(index, piece, ())
        token_ids = await asyncio.to_thread(model.encode, whole, False)
        outputs = tuple(TokenOutput("", token_id) for token_id in token_ids)
        yield TextDelta(index, "", outputs, FinishReason.STOP)


async def _write(
    texts: Texts, stop_strings: Sequence[str], extensions: Extensions
) -> AsyncGenerator[str, None]:
    """What is new, piece by piece, up to a stop string."""
    pieces = _Pieces()
    detokenizer = IncrementalDetokenizer(pieces, stop_strings=stop_strings)
    try:
        while not detokenizer.is_stopped:
            whole = await asyncio.wrap_future(extensions.submit(next, texts, None))
            if whole is None:
                break
            if piece := detokenizer.add(pieces.add(whole)):
                yield piece
    finally:
        extensions.submit(texts.close)
    if rest := detokenizer.finish():
        yield rest


class _Pieces:
    """A text that grows, for a detokenizer: its tokens are the pieces that were added."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._num_chars = 0

    def add(self, whole: str) -> int:
        """The token of what is new in `whole`; what was there before cannot be taken back."""
        self._pieces.append(whole[self._num_chars :])
        self._num_chars = max(self._num_chars, len(whole))
        return len(self._pieces) - 1

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return "".join(self._pieces[token_id] for token_id in token_ids)
