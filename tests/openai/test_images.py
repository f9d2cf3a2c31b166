"""Images of a web UI: what it is asked for, what clients get, and what becomes of faults."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import logging
import random
import re
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from openai.types import ImageEditCompletedEvent, ImageGenCompletedEvent, ImagesResponse
from PIL import Image

from extensions.openai import typing
from modules import images as images_module
from modules import sd_webui
from modules.errors import CapabilityError, InvalidRequestError
from modules.image_backend import ImageOptions, Size
from modules.images import Images
from modules.settings import Settings
from tests.conftest import AsgiCall, MakeApp, connect, run_server, wait_for
from tests.openai.assertions import assert_error_object, assert_error_shape
from tests.openai.test_clients import assert_no_extra_fields
from tests.stable_diffusion import WebUi, colour_of, decode, encode

pytestmark = pytest.mark.anyio

GENERATIONS, EDITS, VARIATIONS = (
    f"/v1/images/{name}" for name in ("generations", "edits", "variations")
)
PROMPT = "A lighthouse at dusk"


@pytest.fixture(scope="module")
def running_web_ui() -> Iterator[tuple[WebUi, str]]:
    web_ui = WebUi()
    with run_server(web_ui.build_app()) as server:
        yield web_ui, server.url


@pytest.fixture
def web_ui(running_web_ui: tuple[WebUi, str]) -> WebUi:
    web_ui, _ = running_web_ui
    web_ui.reset()
    return web_ui


@pytest.fixture
def url(running_web_ui: tuple[WebUi, str], web_ui: WebUi) -> str:
    return running_web_ui[1]


@pytest.fixture
def app(make_app: MakeApp, url: str) -> FastAPI:
    return make_app(sd_webui_url=url)


@pytest.fixture
async def api(client: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        api_key="none", base_url="http://test/v1", http_client=client, max_retries=0
    )


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sd_webui, "PROGRESS_SECONDS", 0.01)


async def generate(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post(GENERATIONS, json={"prompt": PROMPT, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def open_url(url: str) -> Image.Image:
    kind, _, encoded = url.partition(";base64,")
    picture = decode(encoded)
    assert kind == f"data:image/{str(picture.format).lower()}"
    return picture


def picture_file(
    size: tuple[int, int] = (128, 64), image_format: str = "PNG", mode: str = "RGB"
) -> bytes:
    target = io.BytesIO()
    Image.new(mode, size, "red").save(target, image_format)
    return target.getvalue()


def mask_file(size: tuple[int, int] = (128, 64), hole: tuple[int, ...] = (0, 0, 64, 64)) -> bytes:
    mask = Image.new("RGBA", size, "black")
    mask.paste((0, 0, 0, 0), hole)
    target = io.BytesIO()
    mask.save(target, "PNG")
    return target.getvalue()


# As /docs has it


@pytest.fixture
async def document(client: httpx.AsyncClient) -> dict[str, Any]:
    answer: dict[str, Any] = (await client.get("/openapi.json")).json()
    return answer


async def test_answers_are_as_described(
    client: httpx.AsyncClient, document: dict[str, Any]
) -> None:
    for path, body_type in (
        (GENERATIONS, "application/json"),
        (EDITS, "multipart/form-data"),
        (VARIATIONS, "multipart/form-data"),
    ):
        operation = document["paths"][path]["post"]
        assert list(operation["requestBody"]["content"]) == [body_type]
        content = operation["responses"]["200"]["content"]
        assert content["application/json"]["schema"]["$ref"].endswith("/ImageList")
        assert ("text/event-stream" in content) is (path != VARIATIONS)
        typing.ImageList.model_validate(content["application/json"]["example"], strict=True)
    answer = await generate(client, size="64x64")
    assert typing.ImageList.model_validate(answer).model_dump(exclude_unset=True) == answer


async def test_the_example_of_a_request_works(
    client: httpx.AsyncClient, document: dict[str, Any]
) -> None:
    [example] = document["components"]["schemas"]["ImageGenerationRequest"]["examples"]
    await generate(client, **example)
    for name in ("ImageGenerationRequest", "ImageEditRequest", "ImageVariationRequest"):
        for field, schema in document["components"]["schemas"][name]["properties"].items():
            assert schema.get("description"), f"{name}.{field} has no description"


# What the web UI is asked for


async def test_the_defaults(client: httpx.AsyncClient, web_ui: WebUi) -> None:
    answer = await generate(client)
    [asked] = web_ui.requests
    assert asked.model_dump(exclude={"force_task_id"}) == {
        "prompt": PROMPT,
        "negative_prompt": "",
        "seed": -1,
        "steps": 30,
        "sampler_name": "DPM++ 2M Karras",
        "cfg_scale": 7.0,
        "width": 512,
        "height": 512,
        "batch_size": 1,
        "n_iter": 1,
        "send_images": True,
        "save_images": False,
        "enable_hr": True,
        "hr_scale": 2.0,
        "hr_resize_x": 1024,
        "hr_resize_y": 1024,
        "hr_upscaler": "Latent",
        "denoising_strength": 0.68,
    }
    assert open_url(answer["data"][0]["url"]).size == (1024, 1024)
    assert (answer["size"], answer["output_format"]) == ("1024x1024", "png")


async def test_all_fields(client: httpx.AsyncClient, web_ui: WebUi) -> None:
    answer = await generate(
        client,
        n=3,
        size="512x256",
        negative_prompt="rain",
        steps=12,
        seed=5,
        sampler="Euler a",
        guidance_scale=4.5,
        response_format="b64_json",
    )
    [asked] = web_ui.requests
    assert (asked.negative_prompt, asked.steps, asked.seed) == ("rain", 12, 5)
    assert (asked.sampler_name, asked.cfg_scale) == ("Euler a", 4.5)
    assert asked.batch_size * asked.n_iter == 3
    pictures = [decode(image["b64_json"]) for image in answer["data"]]
    assert [picture.size for picture in pictures] == [(512, 256)] * 3
    colours = [picture.getpixel((50, 50)) for picture in pictures]
    assert colours == [colour_of(seed) for seed in (5, 6, 7)]


@pytest.mark.parametrize(
    ("num_images", "batch_size"), [(1, 1), (2, 2), (4, 4), (5, 1), (6, 3), (8, 4), (10, 2)]
)
async def test_several_at_a_time(
    client: httpx.AsyncClient, web_ui: WebUi, num_images: int, batch_size: int
) -> None:
    answer = await generate(client, n=num_images, size="64x64")
    assert len(answer["data"]) == num_images
    assert web_ui.requests[0].batch_size == batch_size


@pytest.mark.parametrize(
    ("base_size", "size", "small"),
    [
        (512, "512x512", None),
        (512, "608x608", None),
        (512, "616x616", (512, 512)),
        (512, "1920x1080", (912, 512)),
        (512, "1024x1792", (512, 896)),
        (1024, "1024x1024", None),
        (1024, "1536x1536", (1024, 1024)),
    ],
)
async def test_large_ones_are_made_small_first(
    make_app: MakeApp,
    url: str,
    web_ui: WebUi,
    base_size: int,
    size: str,
    small: tuple[int, int] | None,
) -> None:
    async with connect(make_app(sd_webui_url=url, sd_base_model_size=base_size)) as client:
        answer = await generate(client, size=size)
    [asked] = web_ui.requests
    assert asked.enable_hr is (small is not None)
    width, height = map(int, size.split("x"))
    assert (asked.width, asked.height) == (small or (width, height))
    assert open_url(answer["data"][0]["url"]).size == (width, height)
    assert answer["size"] == size


@pytest.mark.parametrize(
    ("quality", "steps"), [("low", 15), ("medium", 30), ("hd", 45), ("xhigh", 60), ("max", 90)]
)
async def test_quality_is_a_number_of_steps(
    client: httpx.AsyncClient, web_ui: WebUi, quality: str, steps: int
) -> None:
    await generate(client, quality=quality, size="64x64")
    await generate(client, quality=quality, size="64x64", steps=7)
    assert [asked.steps for asked in web_ui.requests] == [steps, 7]


async def test_neutral_values_are_accepted(client: httpx.AsyncClient) -> None:
    await generate(
        client,
        size="64x64",
        model=None,
        style="vivid",
        background="opaque",
        moderation="low",
        user="kim",
        stream=False,
        partial_images=2,
        output_compression=100,
        input_fidelity="low",
    )


# What clients get


@pytest.mark.parametrize("web_ui_format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
async def test_formats(
    client: httpx.AsyncClient, web_ui: WebUi, web_ui_format: str, output_format: str
) -> None:
    web_ui.image_format = web_ui_format
    answer = await generate(client, size="64x64", output_format=output_format)
    assert open_url(answer["data"][0]["url"]).format == output_format.upper()
    assert answer["output_format"] == output_format


async def test_compression(client: httpx.AsyncClient) -> None:
    small, large = [
        await generate(client, size="256x256", output_format="jpeg", output_compression=value)
        for value in (10, 100)
    ]
    assert len(small["data"][0]["url"]) < len(large["data"][0]["url"])


@pytest.mark.parametrize(
    ("asked", "name"),
    [(None, "url"), ("dall-e-2", "url"), ("gpt-image-2", "b64_json"), ("any", "url")],
)
async def test_the_default_is_what_openai_has_for_a_model(
    client: httpx.AsyncClient, asked: str | None, name: str
) -> None:
    assert list((await generate(client, size="64x64", model=asked))["data"][0]) == [name]
    answer = await generate(client, size="64x64", model=asked, response_format="url")
    assert list(answer["data"][0]) == ["url"]


async def test_what_a_style_has_made_of_the_prompt(client: httpx.AsyncClient) -> None:
    answer = await generate(client, prompt="a __colour__ door", size="64x64")
    assert answer["data"][0]["revised_prompt"] == "a blue door"


async def test_openai_generates(api: openai.AsyncOpenAI, client: httpx.AsyncClient) -> None:
    answer = await api.images.generate(prompt=PROMPT, model="gpt-image-2", n=2, size="64x64")
    assert answer.data is not None and len(answer.data) == 2
    assert decode(answer.data[0].b64_json or "").size == (64, 64)
    parsed = ImagesResponse.model_validate(await generate(client, size="64x64"), strict=True)
    assert_no_extra_fields(parsed)


async def test_openai_edits(api: openai.AsyncOpenAI, web_ui: WebUi) -> None:
    answer = await api.images.edit(
        image=picture_file(), mask=mask_file(), prompt="a blue door", extra_body={"seed": 3}
    )
    [asked] = web_ui.requests
    assert (asked.width, asked.height, asked.denoising_strength) == (128, 64, 1.0)
    mask = decode(asked.mask).convert("L")
    assert (mask.getpixel((10, 10)), mask.getpixel((100, 10))) == (255, 0)
    picture = open_url(answer.data[0].url)
    assert picture.getpixel((100, 30)) == (255, 0, 0)
    assert picture.getpixel((30, 30)) == colour_of(3)


async def test_openai_edits_without_a_mask(api: openai.AsyncOpenAI, web_ui: WebUi) -> None:
    """All of a picture, or what is transparent in it."""
    await api.images.edit(image=[picture_file()], prompt="a blue door", size="256x256")
    await api.images.edit(image=mask_file(), prompt="a blue door")
    whole, hole = web_ui.requests
    assert (whole.mask, whole.denoising_strength, whole.width) == (None, 0.75, 256)
    assert decode(hole.mask).convert("L").getbbox() == (0, 0, 64, 64)
    assert decode(hole.init_images[0]).mode == "RGB"


async def test_openai_varies(api: openai.AsyncOpenAI, web_ui: WebUi) -> None:
    answer = await api.images.create_variation(
        image=picture_file(), n=2, response_format="b64_json", extra_body={"strength": "0.3"}
    )
    [asked] = web_ui.requests
    assert (asked.prompt, asked.mask, asked.denoising_strength) == ("", None, 0.3)
    assert [decode(image.b64_json).size for image in answer.data] == [(128, 64)] * 2


@pytest.mark.parametrize(
    ("sent", "asked"),
    [
        ((3000, 2000), (1248, 832)),
        ((10, 10), (64, 64)),
        ((100, 1), (96, 64)),
        ((130, 70), (128, 64)),
    ],
)
async def test_an_image_decides_about_the_size(
    client: httpx.AsyncClient, web_ui: WebUi, sent: tuple[int, int], asked: tuple[int, int]
) -> None:
    response = await client.post(VARIATIONS, files={"image": picture_file(sent)})
    assert response.status_code == 200, response.text
    assert (web_ui.requests[0].width, web_ui.requests[0].height) == asked


# Streams


async def test_openai_streams(api: openai.AsyncOpenAI, web_ui: WebUi) -> None:
    web_ui.is_slow = True
    stream = await api.images.generate(
        prompt=PROMPT, size="128x128", stream=True, partial_images=2, output_format="webp"
    )
    *partial, last = [event async for event in stream]
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 2
    assert [event.partial_image_index for event in partial] == [0, 1]
    red = [decode(event.b64_json).convert("RGB").getpixel((5, 5))[0] for event in partial]
    assert red[0] < red[1]
    assert isinstance(last, ImageGenCompletedEvent)
    assert (last.size, last.output_format, last.quality) == ("128x128", "webp", "auto")
    assert decode(last.b64_json).format == "WEBP"
    for event in (*partial, last):
        assert_no_extra_fields(event)
        type(event).model_validate(event.model_dump(), strict=True)


async def test_openai_streams_edits(api: openai.AsyncOpenAI) -> None:
    stream = await api.images.edit(image=picture_file(), prompt=PROMPT, stream=True, n=2)
    events = [event async for event in stream]
    assert len(events) == 2
    for event in events:
        assert isinstance(event, ImageEditCompletedEvent)
        assert_no_extra_fields(event)


async def test_frames(client: httpx.AsyncClient) -> None:
    body = {"prompt": PROMPT, "size": "64x64", "stream": True}
    response = await client.post(GENERATIONS, json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    name, data, *rest = response.text.split("\n")
    assert rest == ["", ""]
    assert name == "event: image_generation.completed"
    assert json.loads(data.removeprefix("data: "))["type"] == "image_generation.completed"


async def test_a_fault_in_a_stream(client: httpx.AsyncClient, web_ui: WebUi) -> None:
    web_ui.answer = JSONResponse({"error": "OutOfMemoryError", "detail": ""}, 500)
    body = {"prompt": PROMPT, "size": "64x64", "stream": True}
    response = await client.post(GENERATIONS, json=body)
    assert response.status_code == 200
    error = json.loads(response.text.removeprefix("data: "))
    assert "OutOfMemoryError" in assert_error_object(error, 503, code="backend_unavailable")


# Who leaves


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_the_web_ui_stops_when_the_client_leaves(
    app: FastAPI, web_ui: WebUi, is_streamed: bool
) -> None:
    web_ui.is_slow = True
    call = AsgiCall(app, GENERATIONS, {"prompt": PROMPT, "stream": is_streamed})
    await wait_for(web_ui.begun)
    call.disconnect()
    await call.wait()
    await wait_for(web_ui.interrupted)
    web_ui.is_slow = False
    async with connect(app) as client:  # the next one has its turn
        await generate(client, size="64x64")


async def test_somebody_elses_image_is_not_interrupted(
    app: FastAPI, url: str, web_ui: WebUi
) -> None:
    """One that is made for the web UI's own page just then, while ours waits for its turn."""
    web_ui.is_slow = True
    async with httpx.AsyncClient(base_url=url) as page:
        theirs = asyncio.create_task(page.post("/sdapi/v1/txt2img", json=THEIRS))
        await wait_for(web_ui.begun)
        ours = AsgiCall(app, GENERATIONS, {"prompt": PROMPT, "size": "64x64"})
        while len(web_ui.requests) < 2:
            await page.get("/sdapi/v1/progress?skip_current_image=true")
        ours.disconnect()
        await ours.wait()
        for _ in range(3):  # which is how often one has to look until it is done
            assert web_ui.interrupted_tasks == []
            await page.get("/sdapi/v1/progress")
        assert (await theirs).status_code == 200
    await wait_for(web_ui.interrupted)
    assert THEIRS["force_task_id"] not in web_ui.interrupted_tasks


THEIRS = {
    "prompt": "a cat",
    "negative_prompt": "",
    "seed": 1,
    "steps": 3,
    "sampler_name": "Euler",
    "cfg_scale": 7.0,
    "width": 64,
    "height": 64,
    "batch_size": 1,
    "n_iter": 1,
    "send_images": True,
    "save_images": False,
    "force_task_id": "theirs",
}


async def test_no_more_wait_than_can_be_held(
    url: str, web_ui: WebUi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_module, "MAX_WAITING", 1)
    images = Images(Settings(sd_webui_url=url))
    web_ui.is_slow = True
    first = await images.generate(ImageOptions(PROMPT))
    working = asyncio.create_task(anext(first))
    await wait_for(web_ui.begun)
    second = await images.vary(ImageOptions(), picture_file(), None)
    for _ in range(2):
        with pytest.raises(CapabilityError, match="Try again later"):
            await images.edit(ImageOptions(PROMPT), picture_file(), None, None)
    del second  # whose work has never begun
    third = await images.generate(ImageOptions(PROMPT, size=Size(64, 64)))
    working.cancel()
    await asyncio.wait([working])
    web_ui.is_slow = False
    assert len([event async for event in third]) == 1
    for _ in range(3):  # neither what is done nor what is refused keeps its place
        with pytest.raises(InvalidRequestError):
            await images.edit(ImageOptions(PROMPT), b"", None, None)
        assert len([e async for e in await images.generate(ImageOptions(size=Size(64, 64)))]) == 1
    images.close()


async def test_who_comes_too_many_may_try_again(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_module, "MAX_WAITING", -1)
    for body in ({"prompt": PROMPT}, {"prompt": PROMPT, "stream": True}):
        response = await client.post(GENERATIONS, json=body)
        assert "later" in assert_error_shape(response, 503, code="unavailable")


async def test_a_timeout_interrupts(make_app: MakeApp, url: str, web_ui: WebUi) -> None:
    web_ui.is_slow = True
    async with connect(make_app(sd_webui_url=url, image_timeout=1)) as client:
        response = await client.post(GENERATIONS, json={"prompt": PROMPT})
    message = assert_error_shape(response, 503, code="backend_unavailable")
    assert "longer than 1 s (openai-image_timeout)" in message
    await wait_for(web_ui.interrupted)


async def test_what_is_at_work_when_the_server_ends(url: str, web_ui: WebUi) -> None:
    web_ui.is_slow = True
    images = Images(Settings(sd_webui_url=url))
    events = await images.generate(ImageOptions(PROMPT))
    first = asyncio.create_task(anext(events))
    await wait_for(web_ui.begun)
    await asyncio.to_thread(images.close)
    with pytest.raises(CapabilityError, match="shutting down"):
        await first
    assert web_ui.interrupted.is_set()
    with pytest.raises(CapabilityError, match="shutting down"):
        await images.generate(ImageOptions(PROMPT))


# A web UI that does not work


async def test_none_is_configured(make_app: MakeApp) -> None:
    async with connect(make_app()) as client:
        response = await client.post(GENERATIONS, json={"prompt": PROMPT})
        message = assert_error_shape(response, 503, code="not_configured")
        for name in ("SD_WEBUI_URL", "openai-sd_webui_url", "openai-image_model"):
            assert name in message
        response = await client.post(VARIATIONS, files={"image": picture_file()})
        assert_error_shape(response, 503, code="not_configured")


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_an_unreachable_one_is_named(make_app: MakeApp, is_streamed: bool) -> None:
    """Without its password. Streams too are refused before they begin."""
    address = "http://kim:pass-word@127.0.0.1:1/sd"
    async with connect(make_app(sd_webui_url=address)) as client:
        body = {"prompt": PROMPT, "stream": is_streamed}
        response = await client.post(GENERATIONS, json=body)
    message = assert_error_shape(response, 503, code="backend_unavailable")
    assert "http://127.0.0.1:1/sd" in message
    assert "pass" not in message and "kim" not in message


async def test_proxies_of_the_environment_are_not_used(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    await generate(client, size="64x64")


async def test_user_and_password(
    make_app: MakeApp,
    url: str,
    web_ui: WebUi,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    web_ui.auth = "kim:pass-wörd"
    secret = url.replace("//", "//kim:pass-w%C3%B6rd@")
    async with connect(make_app(sd_webui_url=secret)) as client:
        await generate(client, size="64x64")
    async with connect(make_app(sd_webui_url=url)) as client:
        response = await client.post(GENERATIONS, json={"prompt": PROMPT})
        assert "USER:PASSWORD" in assert_error_shape(response, 503, code="backend_unavailable")
    assert "pass-w" not in caplog.text
    assert PROMPT not in caplog.text


PICTURE = encode(Image.new("RGB", (64, 64)))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (HTMLResponse("<p>A lighthouse"), "something else"),
        (Response("[" * 100_000), "something else"),
        (JSONResponse([1]), "something else"),
        (JSONResponse({"images": None, "info": ""}), "0 of 2"),
        (JSONResponse({"images": [PICTURE], "info": "{}"}), "1 of 2"),
        (JSONResponse({"images": [PICTURE, "A lighthouse"]}), "base64"),
        (JSONResponse({"images": [PICTURE, 5]}), "no PNG"),
        (JSONResponse({"images": [PICTURE, "QUJD"]}), "no PNG"),
        (JSONResponse({"images": [PICTURE, PICTURE[:80]]}), "broken|no PNG"),
        (JSONResponse({"error": "OSError", "errors": "A lighthouse"}, 500), r"500 \(OSError\)"),
        (JSONResponse({"detail": [{"input": "A lighthouse"}]}, 422), "status 422"),
        (HTMLResponse("A lighthouse", 502), "status 502"),
        (HTMLResponse("A lighthouse", 302, {"location": "http://127.0.0.1:1/"}), "status 302"),
        (JSONResponse({"detail": "Not Found"}, 404), "--api"),
    ],
)
async def test_wrong_answers(
    client: httpx.AsyncClient, web_ui: WebUi, answer: Any, reason: str
) -> None:
    web_ui.answer = answer
    response = await client.post(GENERATIONS, json={"prompt": PROMPT, "n": 2, "size": "64x64"})
    message = assert_error_shape(response, 503, code="backend_unavailable")
    assert "lighthouse" not in message
    assert re.search(reason, message)


async def test_details_that_are_nested_too_deeply(client: httpx.AsyncClient, web_ui: WebUi) -> None:
    """They are not needed."""
    web_ui.answer = JSONResponse({"images": [PICTURE], "info": "[" * 100_000})
    assert len((await generate(client, size="64x64"))["data"]) == 1


async def test_an_answer_that_is_too_large(client: httpx.AsyncClient, web_ui: WebUi) -> None:
    async def send() -> AsyncIterator[bytes]:
        for _ in range(32):
            yield bytes(2**20)

    web_ui.answer = StreamingResponse(send())
    response = await client.post(GENERATIONS, json={"prompt": PROMPT, "n": 2, "size": "512x512"})
    message = assert_error_shape(response, 503, code="backend_unavailable")
    assert "more than was asked for" in message


async def test_the_largest_pictures_are_read(
    client: httpx.AsyncClient, web_ui: WebUi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of pixels that nothing packs, and with a picture of all before them."""
    monkeypatch.setattr(sd_webui, "MAX_ANSWER_BYTES", 2**14)
    noise = Image.frombytes("RGBA", (256, 256), random.Random(1).randbytes(256 * 256 * 4))
    info = json.dumps({"index_of_first_image": 1})
    web_ui.answer = JSONResponse({"images": [encode(noise)] * 2, "info": info})
    assert len((await generate(client, size="256x256"))["data"]) == 1


async def test_nothing_is_unpacked(client: httpx.AsyncClient, web_ui: WebUi) -> None:
    content = gzip.compress(json.dumps({"images": [PICTURE]}).encode())
    web_ui.answer = Response(content, headers={"content-encoding": "gzip"})
    response = await client.post(GENERATIONS, json={"prompt": PROMPT, "size": "64x64"})
    assert_error_shape(response, 503, code="backend_unavailable")


async def test_nothing_is_asked_for_packed(make_app: MakeApp) -> None:
    app = WebUi().build_app()
    app.add_middleware(GZipMiddleware, minimum_size=1)
    with run_server(app) as server:
        async with connect(make_app(sd_webui_url=server.url)) as client:
            await generate(client, size="64x64")


async def test_more_pictures_than_were_asked_for(client: httpx.AsyncClient, web_ui: WebUi) -> None:
    """A grid comes first, and extensions of the web UI add theirs at the end."""
    grid, own, other = (encode(Image.new("RGB", (64, side))) for side in (8, 64, 16))
    info = json.dumps({"index_of_first_image": 1})
    web_ui.answer = JSONResponse({"images": [grid, own, other], "info": info})
    answer = await generate(client, size="64x64")
    assert [open_url(image["url"]).size for image in answer["data"]] == [(64, 64)]


@pytest.mark.parametrize(("module", "package"), [("httpx2", "httpx2"), ("PIL.Image", "pillow")])
async def test_a_package_is_missing(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    response = await client.post(GENERATIONS, json={"prompt": PROMPT})
    message = assert_error_shape(response, 503, code="package_missing")
    assert message.endswith(f"pip install {package}")


async def test_a_program_without_the_api(make_app: MakeApp) -> None:
    with run_server(FastAPI()) as server:
        async with connect(make_app(sd_webui_url=server.url)) as client:
            response = await client.post(GENERATIONS, json={"prompt": PROMPT})
    assert "--api" in assert_error_shape(response, 503, code="backend_unavailable")


# What clients should not have sent


async def test_an_unknown_sampler(client: httpx.AsyncClient) -> None:
    response = await client.post(GENERATIONS, json={"prompt": PROMPT, "sampler_name": "Oiler"})
    assert_error_shape(response, 400, param="sampler_name")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("prompt", [None, "", 5, ["a"], "a" * 32_001]),
        ("n", [0, 11, 1.5, "2", True]),
        ("size", [5, "", "512", "512x", "0x0", "511x512", "56x512", "4104x64", "4096x4096", "axb"]),
        ("response_format", ["file", 5]),
        ("output_format", ["gif", "svg", "PNG"]),
        ("output_compression", [-1, 101, 50]),
        ("quality", ["best", 5]),
        ("style", ["natural", 5]),
        ("background", ["transparent"]),
        ("steps", [0, 151, "30", True]),
        ("seed", [-2, 2**32, "7"]),
        ("sampler_name", [5, "a" * 257]),
        ("cfg_scale", [-1, 101, "7"]),
        ("stream", ["yes", 1]),
        ("partial_images", [-1, 4]),
        ("svg", [{"model": "x"}]),
        ("frame_count", [3]),
        ("input_fidelity", ["high"]),
    ],
)
async def test_bad_values(client: httpx.AsyncClient, field: str, values: list[Any]) -> None:
    for value in values:
        response = await client.post(GENERATIONS, json={"prompt": PROMPT, field: value})
        assert_error_shape(response, 400, param=field)


def animated_file(image_format: str) -> bytes:
    target = io.BytesIO()
    first, second = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    first.save(target, image_format, save_all=True, append_images=[second])
    return target.getvalue()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'


@pytest.mark.parametrize("param", ["image", "mask"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no PNG, JPEG, GIF or WebP"),
        (SVG, "no PNG, JPEG, GIF or WebP"),
        (b"<!doctype html><p>Hello", "no PNG, JPEG, GIF or WebP"),
        (picture_file(image_format="BMP"), "no PNG, JPEG, GIF or WebP"),
        (animated_file("GIF"), "animated"),
        (animated_file("PNG"), "animated"),
        (animated_file("WEBP"), "animated"),
        (picture_file()[:-30], "broken"),
        (picture_file(image_format="JPEG")[:-50], "broken"),
    ],
)
async def test_bad_uploads(
    client: httpx.AsyncClient, web_ui: WebUi, param: str, content: bytes, reason: str
) -> None:
    files = {
        "image": ("a.png", picture_file(), "image/png"),
        param: ("b.png", content, "image/png"),
    }
    response = await client.post(EDITS, files=files, data={"prompt": PROMPT})
    assert reason in assert_error_shape(response, 400, param=param)
    assert web_ui.requests == []


async def test_masks_that_do_not_fit(client: httpx.AsyncClient) -> None:
    for mask, reason in (
        (mask_file((64, 64)), "64x64 pixels, and the image 128x64"),
        (picture_file(), "transparent nowhere"),
        (mask_file(hole=(0, 0, 0, 0)), "transparent nowhere"),
    ):
        files = {"image": picture_file(), "mask": mask}
        response = await client.post(EDITS, files=files, data={"prompt": PROMPT})
        assert reason in assert_error_shape(response, 400, param="mask")


@pytest.mark.parametrize(
    ("path", "data", "param"),
    [
        (EDITS, {"prompt": ""}, "prompt"),
        (EDITS, {"prompt": PROMPT, "n": "11"}, "n"),
        (EDITS, {"prompt": PROMPT, "n": "two"}, "n"),
        (EDITS, {"prompt": PROMPT, "strength": "0"}, "strength"),
        (EDITS, {"prompt": PROMPT, "stream": "perhaps"}, "stream"),
        (EDITS, {"prompt": PROMPT, "background": "transparent"}, "background"),
        (EDITS, {"prompt": PROMPT, "input_fidelity": "high"}, "input_fidelity"),
        (VARIATIONS, {"size": "1x1"}, "size"),
        (VARIATIONS, {"stream": "true"}, "stream"),
    ],
)
async def test_bad_fields_of_forms(
    client: httpx.AsyncClient, path: str, data: dict[str, str], param: str
) -> None:
    response = await client.post(path, data=data, files={"image": picture_file()})
    assert_error_shape(response, 400, param=param)


@pytest.mark.parametrize("path", [EDITS, VARIATIONS])
async def test_forms_without_a_file(client: httpx.AsyncClient, path: str) -> None:
    data = {"prompt": PROMPT}
    response = await client.post(path, data=data, files={"other": b"a"})
    assert "Missing" in assert_error_shape(response, 400, param="image")
    response = await client.post(path, data={**data, "image": "a.png"}, files={"other": b"a"})
    assert "file" in assert_error_shape(response, 400, param="image")
    response = await client.post(path, json=data)
    assert_error_shape(response, 400)


async def test_several_images_are_refused(client: httpx.AsyncClient) -> None:
    files = [("image[]", picture_file()), ("image[]", picture_file())]
    response = await client.post(EDITS, files=files, data={"prompt": PROMPT})
    assert "one image" in assert_error_shape(response, 400, param="image")
