"""Tokens and prompts as the model sees them, in this API's shapes and in vLLM's.

Nothing here goes through the engine, so nothing waits for a generation.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from extensions.openai.chat_hooks import prepare_chat
from extensions.openai.chat_images import take_chat_images
from extensions.openai.chat_prompts import open_chat
from extensions.openai.leases import depend_on_lease
from extensions.openai.typing import (
    ChatCompletionRequest,
    ChatPrompt,
    DecodedText,
    DecodeRequest,
    DetokenizedText,
    DetokenizeRequest,
    EncodedText,
    EncodeRequest,
    TokenCount,
    TokenizedText,
    TokenizeRequest,
)
from modules.context import Context
from modules.image_reader import RequestImages
from modules.loaded_model import LoadedModel
from modules.models import ModelLease
from modules.settings import Settings


def add_routes(router: APIRouter, context: Context) -> None:
    """In threads all of them: a long text, or a template that a client sent, may take its time."""
    leased = depend_on_lease(context)

    @router.post("/v1/internal/encode", tags=["Tokens"], responses={200: {"model": EncodedText}})
    async def encode(body: EncodeRequest, lease: ModelLease = leased) -> Response:
        """A text's token ids, with the special tokens that are added to a prompt."""
        model = await lease.get(body.model)
        token_ids = await asyncio.to_thread(model.encode, body.text, True)
        return JSONResponse({"tokens": token_ids, "length": len(token_ids)})

    @router.post("/v1/internal/decode", tags=["Tokens"], responses={200: {"model": DecodedText}})
    async def decode(body: DecodeRequest, lease: ModelLease = leased) -> Response:
        """The text of token ids, without special tokens."""
        model = await lease.get(body.model)
        return JSONResponse({"text": await _decode(model, body.tokens, True)})

    @router.post(
        "/v1/internal/token-count", tags=["Tokens"], responses={200: {"model": TokenCount}}
    )
    async def count_tokens(body: EncodeRequest, lease: ModelLease = leased) -> Response:
        """How many tokens a text has as a prompt."""
        model = await lease.get(body.model)
        token_ids = await asyncio.to_thread(model.encode, body.text, True)
        return JSONResponse({"length": len(token_ids)})

    @router.post(
        "/v1/internal/chat-prompt", tags=["Tokens"], responses={200: {"model": ChatPrompt}}
    )
    async def get_chat_prompt(body: ChatCompletionRequest, lease: ModelLease = leased) -> Response:
        """The prompt that a chat completion makes of the same request."""
        _, _, prompt = await prepare_chat(context, await lease.get(body.model, body.lora), body)
        return JSONResponse(
            {
                "prompt": prompt.text,
                "length": len(prompt.token_ids),
                "dropped_messages": prompt.num_dropped_messages,
            }
        )

    @router.post("/tokenize", tags=["Tokens"], responses={200: {"model": TokenizedText}})
    async def tokenize(body: TokenizeRequest, lease: ModelLease = leased) -> Response:
        """The token ids of a prompt, or of messages, as vLLM tells them."""
        model = await lease.get(body.model)
        token_ids = await _tokenize(context.settings, model, body)
        pieces = list(map(model.vocabulary.piece, token_ids)) if body.return_token_strs else None
        return JSONResponse(
            {
                "count": len(token_ids),
                "max_model_len": model.max_model_len,
                "tokens": token_ids,
                "token_strs": pieces,
            }
        )

    @router.post("/detokenize", tags=["Tokens"], responses={200: {"model": DetokenizedText}})
    async def detokenize(body: DetokenizeRequest, lease: ModelLease = leased) -> Response:
        """The text of token ids, with special tokens, as vLLM tells it."""
        model = await lease.get(body.model)
        return JSONResponse({"prompt": await _decode(model, body.tokens, False)})


async def _decode(model: LoadedModel, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
    model.check_token_ids(token_ids, "tokens")
    return await asyncio.to_thread(model.decode, token_ids, skip_special_tokens)


async def _tokenize(
    settings: Settings, model: LoadedModel, body: TokenizeRequest
) -> tuple[int, ...]:
    adds = body.add_special_tokens
    if body.prompt is not None:
        return await asyncio.to_thread(model.encode, body.prompt, adds is not False)
    own = ("messages", "add_generation_prompt")
    fields = body.model_dump(include={*own} & body.model_fields_set) | (body.model_extra or {})
    chat, images = await take_chat_images(settings, model, _to_chat(fields))
    return await asyncio.to_thread(_tokenize_chat, model, chat, images, adds)


def _tokenize_chat(
    model: LoadedModel,
    chat: ChatCompletionRequest,
    images: RequestImages | None,
    add_special_tokens: bool | None,
) -> tuple[int, ...]:
    conversation = open_chat(model, chat)
    prompt = conversation.write(conversation.messages)
    if add_special_tokens is None:
        add_special_tokens = prompt.add_special_tokens
    token_ids = model.prompt_encoder.encode(prompt.text, prompt.marks, add_special_tokens)
    return images.place(prompt.images, token_ids)[0] if images else token_ids


def _to_chat(fields: dict[str, Any]) -> ChatCompletionRequest:
    """Raises RequestValidationError, as FastAPI does of a body."""
    try:
        return ChatCompletionRequest.model_validate(fields)
    except ValidationError as error:
        details = [{**detail, "loc": ("body", *detail["loc"])} for detail in error.errors()]
        raise RequestValidationError(details) from error
