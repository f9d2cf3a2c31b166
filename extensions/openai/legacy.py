"""Calls of older programs: engines, what has another name today, and what there is no more."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from enum import Enum
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import JSONResponse

from extensions.openai import streaming
from extensions.openai.chat_completions import answer_chat
from extensions.openai.completions import answer_completion
from extensions.openai.docs import describe_chat, describe_completion
from extensions.openai.leases import depend_on_lease
from extensions.openai.models import list_models
from extensions.openai.responses import Json, build_engine, build_engine_list
from extensions.openai.streaming import Answer, Chunks
from extensions.openai.typing import (
    BillingUsage,
    ChatCompletionRequest,
    CompletionRequest,
    Engine,
    EngineList,
    ErrorResponse,
    GenerateRequest,
)
from modules.context import Context
from modules.models import ModelLease

TAGS: list[str | Enum] = ["Older programs"]
ENGINE = "/v1/engines/{engine_id:path}"


def add_routes(router: APIRouter, context: Context) -> None:
    leased = depend_on_lease(context)

    @router.get("/v1/engines", tags=TAGS, responses={200: {"model": EngineList}})
    async def list_engines() -> Response:
        """The same models as /v1/models, and which one is loaded."""
        ids = [model.id for model in await list_models(context)]
        return JSONResponse(build_engine_list({id: _is_ready(context, id) for id in ids}))

    @router.get(ENGINE, tags=TAGS, responses={200: {"model": Engine}})
    async def get_engine(engine_id: str) -> Response:
        """An engine's entry: whichever is asked for."""
        return JSONResponse(build_engine(engine_id, _is_ready(context, engine_id)))

    # Before the route of completions, whose engine might else be called `NAME/chat`.
    @router.post(f"{ENGINE}/chat/completions", tags=TAGS, responses=describe_chat())
    async def create_engine_chat(
        request: Request, body: ChatCompletionRequest, lease: ModelLease = leased
    ) -> Response:
        """The same as /v1/chat/completions; the loaded model answers."""
        answer = await answer_chat(context, lease, body)
        return await streaming.send(answer, request, body, context.settings)

    @router.post("/v1/text_completion", tags=TAGS, responses=describe_completion())
    @router.post(f"{ENGINE}/completions", tags=TAGS, responses=describe_completion())
    async def create_engine_completion(
        request: Request, body: CompletionRequest, lease: ModelLease = leased
    ) -> Response:
        """The same as /v1/completions; the loaded model answers."""
        answer = await answer_completion(context, lease, body)
        return await streaming.send(answer, request, body, context.settings)

    @router.post(f"{ENGINE}/generate", tags=TAGS, responses=describe_completion())
    async def generate(
        request: Request, body: GenerateRequest, lease: ModelLease = leased
    ) -> Response:
        """A completion, with its choices as `data` too."""
        answer = _name_data(await answer_completion(context, lease, body))
        return await streaming.send(answer, request, body, context.settings)

    gone: dict[int | str, dict[str, Any]] = {
        410: {"model": ErrorResponse, "description": "It is gone."}
    }

    @router.post("/v1/edits", tags=TAGS, status_code=410, responses=gone)
    @router.post(f"{ENGINE}/edits", tags=TAGS, status_code=410, responses=gone)
    async def create_edit() -> Response:
        """There are no edits any more."""
        message = "Edits have been removed. Use /v1/chat/completions instead."
        raise HTTPException(410, message)

    @router.get("/v1/billing/usage", tags=TAGS, responses={200: {"model": BillingUsage}})
    async def get_billing_usage() -> Response:
        """Nothing to pay."""
        return JSONResponse({"total_usage": 0})


def _is_ready(context: Context, engine_id: str) -> bool:
    return context.models.find(engine_id) is not None


def _name_data(answer: Answer) -> Answer:
    async def fold(chunks: Chunks) -> Json:
        whole = await answer.fold(chunks)
        return {**whole, "data": whole["choices"]}

    return replace(answer, chunks=_add_data(answer.chunks), fold=fold)


async def _add_data(chunks: Chunks) -> AsyncGenerator[Json, None]:
    async with aclosing(chunks):
        async for chunk in chunks:
            yield {**chunk, "data": chunk["choices"]}
