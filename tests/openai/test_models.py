from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI

from tests.conftest import Serve
from tests.fakes import FakeModelManager

pytestmark = pytest.mark.anyio


async def read_ids(client: httpx.AsyncClient) -> list[str]:
    answer = (await client.get("/v1/models")).json()
    assert answer["object"] == "list"
    for entry in answer["data"]:
        assert list(entry) == ["id", "object", "created", "owned_by"]
    return [entry["id"] for entry in answer["data"]]


async def test_the_loaded_model_comes_first(client: httpx.AsyncClient) -> None:
    expected = ["tiny", "other", "gpt-3.5-turbo", "text-embedding-ada-002"]
    assert await read_ids(client) == expected


async def test_without_a_model(client: httpx.AsyncClient, manager: FakeModelManager) -> None:
    manager.model = None
    manager.names = ["gpt-3.5-turbo", "b"]
    assert await read_ids(client) == ["b", "gpt-3.5-turbo", "text-embedding-ada-002"]


@pytest.mark.parametrize("name", ["tiny", "gpt-9", "org/model", "a/b/c", "größe"])
async def test_a_model_is_whichever_is_asked_for(client: httpx.AsyncClient, name: str) -> None:
    answer = (await client.get(f"/v1/models/{name}")).json()
    assert answer == {"id": name, "object": "model", "created": 0, "owned_by": "user"}


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/v1/internal/health"])
async def test_head(app: FastAPI, serve: Serve, path: str) -> None:
    with serve(app) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            head, get = await client.head(path), await client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == get.headers["content-length"]


async def test_head_of_what_only_takes_a_body(client: httpx.AsyncClient) -> None:
    response = await client.head("/v1/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")


async def test_an_escaped_slash_is_a_slash(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/models/org%2Fmodel")).json()["id"] == "org/model"
