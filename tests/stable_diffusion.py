"""A web UI that speaks AUTOMATIC1111's API and draws by rule instead of by model.

A picture has the colour of its seed, and a dark frame; an edited one keeps what its mask does not
show white. Requests wait for each other, as they do there.
"""

from __future__ import annotations

import asyncio
import base64
import colorsys
import io
import json
import threading
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import FastAPI, Header, HTTPException
from fastapi.responses import JSONResponse, Response
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel, ConfigDict, Field

WAIT_SECONDS = 5
SAMPLERS = ("Euler", "Euler a", "DPM++ 2M", "DPM++ 2M Karras", "DDIM")
# Of a slow picture, which is done with the third.
PROGRESS_PER_LOOK = 0.3
ALMOST_DONE = 0.89

Authorization = Annotated[str | None, Header()]


class Generation(BaseModel):
    """What the real one takes of these types; unlike it, nothing else."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    negative_prompt: str
    seed: int = Field(ge=-1)
    steps: int = Field(ge=1, le=150)
    sampler_name: str
    cfg_scale: float
    width: int = Field(ge=64, multiple_of=8)
    height: int = Field(ge=64, multiple_of=8)
    batch_size: int = Field(ge=1)
    n_iter: int = Field(ge=1)
    send_images: bool
    save_images: bool
    force_task_id: str
    denoising_strength: float = 0.75


class Text2Image(Generation):
    enable_hr: bool = False
    hr_scale: float = 2.0
    hr_upscaler: str | None = None
    hr_resize_x: int = 0
    hr_resize_y: int = 0


class Image2Image(Generation):
    init_images: list[str] = Field(min_length=1)
    mask: str | None = None
    inpainting_fill: int = 0
    inpaint_full_res: bool = True
    inpainting_mask_invert: int = 0


class Task(BaseModel):
    id_task: str
    live_preview: bool = True


@dataclass
class WebUi:
    """Its events are of `threading`: a test waits for them in another thread."""

    requests: list[Generation] = field(default_factory=list)
    interrupted: threading.Event = field(default_factory=threading.Event)
    interrupted_tasks: list[str | None] = field(default_factory=list)
    begun: threading.Event = field(default_factory=threading.Event)
    """Set when a picture is being made."""
    is_slow: bool = False
    """Make progress only while somebody looks; without that, until it is interrupted."""
    answer: Response | None = None
    """Instead of pictures."""
    image_format: str = "PNG"
    auth: str | None = None
    """Of Basic, USER:PASSWORD."""
    authorizations: list[str | None] = field(default_factory=list)
    _current_task: str | None = None
    _is_interrupted: bool = False
    _progress: float = 0.0
    _moved: asyncio.Event = field(default_factory=asyncio.Event)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def reset(self) -> None:
        for name, value in vars(WebUi()).items():
            setattr(self, name, value)

    def build_app(self) -> FastAPI:
        app = FastAPI()

        def check(authorization: str | None) -> None:
            self.authorizations.append(authorization)
            expected = self.auth and f"Basic {base64.b64encode(self.auth.encode()).decode()}"
            if expected and authorization != expected:
                raise HTTPException(401, "Incorrect username or password")

        @app.post("/sdapi/v1/txt2img")
        async def generate(body: Text2Image, authorization: Authorization = None) -> Response:
            check(authorization)
            return await self._make(body)

        @app.post("/sdapi/v1/img2img")
        async def change(body: Image2Image, authorization: Authorization = None) -> Response:
            check(authorization)
            return await self._make(body)

        @app.get("/sdapi/v1/progress")
        async def look(
            skip_current_image: bool = False, authorization: Authorization = None
        ) -> dict[str, Any]:
            check(authorization)
            return self._look(skip_current_image)

        @app.post("/sdapi/v1/interrupt")
        async def interrupt(authorization: Authorization = None) -> dict[str, Any]:
            check(authorization)
            self._is_interrupted = True
            self.interrupted_tasks.append(self._current_task)
            self.interrupted.set()
            self._moved.set()
            return {}

        @app.post("/internal/progress")
        async def find(body: Task) -> dict[str, Any]:
            return {"active": body.id_task == self._current_task, "queued": False}

        return app

    async def _make(self, body: Generation) -> Response:
        self.requests.append(body)
        if body.sampler_name not in SAMPLERS:
            detail = {"error": "HTTPException", "detail": "Sampler not found", "errors": ""}
            return JSONResponse(detail, 404)
        async with self._turn:
            self._current_task, self._progress = body.force_task_id, 0.0
            self._is_interrupted = False
            self.begun.set()
            while self.is_slow and self._progress < ALMOST_DONE and not self._is_interrupted:
                self._moved.clear()
                await asyncio.wait_for(self._moved.wait(), WAIT_SECONDS)
            self._current_task = None
            return self.answer or JSONResponse(self._draw(body))

    def _look(self, skip_current_image: bool) -> dict[str, Any]:
        is_at_work = self._current_task is not None
        preview = None
        if is_at_work and not skip_current_image:
            self._progress += PROGRESS_PER_LOOK
            preview = encode(Image.new("RGB", (64, 64), (int(self._progress * 100), 0, 0)))
            self._moved.set()
        return {
            "progress": min(self._progress, 1) if is_at_work else 0.0,
            "eta_relative": 0.0,
            "state": {"job_count": int(is_at_work)},
            "current_image": preview,
            "textinfo": None,
        }

    def _draw(self, body: Generation) -> dict[str, Any]:
        count = body.batch_size * body.n_iter
        seed = 1234 if body.seed == -1 else body.seed
        pictures = [draw(body, seed + i) for i in range(count)]
        info = {
            "all_prompts": [body.prompt.replace("__colour__", "blue")] * count,
            "all_seeds": [seed + i for i in range(count)],
            "index_of_first_image": 0,
        }
        images = [encode(picture, self.image_format, body.prompt) for picture in pictures]
        return {"images": images, "parameters": {}, "info": json.dumps(info)}


def colour_of(seed: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(seed * 0.618 % 1, 0.6, 0.9)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw(body: Generation, seed: int) -> Image.Image:
    is_large = isinstance(body, Text2Image) and body.enable_hr
    size = (body.hr_resize_x, body.hr_resize_y) if is_large else (body.width, body.height)
    picture = Image.new("RGB", size, colour_of(seed))
    frame = (4, 4, size[0] - 5, size[1] - 5)
    ImageDraw.Draw(picture).rectangle(frame, outline=(40, 40, 40), width=2)
    if isinstance(body, Image2Image) and body.mask:
        start = decode(body.init_images[0]).convert("RGB").resize(size)
        picture = Image.composite(picture, start, decode(body.mask).convert("L").resize(size))
    return picture


def decode(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text, validate=True)))


def encode(picture: Image.Image, image_format: str = "PNG", prompt: str = "") -> str:
    target = io.BytesIO()
    options: dict[str, Any] = {}
    if image_format == "PNG" and prompt:
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text("parameters", prompt)
    picture.save(target, image_format, **options)
    return base64.b64encode(target.getvalue()).decode()
