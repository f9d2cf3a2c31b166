"""POST /v1/moderations: which of OpenAI's categories of harmful text a text belongs to."""

import uuid
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic_core import to_json

from extensions.openai.responses import Json
from extensions.openai.streaming import JsonAnswer, send_json
from extensions.openai.typing import MAX_INPUTS, ModerationRequest, Moderations
from modules.context import Context
from modules.errors import InvalidRequestError
from modules.moderation import THRESHOLD, Moderation

# Some forty thousand words, in thousands of windows; others take their turns meanwhile.
MAX_CHARS = 250_000


def add_routes(router: APIRouter, context: Context) -> None:
    @router.post("/v1/moderations", tags=["Moderations"], responses={200: {"model": Moderations}})
    async def moderate(request: Request, body: ModerationRequest) -> Response:
        """Scores a text, or several, by category."""
        return await send_json(answer_moderation(context, body), request, context.settings)


async def answer_moderation(context: Context, body: ModerationRequest) -> JsonAnswer:
    """Raises InvalidRequestError, and what `Moderator.moderate` raises."""
    moderation = await context.moderation.moderate(read_texts(body.input))
    return JsonAnswer(to_json(build_moderations(moderation)))


def read_texts(value: Any) -> tuple[str, ...]:
    """The texts of `input`, each of which gets a result. Raises InvalidRequestError."""
    texts = _to_texts(value)
    if len(texts) > MAX_INPUTS:
        raise InvalidRequestError(f"There may be at most {MAX_INPUTS} texts.", "input")
    if sum(map(len, texts)) > MAX_CHARS:
        message = f"The texts may have at most {MAX_CHARS} characters together."
        raise InvalidRequestError(message, "input")
    return texts


def _to_texts(value: Any) -> tuple[str, ...]:
    match value:
        case str():
            return (_check_text(value, "input"),)
        case [dict(), *_]:
            parts = [_read_part(part, f"input[{i}]") for i, part in enumerate(value)]
            return ("\n".join(parts),)
        case [_, *_]:
            return tuple(_check_text(item, f"input[{i}]") for i, item in enumerate(value))
    message = "input should be a text, a list of texts or a list of text parts, and not empty."
    raise InvalidRequestError(message, "input")


def _check_text(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(f"{param} should be a text.", param)
    if not value:
        raise InvalidRequestError(f"{param} is empty.", param)
    return value


def _read_part(part: Any, param: str) -> str:
    match part:
        case {"type": "text", "text": text}:
            return _check_text(text, f"{param}.text")
        case {"type": "image_url"}:
            message = f"{param} is an image, and this server looks at texts only."
            raise InvalidRequestError(message, param)
    raise InvalidRequestError(
        f'{param} should be a text part: {{"type": "text", "text": "..."}}.', param
    )


def build_moderations(moderation: Moderation) -> Json:
    return {
        "id": f"modr-{uuid.uuid4().hex}",
        "model": moderation.model,
        "results": [_build_result(scores) for scores in moderation.scores],
    }


def _build_result(scores: Mapping[str, float]) -> Json:
    categories = {name: score >= THRESHOLD for name, score in scores.items()}
    return {
        "flagged": any(categories.values()),
        "categories": categories,
        "category_scores": dict(scores),
        "category_applied_input_types": {name: ["text"] for name in scores},
    }
