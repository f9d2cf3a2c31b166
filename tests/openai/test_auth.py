from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI

from extensions.openai.auth import build_router
from tests.conftest import MakeApp, connect
from tests.openai.assertions import MESSAGES, assert_error_shape

pytestmark = pytest.mark.anyio

KEY = "schlüssel-1"
OPEN_PATHS = ("/docs", "/docs/static/swagger-ui.css", "/openapi.json")
ROUTES = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/some/model"),
    ("GET", "/v1/internal/health"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
]


@pytest.fixture
def app(make_app: MakeApp) -> FastAPI:
    return make_app(api_key=KEY)


def bearer(key: str, scheme: str = "Bearer") -> dict[str, bytes]:
    return {"authorization": f"{scheme} {key}".encode()}


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_every_route_asks_for_the_key(
    client: httpx.AsyncClient, method: str, path: str
) -> None:
    response = await client.request(method, path)
    assert_error_shape(response, 401, code="invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"


async def test_head_asks_for_the_key_too(client: httpx.AsyncClient) -> None:
    for path in ("/v1/models", "/v1/models/tiny", "/v1/internal/health"):
        assert (await client.head(path)).status_code == 401
        assert (await client.head(path, headers=bearer(KEY))).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        bearer(KEY),
        bearer(KEY, "bearer"),
        {"x-api-key": KEY.encode()},
        {"x-api-key": KEY.encode(), **bearer("another")},
        {"x-api-key": b"another", **bearer(KEY)},
    ],
)
async def test_right_keys(client: httpx.AsyncClient, headers: dict[str, bytes]) -> None:
    assert (await client.get("/v1/models", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer(""),
        bearer("another"),
        bearer(KEY + "x"),
        bearer(KEY[:-1]),
        bearer(KEY, "Basic"),
        {"authorization": KEY.encode()},
        {"x-api-key": b""},
        {"x-api-key": b"another"},
        {"x-api-key": b"\xff\xfe"},
    ],
)
async def test_wrong_keys(client: httpx.AsyncClient, headers: dict[str, bytes]) -> None:
    response = await client.get("/v1/models", headers=headers)
    message = assert_error_shape(response, 401, code="invalid_api_key")
    assert "another" not in message


@pytest.mark.parametrize("content", [b"{", b"{}", b'{"prompt": 5}', b""])
async def test_a_wrong_key_wins_over_a_wrong_body(
    client: httpx.AsyncClient, content: bytes
) -> None:
    response = await client.post("/v1/completions", content=content, headers=bearer("no"))
    assert_error_shape(response, 401, code="invalid_api_key")


async def test_what_needs_no_key(client: httpx.AsyncClient) -> None:
    for path in OPEN_PATHS:
        assert (await client.get(path)).status_code == 200
    preflight = {"origin": "http://page", "access-control-request-method": "POST"}
    assert (await client.options("/v1/completions", headers=preflight)).status_code == 200


async def test_no_key_configured(make_app: MakeApp) -> None:
    async with connect(make_app()) as client:
        response = await client.post(
            "/v1/chat/completions", json={"messages": MESSAGES}, headers=bearer("sk-111")
        )
        assert response.status_code == 200


async def test_the_admin_key_opens_its_own_routes_only(make_app: MakeApp) -> None:
    app = make_app(api_key="user", admin_key="admin")
    router = build_router("admin")

    @router.get("/v1/internal/secret")
    async def get_secret() -> str:
        return "ok"

    app.include_router(router)
    async with connect(app) as client:
        for path, right, wrong in (
            ("/v1/internal/secret", "admin", "user"),
            ("/v1/models", "user", "admin"),
        ):
            assert (await client.get(path, headers=bearer(right))).status_code == 200
            response = await client.get(path, headers=bearer(wrong))
            assert_error_shape(response, 401, code="invalid_api_key")


async def test_only_the_admin_key_is_configured(make_app: MakeApp) -> None:
    async with connect(make_app(admin_key="admin")) as client:
        assert (await client.get("/v1/models")).status_code == 200
