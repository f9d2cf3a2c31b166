"""/v1/internal/*: what this server offers beside OpenAI's own endpoints."""

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from extensions.openai.responses import Json
from extensions.openai.typing import Health, ModelInfo, PresetList
from modules.context import Context
from modules.instruction_templates import ChatTemplate
from modules.loaded_model import LoadedModel
from modules.presets import list_presets
from modules.settings import PROJECT_ROOT


def add_routes(router: APIRouter, context: Context) -> None:
    @router.head("/v1/internal/health", include_in_schema=False)
    @router.get("/v1/internal/health", tags=["Internal"], responses={200: {"model": Health}})
    async def get_health() -> Response:
        """Whether the server can answer: an error when its engine has died; model may be null."""
        for model in context.models.loaded:
            model.engine.check_health()
        return JSONResponse({"status": "ok", "model": context.models.default_name})

    @router.get("/v1/internal/model/info", tags=["Internal"], responses={200: {"model": ModelInfo}})
    async def get_model_info() -> Response:
        """The model that answers where none is named, with its chat template and why it has that
        one; nulls without one. Then all that are loaded.
        """
        model = context.models.current if context.models.is_loaded else None
        return JSONResponse(
            {
                "model_name": context.models.default_name,
                "lora_names": model.adapters.names if model else [],
                "chat_template": model and _build_template_info(model.chat_template),
                "models": [_build_model_info(each) for each in context.models.loaded],
                "asleep": [model.name for model in context.models.asleep],
            }
        )

    @router.post("/v1/internal/stop-generation", tags=["Internal"])
    async def stop_generation() -> Response:
        """End every generation of every client; each keeps what it has so far."""
        context.models.abort_all()
        return JSONResponse("OK")

    @router.get("/v1/internal/presets", tags=["Internal"], responses={200: {"model": PresetList}})
    async def get_presets() -> Response:
        """The names that `preset` may have."""
        return JSONResponse({"preset_names": list_presets(PROJECT_ROOT)})


def _build_template_info(template: ChatTemplate) -> Json:
    return {"name": template.name, "source": template.source, "reason": template.reason}


def _build_model_info(model: LoadedModel) -> Json:
    return {
        "name": model.name,
        "device": model.device,
        "dtype": model.dtype,
        "max_model_len": model.max_model_len,
    }
