"""/v1/files: what users upload, and the results of batches, until they are deleted."""

from typing import Annotated

from fastapi import APIRouter, Form, Query, Response
from fastapi.responses import FileResponse, JSONResponse

from extensions.openai.responses import build_deleted_file, build_file, build_page
from extensions.openai.typing import (
    DeletedFile,
    File,
    FileId,
    FileList,
    FilePurpose,
    FileUpload,
    Order,
)
from modules.context import Context

MAX_NAME_CHARS = 512


def add_routes(router: APIRouter, context: Context) -> None:
    storage = context.storage

    @router.post("/v1/files", tags=["Files"], responses={200: {"model": File}})
    async def upload_file(form: Annotated[FileUpload, Form()]) -> Response:
        """Keep a file. Its name is kept with it, and is no path."""
        content = await form.file.read()
        name = (form.file.filename or "file")[:MAX_NAME_CHARS]
        stored = await storage.write(
            lambda data: data.files.add(name, form.purpose, content, form.seconds)
        )
        return JSONResponse(build_file(stored))

    @router.get("/v1/files", tags=["Files"], responses={200: {"model": FileList}})
    async def list_files(
        purpose: FilePurpose | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        after: FileId | None = None,
        order: Order = "desc",
    ) -> Response:
        """The newest first, unless `order` is asc."""
        files, has_more = await storage.read(
            lambda data: data.files.list_page(limit, after, purpose, order == "asc")
        )
        return JSONResponse(build_page([build_file(file) for file in files], has_more))

    @router.get("/v1/files/{file_id}", tags=["Files"], responses={200: {"model": File}})
    async def get_file(file_id: str) -> Response:
        """What is known of a file."""
        return JSONResponse(build_file(await storage.read(lambda data: data.files.get(file_id))))

    @router.get(
        "/v1/files/{file_id}/content",
        tags=["Files"],
        responses={200: {"content": {"application/octet-stream": {}}}},
        response_class=FileResponse,
    )
    async def get_content(file_id: str) -> Response:
        """What is in a file."""
        file, path = await storage.read(
            lambda data: (data.files.get(file_id), data.files.get_path(file_id))
        )
        # Whatever it is: no browser is to run it as a page of this server.
        return FileResponse(path, media_type="application/octet-stream", filename=file.filename)

    @router.delete("/v1/files/{file_id}", tags=["Files"], responses={200: {"model": DeletedFile}})
    async def delete_file(file_id: str) -> Response:
        """Remove a file from the disk, unless a batch still reads it."""
        await storage.read(lambda data: data.files.delete(file_id))
        return JSONResponse(build_deleted_file(file_id))
