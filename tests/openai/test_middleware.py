from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI

from tests.conftest import MakeApp, connect
from tests.openai.assertions import MESSAGES

pytestmark = pytest.mark.anyio

ORIGIN = {"origin": "http://page.example"}


@pytest.mark.parametrize("request_id", ["abc-1", "req_1:2/3=", "x" * 128])
async def test_the_request_id_comes_back(client: httpx.AsyncClient, request_id: str) -> None:
    headers = {"x-request-id": request_id}
    for call in (
        client.get("/v1/models", headers=headers),
        client.get("/nowhere", headers=headers),
        client.post(
            "/v1/chat/completions", json={"messages": MESSAGES, "stream": True}, headers=headers
        ),
    ):
        assert (await call).headers["x-request-id"] == request_id


@pytest.mark.parametrize("request_id", ["", "x" * 129, "a b", "a\tb", '"', "é"])
async def test_a_senseless_request_id_is_replaced(
    client: httpx.AsyncClient, request_id: str
) -> None:
    headers = {"x-request-id": request_id.encode()}
    ids = [(await client.get("/v1/models", headers=headers)).headers["x-request-id"] for _ in "ab"]
    assert all(item.startswith("req_") for item in ids)
    assert len(set(ids)) == 2


async def test_preflight(client: httpx.AsyncClient) -> None:
    headers = {
        **ORIGIN,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,x-custom",
    }
    response = await client.options("/v1/chat/completions", headers=headers)
    assert (response.status_code, response.text) == (200, "OK")
    assert response.headers["access-control-allow-origin"] == ORIGIN["origin"]
    assert response.headers["access-control-allow-credentials"] == "true"
    assert response.headers["access-control-allow-headers"] == "authorization,x-custom"
    assert "POST" in response.headers["access-control-allow-methods"]
    assert response.headers["access-control-max-age"] == "600"
    assert response.headers["x-request-id"]


async def test_preflight_from_the_web_to_the_local_network(client: httpx.AsyncClient) -> None:
    headers = {
        **ORIGIN,
        "access-control-request-method": "POST",
        "access-control-request-private-network": "true",
    }
    response = await client.options("/v1/chat/completions", headers=headers)
    assert response.status_code == 200
    assert response.headers["access-control-allow-private-network"] == "true"


async def test_cors_on_answers_and_errors(client: httpx.AsyncClient) -> None:
    for path in ("/v1/models", "/nowhere", "/v1/completions"):
        response = await client.get(path, headers=ORIGIN)
        assert response.headers["access-control-allow-origin"] in ("*", ORIGIN["origin"])
        assert response.headers["access-control-allow-credentials"] == "true"
        exposed = response.headers["access-control-expose-headers"]
        assert exposed == "x-request-id, x-dropped-messages, x-truncated-inputs"


async def test_cors_for_chosen_origins(make_app: MakeApp) -> None:
    async with connect(make_app(cors_origins=("http://mine",))) as client:
        response = await client.get("/v1/models", headers={"origin": "http://mine"})
        assert response.headers["access-control-allow-origin"] == "http://mine"
        response = await client.get("/v1/models", headers=ORIGIN)
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("path", ["/", "/v1/chat/completions", "/v1/models/a/b", "/nowhere"])
async def test_options(client: httpx.AsyncClient, path: str) -> None:
    response = await client.options(path)
    assert (response.status_code, response.json()) == (200, "OK")


async def test_a_trailing_slash_makes_no_difference(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/models/")).json()["object"] == "list"
    assert (await client.get("/v1/models/a/b/")).json()["id"] == "a/b"
    response = await client.post("/v1/chat/completions/", json={"messages": MESSAGES})
    assert response.status_code == 200


async def test_other_paths_are_left_alone(app: FastAPI, client: httpx.AsyncClient) -> None:
    @app.post("/form/")
    async def read(request_type: str = "x") -> str:
        return request_type

    assert (await client.post("/form/", data={"a": "b"})).json() == "x"
