"""/v1/internal/*: what this server offers beside OpenAI's own endpoints."""

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from extensions.openai.typing import Health
from modules.context import Context


def add_routes(router: APIRouter, context: Context) -> None:
    @router.head("/v1/internal/health", include_in_schema=False)
    @router.get("/v1/internal/health", tags=["Internal"], responses={200: {"model": Health}})
    async def get_health() -> Response:
        """Whether the server can answer: an error when its engine has died; model may be null."""
        model = context.models.current if context.models.is_loaded else None
        if model is not None:
            model.engine.check_health()
        return JSONResponse({"status": "ok", "model": model.name if model else None})
