"""/v1/internal/*: what this server offers beside OpenAI's own endpoints."""

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from extensions.openai.typing import Health, ModelInfo, PresetList
from modules.context import Context
from modules.presets import list_presets
from modules.settings import PROJECT_ROOT


def add_routes(router: APIRouter, context: Context) -> None:
    @router.head("/v1/internal/health", include_in_schema=False)
    @router.get("/v1/internal/health", tags=["Internal"], responses={200: {"model": Health}})
    async def get_health() -> Response:
        """Whether the server can answer: an error when its engine has died; model may be null."""
        for model in context.models.loaded:
            model.engine.check_health()
        name = context.models.current.name if context.models.is_loaded else None
        return JSONResponse({"status": "ok", "model": name})

    @router.get("/v1/internal/model/info", tags=["Internal"], responses={200: {"model": ModelInfo}})
    async def get_model_info() -> Response:
        """The loaded model, and which chat template it has for which reason; nulls without one."""
        if not context.models.is_loaded:
            return JSONResponse({"model_name": None, "lora_names": [], "chat_template": None})
        model = context.models.current
        template = model.chat_template
        return JSONResponse(
            {
                "model_name": model.name,
                "lora_names": model.adapters.names,
                "chat_template": {
                    "name": template.name,
                    "source": template.source,
                    "reason": template.reason,
                },
            }
        )

    @router.post("/v1/internal/stop-generation", tags=["Internal"])
    async def stop_generation() -> Response:
        """End every generation of every client; each keeps what it has so far."""
        for model in context.models.loaded:
            model.engine.abort_all()
        return JSONResponse("OK")

    @router.get("/v1/internal/presets", tags=["Internal"], responses={200: {"model": PresetList}})
    async def get_presets() -> Response:
        """The names that `preset` may have."""
        return JSONResponse({"preset_names": list_presets(PROJECT_ROOT)})
