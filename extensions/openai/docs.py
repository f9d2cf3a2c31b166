"""/docs: Swagger UI from files on this machine, and what it says of answers.

The examples are made by the builders of the answers themselves.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel

from extensions.openai.responses import (
    Choice,
    Envelope,
    Json,
    build_chat_chunk,
    build_chat_completion,
    build_image,
    build_image_event,
    build_image_list,
    build_image_usage,
    build_load_event,
    build_text_chunk,
    build_text_completion,
    build_usage,
)
from extensions.openai.streaming import DONE, to_frame
from extensions.openai.typing import ChatCompletion, ImageList, TextCompletion

STATIC_PATH = "/docs/static"
MODEL = "SmolLM2-135M-Instruct"
# How a PNG begins, in base64.
FILE = "iVBORw0KGgo..."

Responses = dict[int | str, dict[str, Any]]


def add_docs(app: FastAPI) -> None:
    app.mount(STATIC_PATH, StaticFiles(packages=[("fastapi_offline", "static")]))

    @app.get("/docs", include_in_schema=False)
    async def get_docs() -> HTMLResponse:
        # Addresses are relative: they hold behind a proxy that serves the API under a prefix.
        static = STATIC_PATH.removeprefix("/")
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=app.title,
            swagger_js_url=f"{static}/swagger-ui-bundle.js",
            swagger_css_url=f"{static}/swagger-ui.css",
            swagger_favicon_url=f"{static}/favicon.png",
            # null: nobody else is asked whether the document is valid.
            swagger_ui_parameters={"validatorUrl": None},
        )


# What the routes say of their answers


def describe_chat() -> Responses:
    envelope = Envelope("chatcmpl-123", 1700000000, MODEL)
    choice = Choice(0, "Hello! How can I help you?", "stop")
    chunks = [
        build_chat_chunk(envelope, 0, {"role": "assistant", "content": "", "refusal": None}),
        build_chat_chunk(envelope, 0, {"content": "Hello!"}),
        build_chat_chunk(envelope, 0, {}, "stop"),
    ]
    whole = build_chat_completion(envelope, [choice], build_usage(31, 9, 0))
    return _describe(ChatCompletion, whole, chunks)


def describe_completion() -> Responses:
    envelope = Envelope("cmpl-123", 1700000000, MODEL)
    choice = Choice(0, " Preheat the oven.", "stop")
    chunks = [
        build_text_chunk(envelope, 0, " Preheat"),
        build_text_chunk(envelope, 0, "", "stop"),
    ]
    whole = build_text_completion(envelope, [choice], build_usage(9, 5, 0))
    return _describe(TextCompletion, whole, chunks)


def describe_images() -> Responses:
    image = build_image({"url": f"data:image/png;base64,{FILE}"}, None)
    whole = build_image_list([image], "png", "512x512")
    return {200: {"model": ImageList, "content": {"application/json": {"example": whole}}}}


def describe_image_stream(kind: str) -> Responses:
    described = ("png", "512x512", "auto")
    partial = {"partial_image_index": 0}
    finished = {"usage": build_image_usage()}
    events = [
        build_image_event(f"{kind}.partial_image", FILE, *described, partial),
        build_image_event(f"{kind}.completed", FILE, *described, finished),
    ]
    stream = "".join(f"event: {event['type']}\n{to_frame(event).decode()}" for event in events)
    answer = describe_images()
    answer[200]["description"] = "The answer; with `stream`, the images as server-sent events."
    answer[200]["content"]["text/event-stream"] = {
        "schema": {"type": "string"},
        "example": stream,
    }
    return answer


def describe_load() -> Responses:
    stages = [("finding", None), ("downloading", 0.5), ("loading weights", None), ("ready", None)]
    events = [to_frame(build_load_event(stage, fraction)) for stage, fraction in stages]
    return {
        200: {
            "description": "`OK`; with `stream`, how far it is as server-sent events.",
            "content": {
                "application/json": {"example": "OK"},
                "text/event-stream": {
                    "schema": {"type": "string"},
                    "example": b"".join([*events, DONE]).decode(),
                },
            },
        }
    }


def _describe(model: type[BaseModel], whole: Json, chunks: list[Json]) -> Responses:
    stream = b"".join([*map(to_frame, chunks), DONE]).decode()
    return {
        200: {
            "model": model,
            "description": "The answer; with `stream`, pieces of it as server-sent events.",
            "content": {
                "application/json": {"example": whole},
                "text/event-stream": {"schema": {"type": "string"}, "example": stream},
            },
        }
    }
