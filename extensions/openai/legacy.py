"""Calls of older programs: engines, what has another name today, and what there is no more."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from enum import Enum
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import JSONResponse

from extensions.openai import streaming
from extensions.openai.auth import build_router, has_key
from extensions.openai.chat_completions import answer_chat
from extensions.openai.completions import answer_completion
from extensions.openai.docs import describe_chat, describe_completion
from extensions.openai.leases import depend_on_lease
from extensions.openai.models import list_models
from extensions.openai.responses import Json, build_engine, build_engine_list
from extensions.openai.streaming import Answer, Chunks, Options
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

    engine_router = build_router(context.settings.api_key, context.settings.admin_key)

    @engine_router.get(ENGINE, tags=TAGS, responses={200: {"model": Engine}})
    async def get_engine(request: Request, engine_id: str) -> Response:
        """An engine's entry, whichever is asked for. With the admin key, a model that is on this
        machine is loaded first.
        """
        if has_key(request, context.settings.admin_key):
            await _load_engine(context, engine_id)
        return JSONResponse(build_engine(engine_id, _is_ready(context, engine_id)))

    router.include_router(engine_router)

    # Before the route of completions, whose engine might else be called `NAME/chat`.
    @router.post(f"{ENGINE}/chat/completions", tags=TAGS, responses=describe_chat())
    async def create_engine_chat(
        engine_id: str, request: Request, body: ChatCompletionRequest, lease: ModelLease = leased
    ) -> Response:
        """The same as /v1/chat/completions, of the engine where `model` names no other."""
        body = _name_model(body, engine_id)
        return await streaming.send(answer_chat, context, lease, request, body)

    @router.post("/v1/text_completion", tags=TAGS, responses=describe_completion())
    async def create_text_completion(
        request: Request, body: CompletionRequest, lease: ModelLease = leased
    ) -> Response:
        """The same as /v1/completions."""
        return await streaming.send(answer_completion, context, lease, request, body)

    @router.post(f"{ENGINE}/completions", tags=TAGS, responses=describe_completion())
    async def create_engine_completion(
        engine_id: str, request: Request, body: CompletionRequest, lease: ModelLease = leased
    ) -> Response:
        """The same as /v1/completions, of the engine where `model` names no other."""
        body = _name_model(body, engine_id)
        return await streaming.send(answer_completion, context, lease, request, body)

    @router.post(f"{ENGINE}/generate", tags=TAGS, responses=describe_completion())
    async def generate(
        engine_id: str, request: Request, body: GenerateRequest, lease: ModelLease = leased
    ) -> Response:
        """A completion, with its choices as `data` too."""
        body = _name_model(body, engine_id)
        return await streaming.send(_answer_generate, context, lease, request, body)

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


def _name_model(body: Options, engine_id: str) -> Options:
    return body if body.model else body.model_copy(update={"model": engine_id})


def _is_ready(context: Context, engine_id: str) -> bool:
    name, adapter = context.models.split(engine_id)
    model = context.models.find(name or "")
    return model is not None and adapter in (None, *model.adapter_names)


async def _load_engine(context: Context, engine_id: str) -> None:
    """Unless it is loaded, if it sleeps or is on this machine."""
    name, _ = context.models.split(engine_id)
    if name is None or context.models.find(name) is not None:
        return
    asleep = (model.name for model in context.models.asleep)
    if name in (*asleep, *context.models.list_names()):
        await context.models.wake_or_load(name)


async def _answer_generate(context: Context, lease: ModelLease, body: GenerateRequest) -> Answer:
    answer = await answer_completion(context, lease, body)

    async def fold(chunks: Chunks) -> Json:
        whole = await answer.fold(chunks)
        return {**whole, "data": whole["choices"]}

    return replace(answer, chunks=_add_data(answer.chunks), fold=fold)


async def _add_data(chunks: Chunks) -> AsyncGenerator[Json, None]:
    async with aclosing(chunks):
        async for chunk in chunks:
            yield {**chunk, "data": chunk["choices"]}
