"""text_generation with extensions around it: they may change what is read, how tokens are chosen
and what is answered.

Knows neither HTTP nor chats. A request that no extension has a hook for goes straight through.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modules import text_generation
from modules.engine.custom_processors import LogitsProcessor
from modules.errors import HookError
from modules.extensions import Extensions
from modules.hooks import State, blame
from modules.loaded_model import LoadedModel
from modules.text_generation import Generation, TextDelta, TextRequest, TokenIds
from modules.written_replies import REPLY_HOOK, write_replies

PROCESSORS_HOOK = "logits_processor_modifier"
HOOKS = ("input_modifier", "tokenizer_modifier", PROCESSORS_HOOK, REPLY_HOOK)


async def generate(
    model: LoadedModel,
    request: TextRequest,
    extensions: Extensions,
    state: State,
    is_chat: bool = False,
) -> Generation:
    """As `text_generation.generate`. A chat's input has been modified where its prompt was made.

    Raises what that raises, and HookError.
    """
    if not extensions.has(*HOOKS):
        return await text_generation.generate(model, request)
    hooked = _Hooked(model, extensions, state, is_chat)
    modified = request if is_chat else await hooked.modify_input(request)
    written = await write_replies(model, modified, request.prompts, extensions, state, is_chat)
    return written or await text_generation.generate(model, hooked.add_editors(modified))


def modify_output(
    deltas: AsyncGenerator[TextDelta, None],
    extensions: Extensions,
    state: State,
    is_chat: bool = False,
) -> AsyncGenerator[TextDelta, None]:
    """Where an extension modifies replies, each of them in one delta, once it is finished."""
    if not extensions.has("output_modifier"):
        return deltas
    return _modify_output(deltas, extensions, state, is_chat)


async def _modify_output(
    deltas: AsyncGenerator[TextDelta, None], extensions: Extensions, state: State, is_chat: bool
) -> AsyncGenerator[TextDelta, None]:
    parts: dict[int, list[TextDelta]] = {}
    async with aclosing(deltas):
        async for delta in deltas:
            if any(output.is_prompt for output in delta.outputs):
                yield delta
                continue
            parts.setdefault(delta.index, []).append(delta)
            if delta.finish_reason is not None:
                whole = _join(parts.pop(delta.index))
                future = extensions.chain("output_modifier", whole.text, state, is_chat)
                yield replace(whole, text=await asyncio.wrap_future(future))


@dataclass(frozen=True, slots=True)
class _Hooked:
    """The hooks of one request."""

    model: LoadedModel
    extensions: Extensions
    state: State
    is_chat: bool

    async def modify_input(self, request: TextRequest) -> TextRequest:
        """Prompts that are token ids stay as they are."""
        if not self.extensions.has("input_modifier"):
            return request
        prompts = [
            await self._modify(prompt) if isinstance(prompt, str) else prompt
            for prompt in request.prompts
        ]
        return replace(request, prompts=tuple(prompts))

    async def _modify(self, prompt: str) -> str:
        future = self.extensions.chain("input_modifier", prompt, self.state, self.is_chat)
        modified: str = await asyncio.wrap_future(future)
        return modified

    def add_editors(self, request: TextRequest) -> TextRequest:
        if self.extensions.has("tokenizer_modifier"):
            request = replace(request, edit_tokens=self._edit_tokens)
        if self.extensions.has(PROCESSORS_HOOK):
            request = replace(request, make_logits_processors=self._make_logits_processors)
        return request

    def _edit_tokens(self, prompt: str | TokenIds, token_ids: TokenIds) -> TokenIds:
        def find_fault(text: str, edited: Any, embeds: Any) -> str | None:
            if embeds is not None:
                return "it returned embeddings, which this server does not read"
            return _find_fault(edited, self.model.vocab_size)

        text = prompt if isinstance(prompt, str) else self.model.decode(prompt, False)
        args = (self.state, text, torch.tensor([token_ids]), None)
        _, edited, _ = self.extensions.chain("tokenizer_modifier", *args, check=find_fault).result()
        return tuple(torch.as_tensor(edited).flatten().tolist())

    def _make_logits_processors(self, token_ids: TokenIds) -> tuple[LogitsProcessor, ...]:
        prompt = torch.tensor([token_ids])
        make_list = partial(ProcessorList, self.model)
        found = self.extensions.collect(PROCESSORS_HOOK, prompt, make_list=make_list).result()
        return tuple(_Processor(*item) for item in found)


class ProcessorList(list[Any]):
    """What `logits_processor_modifier` adds to."""

    def __init__(self, model: LoadedModel) -> None:
        super().__init__()
        self.model = model
        """The one that is going to reply."""


def _find_fault(edited: Any, vocab_size: int) -> str | None:
    """What is wrong with token ids, [n] or [1, n], in a tensor or in lists."""
    try:
        ids = torch.as_tensor(edited)
    except (RuntimeError, TypeError, ValueError):
        return "it returned no token ids"
    is_one_text = ids.dim() == 1 or (ids.dim() == 2 and len(ids) == 1)
    if not is_one_text or ids.dtype not in (torch.int64, torch.int32) or not ids.numel():
        return "it returned no token ids of one text"
    if ids.min() < 0 or ids.max() >= vocab_size:
        return f"it returned a token id outside the model's vocabulary of {vocab_size}"
    return None


@dataclass(frozen=True, slots=True)
class _Processor:
    """A logits processor and whose it is."""

    extension: str
    process: Callable[[Tensor, Tensor], Any]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        with blame(self.extension, PROCESSORS_HOOK):
            processed = self.process(input_ids, scores)
        if not isinstance(processed, Tensor) or processed.shape != scores.shape:
            reason = "a processor returned no scores for each token"
            raise HookError(self.extension, PROCESSORS_HOOK, reason)
        if not (processed < torch.inf).all():  # of NaN that is not true either
            raise HookError(self.extension, PROCESSORS_HOOK, "a processor returned no numbers")
        return processed


def _join(parts: list[TextDelta]) -> TextDelta:
    return replace(
        parts[-1],
        text="".join(part.text for part in parts),
        outputs=tuple(output for part in parts for output in part.outputs),
        num_repeated_chars=parts[0].num_repeated_chars,
    )
