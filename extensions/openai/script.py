"""The OpenAI compatible API as an extension: mounts its routes, error handlers and middleware."""

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from sse_starlette.sse import AppStatus
from starlette.routing import Match, Route
from starlette.types import Scope

from extensions.openai import (
    adapters,
    batches,
    chat_completions,
    completions,
    embeddings,
    files,
    fine_tuning,
    images,
    internal,
    legacy,
    logits,
    model_management,
    models,
    moderations,
    rerank,
    search,
    speech,
    tokens,
    transcriptions,
)
from extensions.openai.auth import build_router
from extensions.openai.chat_prompts import check_settings
from extensions.openai.docs import add_docs
from extensions.openai.embeddings import TRUNCATED_INPUTS
from extensions.openai.errors import add_error_handlers
from extensions.openai.middleware import (
    REQUEST_ID,
    BodyLimitMiddleware,
    BodyLogMiddleware,
    InternalErrorMiddleware,
    RequestIdMiddleware,
    TrailingSlashMiddleware,
)
from extensions.openai.streaming import DROPPED_MESSAGES
from modules.context import Context
from modules.settings import Settings

MIB = 2**20
ENDPOINTS = (
    chat_completions,
    completions,
    models,
    internal,
    logits,
    tokens,
    embeddings,
    rerank,
    search,
    moderations,
    images,
    transcriptions,
    speech,
    files,
    batches,
    fine_tuning,
    legacy,
)
ADMIN_ENDPOINTS = (adapters, model_management)
"""Those that change what is loaded."""


def setup(context: Context) -> None:
    check_settings(context.settings)
    router = build_router(context.settings.api_key)
    for endpoints in ENDPOINTS:
        endpoints.add_routes(router, context)
    admin_router = build_router(context.settings.admin_key)
    for admin_endpoints in ADMIN_ENDPOINTS:
        admin_endpoints.add_admin_routes(admin_router, context)
    options_route = OptionsRoute("/{path:path}", _answer_options, methods=["OPTIONS"])
    # As they are: `include_router` would build each once more, while the first request waits.
    context.app.router.routes.extend([*router.routes, *admin_router.routes, options_route])
    add_docs(context.app)
    add_error_handlers(context.app)
    _add_middleware(context.app, context.settings)
    # At shutdown the engine ends every generation with an error, and each stream sends it on as its
    # last event; sse-starlette would cut all streams off before.
    AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]


def _add_middleware(app: FastAPI, settings: Settings) -> None:
    """From the innermost to the outermost: each one added surrounds the ones before."""
    if settings.debug:
        app.add_middleware(BodyLogMiddleware)
    app.add_middleware(BodyLimitMiddleware, max_bytes=settings.max_request_size * MIB)
    app.add_middleware(TrailingSlashMiddleware)
    app.add_middleware(InternalErrorMiddleware, debug=settings.debug)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origins,
        allow_methods=["*"],
        allow_headers=["*"],
        allow_credentials=True,
        # Pages on the web may call a server in the local network, where the origins allow it.
        allow_private_network=True,
        expose_headers=[REQUEST_ID, DROPPED_MESSAGES, TRUNCATED_INPUTS],
    )
    app.add_middleware(RequestIdMiddleware)


class OptionsRoute(Route):
    """Answers OPTIONS on any path, and leaves 404 and 405 for other methods to the router."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] != "http" or scope["method"] != "OPTIONS":
            return Match.NONE, {}
        return super().matches(scope)


async def _answer_options(request: Request) -> Response:
    return JSONResponse("OK")
