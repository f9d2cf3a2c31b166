"""A backend for images: the HTTP API of AUTOMATIC1111's Stable Diffusion web UI, run elsewhere.

It is spoken to directly, whatever proxies the environment names, and its address is only shown
without the password that may be in it. It should be asked for one thing at a time: its progress,
and an interruption, are of whatever it does just then.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import ssl
import uuid
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from modules.errors import BackendError, InvalidRequestError
from modules.image_backend import (
    SIZE_STEP,
    EditRequest,
    FinishedImage,
    GenerationRequest,
    ImageEvent,
    ImageOptions,
    PartialImage,
    Request,
    Size,
    VariationRequest,
)
from modules.image_files import MIB, convert
from modules.optional_packages import import_package
from modules.worker import Worker

if TYPE_CHECKING:
    import httpx2

Json = dict[str, Any]

DEFAULT_SIZE = Size(1024, 1024)
DEFAULT_STEPS = 30
DEFAULT_SAMPLER = "DPM++ 2M Karras"
DEFAULT_GUIDANCE_SCALE = 7.0
# The web UI's own limit.
MAX_STEPS = 150
# Pictures that are made at the same time; more need more memory than many cards have.
MAX_BATCH = 4
# From this multiple of the base size on, a picture is made small first and then scaled up: a model
# that is asked for more than it has learnt draws everything twice.
HIRES_SCALE = 1.2
HIRES_UPSCALER = "Latent"
HIRES_STRENGTH = 0.68
# What a mask hides begins with the colours around: in the file it may be anything, often black.
FILL_FROM_AROUND = 0

CONNECT_SECONDS = 10
# For calls that are answered at once, though it may be busy.
CALL_SECONDS = 30
# The largest answer that is read of calls that send no pictures, and what one may have beside them.
MAX_ANSWER_BYTES = 8 * MIB
# Per pixel that is asked for. Plain colours have three or four, and once more in a picture of all.
MAX_PIXEL_BYTES = 8
# Between two looks at what it does.
PROGRESS_SECONDS = 0.5
# How long a request that nobody waits for any more may go on before it is left to itself.
LEAVE_SECONDS = 20


class SdWebUi:
    """`url` may hold a user and a password, for `--api-auth`; `base_size` is the model's.

    `files` is the worker that decodes and encodes pictures.
    """

    def __init__(self, url: str, base_size: int, files: Worker[None]) -> None:
        parts = urlsplit(url)
        self._address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip(
            "/"
        )
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        self._auth = (user, password) if user else None
        self._base_size = base_size
        self._files = files
        self._tls: ssl.SSLContext | None = None

    async def prepare(self) -> Size:
        async with self._connect() as client:
            path = "/sdapi/v1/progress?skip_current_image=true"
            _read_json(await self._call(client, "GET", path))
        return DEFAULT_SIZE

    async def check(self, request: Request) -> None:
        """Only the web UI knows, and tells when it is asked for the pictures."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[ImageEvent, None]:
        body = _to_sizes(request.size, self._base_size)
        return self._run("/sdapi/v1/txt2img", body, request)

    def edit(self, request: EditRequest) -> AsyncGenerator[ImageEvent, None]:
        body = _to_start(request) | ({} if request.mask is None else _to_mask(request.mask))
        return self._run("/sdapi/v1/img2img", body, request)

    def vary(self, request: VariationRequest) -> AsyncGenerator[ImageEvent, None]:
        return self._run("/sdapi/v1/img2img", _to_start(request), request)

    def close(self) -> None:
        pass

    async def _run(
        self, path: str, body: Json, request: Request
    ) -> AsyncGenerator[ImageEvent, None]:
        options = request.options
        task_id = f"task({uuid.uuid4().hex})"
        body = {**_to_body(options), **body, "force_task_id": task_id}
        num_sent = 0
        async with self._connect() as client:
            most = _to_most_bytes(request.size, options.num_images)
            posting = asyncio.create_task(
                self._call(client, "POST", path, body, seconds=None, max_bytes=most)
            )
            try:
                while not posting.done():
                    is_watched = num_sent < options.num_partial_images
                    await asyncio.wait([posting], timeout=PROGRESS_SECONDS if is_watched else None)
                    if posting.done():
                        break
                    if partial := await self._look(client, task_id, num_sent, request):
                        num_sent += 1
                        yield partial
            finally:
                await self._leave(client, task_id, posting)
        answer = posting.result()
        for image in await self._files.run(lambda _: _read_images(answer, options)):
            yield image

    async def _look(
        self, client: httpx2.AsyncClient, task_id: str, num_sent: int, request: Request
    ) -> PartialImage | None:
        """The picture as it is now, once its time has come."""
        options, most = request.options, _to_most_bytes(request.size, 1)
        try:
            if not await self._is_at_work(client, task_id):
                return None
            path = "/sdapi/v1/progress"
            state = _read_json(await self._call(client, "GET", path, max_bytes=most))
            progress, image = state.get("progress"), state.get("current_image")
            is_time = (
                isinstance(progress, int | float)
                and progress * (options.num_partial_images + 1) >= num_sent + 1
            )
            if not is_time or not image:
                return None
            picture = await self._files.run(lambda _: convert(_to_bytes(image), options.output))
        except BackendError:  # if it matters, the request itself says so
            return None
        return PartialImage(*picture)

    async def _leave(
        self, client: httpx2.AsyncClient, task_id: str, posting: asyncio.Task[bytes]
    ) -> None:
        """Have the web UI stop, unless it has answered; it goes on when a connection is closed."""
        try:
            async with asyncio.timeout(LEAVE_SECONDS):
                while not posting.done():
                    if await self._is_at_work(client, task_id):
                        await self._call(client, "POST", "/sdapi/v1/interrupt")
                    await asyncio.wait([posting], timeout=PROGRESS_SECONDS)
        except (BackendError, TimeoutError):
            posting.cancel()
        finally:
            posting.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _is_at_work(self, client: httpx2.AsyncClient, task_id: str) -> bool:
        """On this task, and not on one that somebody else waits for.

        What tells is a call of the web UI's own page, which not every program has that has its API.
        """
        body = {"id_task": task_id, "live_preview": False}
        try:
            answer = _read_json(await self._call(client, "POST", "/internal/progress", body))
        except BackendError:
            return True
        return bool(answer.get("active", True))

    # The connection

    def _connect(self) -> httpx2.AsyncClient:
        """Raises MissingPackageError."""
        client = import_package("httpx2", "Images of a web UI", "httpx2")
        is_secure = self._address.startswith("https:")
        if is_secure and self._tls is None:  # not before: it reads all authorities of the system
            self._tls = ssl.create_default_context()
        connection: httpx2.AsyncClient = client.AsyncClient(
            auth=self._auth,
            # What is packed may be a thousand times as large when it is unpacked.
            headers={"Accept-Encoding": "identity"},
            trust_env=False,
            verify=self._tls if is_secure else False,
        )
        return connection

    async def _call(
        self,
        client: httpx2.AsyncClient,
        method: str,
        path: str,
        body: Json | None = None,
        *,
        seconds: float | None = CALL_SECONDS,
        max_bytes: int = MAX_ANSWER_BYTES,
    ) -> bytes:
        """The body of the answer, as it is sent. Raises BackendError."""
        import httpx2

        timeout = httpx2.Timeout(seconds, connect=CONNECT_SECONDS)
        url = f"{self._address}{path}"
        try:
            async with client.stream(method, url, json=body, timeout=timeout) as response:
                content = await self._read(response, max_bytes)
        except httpx2.TimeoutException as error:
            raise BackendError(f"The web UI at {self._address} does not answer.") from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise BackendError(
                f"The web UI at {self._address} cannot be reached ({type(error).__name__}). "
                "It has to run, and SD_WEBUI_URL or openai-sd_webui_url to be its address."
            ) from error
        if response.status_code != 200:
            raise self._to_error(response.status_code, content)
        return content

    async def _read(self, response: httpx2.Response, max_bytes: int) -> bytes:
        chunks: list[bytes] = []
        num_bytes = 0
        async for chunk in response.aiter_raw():
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise BackendError(f"The web UI at {self._address} sends more than was asked for.")
            chunks.append(chunk)
        return b"".join(chunks)

    def _to_error(self, status: int, content: bytes) -> BackendError | InvalidRequestError:
        """Its own words may quote the prompt: only what they are about is told."""
        place = f"The web UI at {self._address}"
        try:
            answer = _read_json(content)
        except BackendError:
            answer = {}
        if "sampler not found" in str(answer.get("detail")).lower():
            message = "The web UI has no sampler of that name."
            return InvalidRequestError(message, "sampler_name")
        match status:
            case 401 | 403:
                return BackendError(
                    f"{place} wants a user and a password: http://USER:PASSWORD@HOST:PORT."
                )
            case 404 | 405:
                return BackendError(f"{place} has no API there; start it with --api.")
        kind = answer.get("error")
        is_name = isinstance(kind, str) and re.fullmatch(r"[A-Za-z]{1,60}", kind)
        reason = f" ({kind})" if is_name else ""
        return BackendError(f"{place} has failed, with status {status}{reason}.")


# What it is sent


def _to_body(options: ImageOptions) -> Json:
    steps = min(MAX_STEPS, max(1, round(DEFAULT_STEPS * options.effort)))
    # A look at several pictures at a time would show them side by side.
    batch_size = 1 if options.num_partial_images else _to_batch_size(options.num_images)
    guidance_scale = options.guidance_scale
    return {
        "prompt": options.prompt,
        "negative_prompt": options.negative_prompt,
        "seed": -1 if options.seed is None else options.seed,
        "steps": options.steps or steps,
        "sampler_name": options.sampler_name or DEFAULT_SAMPLER,
        "cfg_scale": DEFAULT_GUIDANCE_SCALE if guidance_scale is None else guidance_scale,
        "batch_size": batch_size,
        "n_iter": options.num_images // batch_size,
        "send_images": True,
        "save_images": False,
    }


def _to_batch_size(num_images: int) -> int:
    return max(size for size in range(1, MAX_BATCH + 1) if num_images % size == 0)


def _to_sizes(size: Size, base_size: int) -> Json:
    scale = min(size) / base_size
    if scale < HIRES_SCALE:
        return {"width": size.width, "height": size.height}
    small = Size(*(max(1, round(side / scale / SIZE_STEP)) * SIZE_STEP for side in size))
    return {
        "width": small.width,
        "height": small.height,
        "enable_hr": True,
        "hr_scale": scale,
        # Exactly: a multiple of what was rounded might be a few pixels off. It wins over the scale.
        "hr_resize_x": size.width,
        "hr_resize_y": size.height,
        "hr_upscaler": HIRES_UPSCALER,
        "denoising_strength": HIRES_STRENGTH,
    }


def _to_start(request: EditRequest | VariationRequest) -> Json:
    return {
        "init_images": [base64.b64encode(request.image).decode()],
        "width": request.size.width,
        "height": request.size.height,
        "denoising_strength": request.strength,
    }


def _to_mask(mask: bytes) -> Json:
    return {
        "mask": base64.b64encode(mask).decode(),
        "inpainting_fill": FILL_FROM_AROUND,
        # The picture as a whole, not only what is around the mask.
        "inpaint_full_res": False,
        "inpainting_mask_invert": 0,
    }


# What it answers


def _to_most_bytes(size: Size, num_images: int) -> int:
    """Of an answer with so many pictures, in base64."""
    return num_images * size.num_pixels * MAX_PIXEL_BYTES * 4 // 3 + MAX_ANSWER_BYTES


def _read_images(answer: bytes, options: ImageOptions) -> list[FinishedImage]:
    """Raises BackendError."""
    content = _read_json(answer)
    info = _read_info(content.get("info"))
    first = info.get("index_of_first_image")  # a picture of all pictures may come before it
    start = first if isinstance(first, int) and first > 0 else 0
    images = content.get("images")
    images = images[start : start + options.num_images] if isinstance(images, list) else []
    if len(images) < options.num_images:
        raise BackendError(
            f"The web UI has made {len(images)} of {options.num_images} images; "
            "it may have been interrupted."
        )
    prompts = info.get("all_prompts")
    return [
        FinishedImage(
            *convert(_to_bytes(image), options.output),
            _to_revised_prompt(prompts, i, options.prompt),
        )
        for i, image in enumerate(images)
    ]


def _read_json(content: bytes) -> Json:
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise BackendError("What answers at the web UI's address is something else.")
    return answer


def _read_info(info: object) -> Json:
    """JSON in JSON, and not needed for the pictures."""
    try:
        content = json.loads(info) if isinstance(info, str) else None
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _to_revised_prompt(prompts: object, index: int, prompt: str) -> str | None:
    """What its styles and extensions have made of the prompt."""
    if not isinstance(prompts, list) or index >= len(prompts):
        return None
    revised = prompts[index]
    return revised if isinstance(revised, str) and revised != prompt else None


def _to_bytes(image: object) -> bytes:
    try:
        text = image if isinstance(image, str) else ""
        return base64.b64decode(text.rpartition(",")[2], validate=True)
    except ValueError:
        raise BackendError("The web UI has sent an image that is not in base64.") from None
