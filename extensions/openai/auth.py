"""API keys: where a request carries one, whether it is right, and the routes that ask for it."""

import hmac
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastapi import HTTPException, Request, Response, Security, params
from fastapi.routing import APIRoute, APIRouter
from fastapi.security import HTTPBearer

from extensions.openai.form_request import FormRequest
from extensions.openai.json_request import JsonRequest
from extensions.openai.typing import ErrorResponse

# Only puts the "Authorize" button on /docs; the check is in the route, see below.
DOCS_SCHEME = Security(HTTPBearer(auto_error=False, description="The server's API key, if any."))

DOCS_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "The request is at fault."},
    "5XX": {"model": ErrorResponse, "description": "The server cannot answer."},
}


def build_router(*keys: str | None) -> APIRouter:
    """A router whose routes are open only to clients with one of `keys`; None: to all. Bodies are
    JSON, unless a route asks for a form.
    """
    return APIRouter(
        route_class=_make_route_class(keys), dependencies=[DOCS_SCHEME], responses=DOCS_ERRORS
    )


def has_key(request: Request, key: str | None) -> bool:
    """Whether the request carries `key`, or none is asked for."""
    # Compared as bytes: compare_digest refuses text beyond ASCII.
    return key is None or any(
        hmac.compare_digest(candidate, key.encode()) for candidate in _read_keys(request)
    )


def _check_keys(request: Request, keys: Sequence[str | None]) -> None:
    """Raises HTTPException 401 unless the request carries one of them."""
    if any(has_key(request, key) for key in keys):
        return
    problem = "Incorrect API key provided." if _read_keys(request) else "No API key provided."
    raise HTTPException(
        401,
        f"{problem} Send it as `Authorization: Bearer KEY` or as `x-api-key: KEY`.",
        {"WWW-Authenticate": "Bearer"},
    )


def _read_keys(request: Request) -> list[bytes]:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    keys = [token.strip()] if scheme.lower() == "bearer" else []
    keys.append(request.headers.get("x-api-key", ""))
    return [key.encode("latin-1") for key in keys if key]


def _make_route_class(keys: Sequence[str | None]) -> type[APIRoute]:
    class KeyedRoute(APIRoute):
        """Checks the key before anything else.

        A dependency would be too late: FastAPI reads and parses the body first, so a client
        without the key could make the server hold a large body, and would be told of errors in it.
        """

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()
            field = self.body_field
            is_form = field is not None and isinstance(field.field_info, params.Form)
            read = FormRequest if is_form else JsonRequest

            async def check_and_handle(request: Request) -> Response:
                _check_keys(request, keys)
                return await handle(read(request.scope, request.receive))

            return check_and_handle

    return KeyedRoute
