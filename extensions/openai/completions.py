"""POST /v1/completions: continues texts or token ids."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from fastapi import APIRouter, Request, Response

from extensions.openai import streaming
from extensions.openai.docs import describe_completion
from extensions.openai.hooks import modify_state
from extensions.openai.leases import depend_on_lease
from extensions.openai.logprobs import ReadLogprobs, make_text_reader, read_none
from extensions.openai.responses import (
    Envelope,
    Json,
    build_envelope,
    build_text_chunk,
    build_text_completion,
    build_usage_chunk,
)
from extensions.openai.sampling import (
    fill_from_preset,
    to_max_tokens,
    to_negative_prompt,
    to_sampling_params,
    to_search,
    to_truncation,
)
from extensions.openai.streaming import Answer, Chunks
from extensions.openai.typing import CompletionRequest
from extensions.openai.usage import UsageCounter
from modules.context import Context
from modules.extended_generation import generate, modify_output
from modules.loaded_model import LoadedModel
from modules.models import ModelLease
from modules.settings import PROJECT_ROOT
from modules.text_generation import TextDelta, TextRequest


def add_routes(router: APIRouter, context: Context) -> None:
    leased = depend_on_lease(context)

    @router.post("/v1/completions", tags=["Completions"], responses=describe_completion())
    async def create_completion(
        request: Request, body: CompletionRequest, lease: ModelLease = leased
    ) -> Response:
        """Continue a text, or several. With `stream`, as server-sent events."""
        answer = await answer_completion(context, lease, body)
        return await streaming.send(answer, request, body, context.settings)


async def answer_completion(
    context: Context, lease: ModelLease, body: CompletionRequest, is_background: bool = False
) -> Answer:
    """Raises what `ModelLease.get` and `generate` raise."""
    model = await lease.get(body.model, body.lora)
    # In a thread: a file may have to be read, and the first search for tokens takes a while.
    body = await asyncio.to_thread(fill_from_preset, body, PROJECT_ROOT)
    body, state = await modify_state(context.extensions, body, model)
    request = await asyncio.to_thread(_to_text_request, model, body)
    request = replace(request, is_background=is_background)
    generation = await generate(model, request, context.extensions, state)
    usage = UsageCounter(generation, body.num_candidates)
    deltas = usage.count()
    if body.num_candidates > body.n:
        deltas = _select_best(deltas, body.num_candidates, body.n)
    deltas = modify_output(deltas, context.extensions, state)
    if body.echo:
        prepend = _prepend if body.logprobs is None else _add_to_scores
        deltas = prepend(_read_prompts(model, body), deltas)
    envelope = build_envelope("cmpl", model.name)
    chunks = _build_chunks(envelope, deltas, usage, _choose_reader(model, body))
    return Answer(chunks, partial(_fold, envelope))


def _to_text_request(model: LoadedModel, body: CompletionRequest) -> TextRequest:
    num_logprobs = body.logprobs
    if num_logprobs is None and body.num_candidates > body.n:
        num_logprobs = 0  # for the ranking
    max_tokens = to_max_tokens(body)
    params = to_sampling_params(body, model, max_tokens=max_tokens, num_logprobs=num_logprobs)
    return TextRequest(
        prompts=body.prompt,
        params=replace(params, prompt_logprobs=body.echo and body.logprobs is not None),
        num_choices=body.num_candidates,
        stop_strings=tuple(body.stop),
        add_bos_token=body.add_bos_token,
        skip_special_tokens=body.skip_special_tokens,
        min_len=body.min_length,
        truncation=to_truncation(body, model, max_tokens),
        negative_prompt=to_negative_prompt(body),
        search=to_search(body, body.num_candidates),
        heals_tokens=body.token_healing,
        suffix=body.suffix,
        max_tokens_per_second=body.max_tokens_second if body.stream else 0,
    )


def _choose_reader(model: LoadedModel, body: CompletionRequest) -> ReadLogprobs:
    if body.logprobs is None:
        return read_none
    return make_text_reader(model.vocabulary, body.skip_special_tokens)


# Stages between the generation and its chunks


async def _select_best(
    deltas: AsyncGenerator[TextDelta, None], num_candidates: int, n: int
) -> AsyncGenerator[TextDelta, None]:
    """Of each prompt's candidates the `n` with the highest mean log-probability, best first."""
    candidates: dict[int, list[TextDelta]] = {}
    async with aclosing(deltas):
        async for delta in deltas:
            candidates.setdefault(delta.index, []).append(delta)
    for start in range(0, len(candidates), num_candidates):
        group = [candidates[start + offset] for offset in range(num_candidates)]
        group.sort(key=_mean_logprob, reverse=True)
        for rank, candidate in enumerate(group[:n]):
            for delta in candidate:
                yield replace(delta, index=start // num_candidates * n + rank)


def _mean_logprob(candidate: list[TextDelta]) -> float:
    outputs = [output for delta in candidate for output in delta.outputs if not output.is_prompt]
    logprobs = [output.logprob or 0.0 for output in outputs]
    return sum(logprobs) / len(logprobs) if logprobs else 0.0


async def _prepend(
    texts: list[str], deltas: AsyncGenerator[TextDelta, None]
) -> AsyncGenerator[TextDelta, None]:
    """Each choice's text from `texts`, then what was generated."""
    for index, text in enumerate(texts):
        yield TextDelta(index, text, ())
    async with aclosing(deltas):
        async for delta in deltas:
            yield delta


async def _add_to_scores(
    texts: list[str], deltas: AsyncGenerator[TextDelta, None]
) -> AsyncGenerator[TextDelta, None]:
    """Each choice's text from `texts`, in the delta of its prompt's tokens."""
    async with aclosing(deltas):
        async for delta in deltas:
            is_prompt = any(output.is_prompt for output in delta.outputs)
            yield replace(delta, text=texts[delta.index]) if is_prompt else delta


def _read_prompts(model: LoadedModel, body: CompletionRequest) -> list[str]:
    """The prompt of each choice, as text."""
    texts = [
        prompt if isinstance(prompt, str) else model.decode(prompt, body.skip_special_tokens)
        for prompt in body.prompt
    ]
    return [text for text in texts for _ in range(body.n)]


# Chunks


async def _build_chunks(
    envelope: Envelope,
    deltas: AsyncGenerator[TextDelta, None],
    usage: UsageCounter,
    read_logprobs: ReadLogprobs,
) -> Chunks:
    async with aclosing(deltas):
        async for delta in deltas:
            logprobs = read_logprobs(delta)
            reason = delta.finish_reason
            if delta.text or (logprobs is not None and reason is None):
                text = delta.text
                yield build_text_chunk(envelope, delta.index, text, logprobs=logprobs)
                logprobs = None
            if reason is not None:
                yield build_text_chunk(envelope, delta.index, "", reason, logprobs)
    yield build_usage_chunk(envelope, "text_completion", usage.build_usage())


async def _fold(envelope: Envelope, chunks: Chunks) -> Json:
    choices, usage = await streaming.fold(chunks, lambda choice: choice["text"])
    return build_text_completion(envelope, choices, usage)
