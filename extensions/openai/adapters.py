"""/v1/internal/lora/*: which adapters (LoRA) there are, and which a model has. For the admin."""

import asyncio

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from extensions.openai.leases import depend_on_lease
from extensions.openai.typing import AdapterList, LoadAdaptersRequest, UnloadAdaptersRequest
from modules.adapter_files import list_adapters
from modules.context import Context
from modules.errors import InvalidRequestError, ModelLoadError, ModelNotFoundError
from modules.loaded_model import LoadedModel
from modules.models import ModelLease


def add_admin_routes(router: APIRouter, context: Context) -> None:
    leased = depend_on_lease(context)

    async def get_model(name: str | None, lease: ModelLease) -> LoadedModel:
        """Unlike a generation, a change is for no other model than the one that is named.

        Raises ModelNotFoundError, and what `ModelLease.get` raises.
        """
        if name is not None and not context.models.has(name):
            raise ModelNotFoundError(f"There is no model {name[:100]!r} loaded.")
        return await lease.get(name)

    @router.get("/v1/internal/lora/list", tags=["Admin"], responses={200: {"model": AdapterList}})
    async def list_loras() -> Response:
        """The names that `lora/load` may have."""
        names = await asyncio.to_thread(list_adapters, context.settings.lora_dir)
        return JSONResponse({"lora_names": names})

    @router.post("/v1/internal/lora/load", tags=["Admin"])
    async def load_loras(body: LoadAdaptersRequest, lease: ModelLease = leased) -> Response:
        """Load adapters beside those that are there. If one fails, nothing changes."""
        model = await get_model(body.model, lease)
        try:
            await asyncio.to_thread(model.adapters.load, body.lora_names)
        except ModelLoadError as error:  # the model is well, and will say the same again
            raise InvalidRequestError(str(error), "lora_names") from error
        return JSONResponse("OK")

    @router.post("/v1/internal/lora/unload", tags=["Admin"])
    async def unload_loras(
        body: UnloadAdaptersRequest | None = None, lease: ModelLease = leased
    ) -> Response:
        """Unload adapters of a model, or all. Answers that are being written keep theirs."""
        body = body or UnloadAdaptersRequest()
        model = await get_model(body.model, lease)
        model.adapters.unload(body.lora_names)
        return JSONResponse("OK")
