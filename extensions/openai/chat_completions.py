"""POST /v1/chat/completions: the assistant's next message."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from fastapi import APIRouter, Request, Response

from extensions.openai import streaming
from extensions.openai.chat_hooks import prepare_chat
from extensions.openai.chat_prompts import ChatPrompt
from extensions.openai.docs import describe_chat
from extensions.openai.leases import depend_on_lease
from extensions.openai.logprobs import ReadLogprobs, make_chat_reader, read_none
from extensions.openai.responses import (
    Envelope,
    Json,
    build_chat_chunk,
    build_chat_completion,
    build_envelope,
    build_usage_chunk,
)
from extensions.openai.sampling import (
    fill_from_preset,
    to_chat_max_tokens,
    to_negative_prompt,
    to_sampling_params,
    to_search,
    to_truncation,
)
from extensions.openai.streaming import DROPPED_MESSAGES, Answer, Chunks
from extensions.openai.typing import ChatCompletionRequest
from extensions.openai.usage import UsageCounter
from modules.context import Context
from modules.extended_generation import generate, modify_output
from modules.loaded_model import LoadedModel
from modules.models import ModelLease
from modules.settings import PROJECT_ROOT
from modules.text_generation import TextDelta, TextRequest


def add_routes(router: APIRouter, context: Context) -> None:
    leased = depend_on_lease(context)

    @router.post("/v1/chat/completions", tags=["Chat"], responses=describe_chat())
    async def create_chat_completion(
        request: Request, body: ChatCompletionRequest, lease: ModelLease = leased
    ) -> Response:
        """Reply to a conversation. With `stream`, as server-sent events."""
        answer = await answer_chat(context, lease, body)
        return await streaming.send(answer, request, body, context.settings)


async def answer_chat(
    context: Context,
    lease: ModelLease,
    body: ChatCompletionRequest,
    is_background: bool = False,
) -> Answer:
    """Raises what `ModelLease.get`, `prepare_chat` and `generate` raise."""
    model = await lease.get(body.model, body.lora)
    body = await asyncio.to_thread(fill_from_preset, body, PROJECT_ROOT)
    body, state, prompt = await prepare_chat(context, model, body)
    request = await asyncio.to_thread(_to_text_request, model, body, prompt)
    request = replace(request, is_background=is_background)
    generation = await generate(model, request, context.extensions, state, is_chat=True)
    num_dropped = prompt.num_dropped_messages
    usage = UsageCounter(generation, body.n, num_dropped)
    deltas = usage.count()
    if not body.continues:  # there, a space parts two words
        deltas = _strip_start(deltas)
    deltas = modify_output(deltas, context.extensions, state, is_chat=True)
    envelope = build_envelope("chatcmpl", model.name)
    read_logprobs = make_chat_reader(model.vocabulary) if body.logprobs else read_none
    chunks = _build_chunks(envelope, deltas, usage, body.n, read_logprobs)
    headers = {DROPPED_MESSAGES: str(num_dropped)} if num_dropped else {}
    return Answer(chunks, partial(_fold, envelope), headers)


def _to_text_request(
    model: LoadedModel, body: ChatCompletionRequest, prompt: ChatPrompt
) -> TextRequest:
    max_tokens = to_chat_max_tokens(body)
    truncation = to_truncation(body, model, max_tokens)
    return TextRequest(
        prompts=(prompt.token_ids,),
        images=prompt.images,
        params=to_sampling_params(
            body,
            model,
            max_tokens=max_tokens,
            num_logprobs=body.top_logprobs if body.logprobs else None,
        ),
        num_choices=body.n,
        stop_strings=(*body.stop, *prompt.stop_strings),
        skip_special_tokens=body.skip_special_tokens,
        min_len=body.min_length,
        # Only of the reply: the prompt has been shortened already.
        truncation=truncation and replace(truncation, num_reserved=1),
        negative_prompt=to_negative_prompt(body),
        search=to_search(body, body.n),
        max_tokens_per_second=body.max_tokens_second if body.stream else 0,
        prompt_param="messages",
    )


async def _strip_start(
    deltas: AsyncGenerator[TextDelta, None],
) -> AsyncGenerator[TextDelta, None]:
    """Leave out the spaces that a choice begins with: many templates make a model write one."""
    begun: set[int] = set()
    async with aclosing(deltas):
        async for delta in deltas:
            if delta.index in begun:
                yield delta
                continue
            text = delta.text.lstrip(" ")
            if text:
                begun.add(delta.index)
            yield replace(delta, text=text)


# Chunks


async def _build_chunks(
    envelope: Envelope,
    deltas: AsyncGenerator[TextDelta, None],
    usage: UsageCounter,
    num_choices: int,
    read_logprobs: ReadLogprobs,
) -> Chunks:
    for index in range(num_choices):
        start = {"role": "assistant", "content": "", "refusal": None}
        yield build_chat_chunk(envelope, index, start)
    async with aclosing(deltas):
        async for delta in deltas:
            logprobs = read_logprobs(delta)
            reason = delta.finish_reason
            if delta.text or (logprobs is not None and reason is None):
                content = {"content": delta.text}
                yield build_chat_chunk(envelope, delta.index, content, logprobs=logprobs)
                logprobs = None
            if reason is not None:
                yield build_chat_chunk(envelope, delta.index, {}, reason, logprobs)
    yield build_usage_chunk(envelope, "chat.completion.chunk", usage.build_usage())


async def _fold(envelope: Envelope, chunks: Chunks) -> Json:
    choices, usage = await streaming.fold(chunks, lambda choice: choice["delta"].get("content", ""))
    return build_chat_completion(envelope, choices, usage)
