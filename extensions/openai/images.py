"""POST /v1/images/*: pictures from words, from a picture and words, and like a picture."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Form, Request, Response
from starlette.datastructures import UploadFile

from extensions.openai import typing as wire
from extensions.openai.docs import describe_image_stream, describe_images
from extensions.openai.file_json import EncodedFile, to_file_json
from extensions.openai.responses import (
    Json,
    build_image,
    build_image_event,
    build_image_list,
    build_image_usage,
)
from extensions.openai.streaming import Chunks, JsonAnswer, send_events, send_json
from modules.context import Context
from modules.errors import InvalidRequestError
from modules.image_backend import FinishedImage, ImageFormat, ImageOptions, OutputFormat, Size
from modules.image_files import MAX_UPLOAD_BYTES, MIB
from modules.images import ImageEvents

# In times of the usual number of steps.
EFFORTS = {"low": 0.5, "high": 1.5, "hd": 1.5, "xhigh": 2.0, "max": 3.0}
# Names from before there were streams, as the types of these know them.
STREAM_QUALITIES = {"standard": "medium", "hd": "high"}
# Models of OpenAI that give no URLs; who names them does not look for one.
BASE64_MODELS = ("gpt-image", "chatgpt-image")

GENERATION = "image_generation"
EDIT = "image_edit"


def add_routes(router: APIRouter, context: Context) -> None:
    images, settings = context.images, context.settings

    @router.post(
        "/v1/images/generations", tags=["Images"], responses=describe_image_stream(GENERATION)
    )
    async def generate(body: wire.ImageGenerationRequest, request: Request) -> Response:
        """Make images from words. With `stream`, as server-sent events."""
        events = await images.generate(_to_options(body, _count_partial_images(body)))
        if body.stream:
            return send_events(_to_frames(_to_chunks(events, body, GENERATION)), settings)
        return await send_json(_fold(events, body), request, settings)

    @router.post("/v1/images/edits", tags=["Images"], responses=describe_image_stream(EDIT))
    async def edit(
        body: Annotated[wire.ImageEditRequest, Form(media_type="multipart/form-data")],
        request: Request,
    ) -> Response:
        """Change an image, or a part of it, by words. With `stream`, as server-sent events."""
        image = await _read_upload(body.image[0], "image")
        mask = None if body.mask is None else await _read_upload(body.mask, "mask")
        options = _to_options(body, _count_partial_images(body))
        events = await images.edit(options, image, mask, body.denoising_strength)
        if body.stream:
            return send_events(_to_frames(_to_chunks(events, body, EDIT)), settings)
        return await send_json(_fold(events, body), request, settings)

    @router.post("/v1/images/variations", tags=["Images"], responses=describe_images())
    async def vary(
        body: Annotated[wire.ImageVariationRequest, Form(media_type="multipart/form-data")],
        request: Request,
    ) -> Response:
        """Make images that are like another one."""
        image = await _read_upload(body.image, "image")
        events = await images.vary(_to_options(body), image, body.denoising_strength)
        return await send_json(_fold(events, body), request, settings)


# Requests


def _to_options(body: wire.ImageOptions, num_partial_images: int = 0) -> ImageOptions:
    return ImageOptions(
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        num_images=body.n,
        size=_to_size(body.size),
        steps=body.steps,
        effort=EFFORTS.get(body.quality, 1.0),
        seed=None if body.seed == -1 else body.seed,
        sampler_name=body.sampler_name,
        guidance_scale=body.cfg_scale,
        num_partial_images=num_partial_images,
        output=OutputFormat(ImageFormat(body.output_format), body.output_compression),
    )


def _to_size(text: str) -> Size | None:
    if text == "auto":
        return None
    width, _, height = text.partition("x")
    return Size(int(width), int(height))


def _count_partial_images(body: wire.StreamedImageOptions) -> int:
    return body.partial_images if body.stream else 0


async def _read_upload(upload: UploadFile, param: str) -> bytes:
    """It is in memory already."""
    if upload.size is not None and upload.size > MAX_UPLOAD_BYTES:
        raise InvalidRequestError(f"The file is larger than {MAX_UPLOAD_BYTES // MIB} MiB.", param)
    return await upload.read()


# Answers


async def _fold(events: ImageEvents, body: wire.ImageOptions) -> JsonAnswer:
    images: list[Json] = []
    size = body.size
    async with aclosing(events):
        async for event in events:
            if isinstance(event, FinishedImage):
                images.append(build_image(_to_file(event.data, body), event.revised_prompt))
                size = str(event.size)
    answer = build_image_list(images, body.output_format, size)
    return JsonAnswer(await to_file_json(answer))


def _to_file(data: bytes, body: wire.ImageOptions) -> Json:
    is_url = body.response_format == "url"
    if body.response_format is None:
        is_url = not (body.model or "").startswith(BASE64_MODELS)
    if is_url:
        return {"url": EncodedFile(data, f"data:image/{body.output_format};base64,")}
    return {"b64_json": EncodedFile(data)}


async def _to_chunks(events: ImageEvents, body: wire.StreamedImageOptions, kind: str) -> Chunks:
    quality = STREAM_QUALITIES.get(body.quality, body.quality)
    num_partial_images = 0
    async with aclosing(events):
        async for event in events:
            own: Json
            if isinstance(event, FinishedImage):
                name, own = "completed", {"usage": build_image_usage()}
            else:
                name, own = "partial_image", {"partial_image_index": num_partial_images}
                num_partial_images += 1
            image = EncodedFile(event.data)
            size = str(event.size)
            yield build_image_event(f"{kind}.{name}", image, body.output_format, size, quality, own)


async def _to_frames(chunks: Chunks) -> AsyncGenerator[bytes, None]:
    """Events with names, as OpenAI's of this kind are, and with files in them."""
    async with aclosing(chunks):
        async for chunk in chunks:
            content = await to_file_json(chunk)
            yield f"event: {chunk['type']}\ndata: ".encode() + content + b"\n\n"
