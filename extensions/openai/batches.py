"""/v1/batches: files of requests, answered when nobody waits for anything else."""

from typing import Annotated

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse

from extensions.openai.batch_runner import BatchRunner
from extensions.openai.responses import build_batch, build_page
from extensions.openai.typing import Batch, BatchId, BatchList, BatchRequest
from modules.context import Context


def add_routes(router: APIRouter, context: Context) -> None:
    storage = context.storage
    runner = BatchRunner(context)
    context.services.append(runner.run)

    @router.post("/v1/batches", tags=["Batches"], responses={200: {"model": Batch}})
    async def create_batch(body: BatchRequest) -> Response:
        """Have the requests of an uploaded file answered."""
        expiry = body.output_expires_after
        seconds = None if expiry is None else expiry.seconds
        batch = await storage.write(
            lambda data: data.batches.create(
                body.endpoint, body.input_file_id, body.metadata, seconds
            )
        )
        runner.wake()
        return JSONResponse(build_batch(batch))

    @router.get("/v1/batches", tags=["Batches"], responses={200: {"model": BatchList}})
    async def list_batches(
        limit: Annotated[int, Query(ge=1, le=100)] = 20, after: BatchId | None = None
    ) -> Response:
        """The newest first."""
        batches, has_more = await storage.read(lambda data: data.batches.list_page(limit, after))
        return JSONResponse(build_page([build_batch(batch) for batch in batches], has_more))

    @router.get("/v1/batches/{batch_id}", tags=["Batches"], responses={200: {"model": Batch}})
    async def get_batch(batch_id: str) -> Response:
        """How far it has come."""
        batch = await storage.read(lambda data: data.batches.get(batch_id))
        return JSONResponse(build_batch(batch))

    @router.post(
        "/v1/batches/{batch_id}/cancel", tags=["Batches"], responses={200: {"model": Batch}}
    )
    async def cancel_batch(batch_id: str) -> Response:
        """End it. What has been answered is in its output, all the rest among its errors."""
        batch = await storage.read(lambda data: data.batches.cancel(batch_id))
        runner.interrupt(batch_id)
        return JSONResponse(build_batch(batch))
