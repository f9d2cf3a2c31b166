"""GET /v1/models: which models there are, and one of them."""

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from extensions.openai.responses import build_model, build_model_list
from extensions.openai.typing import Model, ModelList
from modules.context import Context

# Names that clients have built in; a request for them is answered by the loaded model.
COMPATIBILITY_NAMES = ("gpt-3.5-turbo", "text-embedding-ada-002")


def add_routes(router: APIRouter, context: Context) -> None:
    @router.head("/v1/models", include_in_schema=False)
    @router.get("/v1/models", tags=["Models"], responses={200: {"model": ModelList}})
    async def list_models() -> Response:
        """The loaded model, then those that can be loaded, then the names that stand for it."""
        return JSONResponse(build_model_list(list_model_ids(context)))

    @router.head("/v1/models/{model_id:path}", include_in_schema=False)
    @router.get("/v1/models/{model_id:path}", tags=["Models"], responses={200: {"model": Model}})
    async def get_model(model_id: str) -> Response:
        """A model's entry: whichever is asked for."""
        return JSONResponse(build_model(model_id))


def list_model_ids(context: Context) -> list[str]:
    loaded = [model.name for model in context.models.loaded]
    names = [*loaded, *context.models.list_names(), *COMPATIBILITY_NAMES]
    return list(dict.fromkeys(names))
