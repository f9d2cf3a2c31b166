"""Uploads: forms with files, read into memory, behind the key."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

import httpx
import pytest
from fastapi import FastAPI, Form, UploadFile
from pydantic import BaseModel

from extensions.openai.auth import build_router
from extensions.openai.errors import add_error_handlers
from extensions.openai.middleware import RequestIdMiddleware
from tests.conftest import connect
from tests.openai.assertions import assert_error_shape

pytestmark = pytest.mark.anyio

KEY = {"authorization": "Bearer k"}
FORM = "multipart/form-data"


class Upload(BaseModel):
    file: UploadFile
    names: list[str] = []
    count: int = 1


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()
    router = build_router("k")

    @router.post("/upload")
    async def upload(form: Annotated[Upload, Form()]) -> dict[str, object]:
        content = await form.file.read()
        return {
            "size": len(content),
            "names": form.names,
            "in_memory": not form.file.file._rolled,  # type: ignore[attr-defined]
        }

    app.include_router(router)
    add_error_handlers(app)
    app.add_middleware(RequestIdMiddleware)
    async with connect(app) as client:
        yield client


async def test_files_stay_in_memory(client: httpx.AsyncClient) -> None:
    files = {"file": ("a.bin", bytes(5_000_000))}
    response = await client.post("/upload", files=files, headers=KEY)
    assert response.json() == {"size": 5_000_000, "names": [], "in_memory": True}


@pytest.mark.parametrize("name", ["names", "names[]"])
async def test_lists_by_both_spellings(client: httpx.AsyncClient, name: str) -> None:
    response = await client.post(
        "/upload", files={"file": b"x"}, data={name: ["a", "b"]}, headers=KEY
    )
    assert response.json()["names"] == ["a", "b"]


@pytest.mark.parametrize(
    ("content_type", "content", "reason"),
    [
        ("application/json", b"{}", "multipart/form-data"),
        ("application/x-www-form-urlencoded", b"file=x", "multipart/form-data"),
        (FORM, b"x", "boundary"),
        (f"{FORM}; boundary=b", b"no form", "cannot be read"),
    ],
)
async def test_what_is_no_form_is_refused(
    client: httpx.AsyncClient, content_type: str, content: bytes, reason: str
) -> None:
    headers = {**KEY, "content-type": content_type}
    response = await client.post("/upload", content=content, headers=headers)
    assert reason in assert_error_shape(response, 400)


async def test_faults_name_the_field(client: httpx.AsyncClient) -> None:
    response = await client.post("/upload", files={"other": b"x"}, headers=KEY)
    assert_error_shape(response, 400, param="file")
    response = await client.post(
        "/upload", files={"file": b"x"}, data={"count": "many"}, headers=KEY
    )
    message = assert_error_shape(response, 400, param="count")
    assert message == "Invalid value for 'count': Input should be an integer."
    response = await client.post("/upload", data={"file": "no file"}, files={"x": b""}, headers=KEY)
    message = assert_error_shape(response, 400, param="file")
    assert message == "Invalid value for 'file': Input should be a file."


async def test_the_key_comes_first(client: httpx.AsyncClient) -> None:
    """Before the body is read: it may be large, and wrong."""
    response = await client.post("/upload", content=b"no form")
    assert_error_shape(response, 401, code="invalid_api_key")
