"""Images: pictures from words, and from pictures, by whichever backend the settings name.

One request after the other: a second one at the same time would take the memory of both, and a web
UI's progress is of no request in particular.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager, suppress
from functools import partial
from weakref import WeakSet

from modules.diffusers_pipeline import DiffusersPipeline
from modules.errors import BackendError, CapabilityError, NotConfiguredError
from modules.image_backend import (
    EditRequest,
    GenerationRequest,
    ImageBackend,
    ImageEvent,
    ImageOptions,
    Size,
    VariationRequest,
)
from modules.image_files import choose_auto_size, load_pillow, read_edit, read_variation
from modules.sd_webui import SdWebUi
from modules.settings import Settings
from modules.worker import Worker

ImageEvents = AsyncGenerator[ImageEvent, None]

# Requests that wait for their turn, each with the pictures that it has sent.
MAX_WAITING = 16

# How far from the picture, where a request does not say it. What a mask hides is made anew.
MASKED_STRENGTH = 1.0
EDIT_STRENGTH = 0.75
VARIATION_STRENGTH = 0.6


class _Place:
    """Of a request among those that are open."""


class Images:
    """What can be refused is refused by the three calls; the work begins with the iteration.

    Calls and iteration raise InvalidRequestError and CapabilityError.
    """

    def __init__(self, settings: Settings) -> None:
        self._timeout = settings.image_timeout
        self._files = Worker("image files", load_pillow)
        self._backend = _choose_backend(settings, self._files)
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        # Loosely, for those whose iteration never begins: there is nothing to tell when they end.
        self._places: WeakSet[_Place] = WeakSet()
        self._is_closed = False

    @property
    def loaded_name(self) -> str | None:
        """Of the pipeline, once it is in memory; None too where a web UI makes the images."""
        backend = self._backend
        return backend.loaded_name if isinstance(backend, DiffusersPipeline) else None

    async def generate(self, options: ImageOptions) -> ImageEvents:
        with self._take_place() as place:
            backend, auto_size = await self._prepare()
            request = GenerationRequest(options, options.size or auto_size)
            await backend.check(request)
            return self._run(backend.generate(request), place)

    async def edit(
        self,
        options: ImageOptions,
        image: bytes,
        mask: bytes | None,
        strength: float | None,
    ) -> ImageEvents:
        """Without a mask, what is transparent in the image is edited; if nothing is, all of it."""
        with self._take_place() as place:
            backend, auto_size = await self._prepare()
            prepared = await self._files.run(
                lambda _: read_edit(image, mask, lambda own: _choose_size(options, own, auto_size))
            )
            if strength is None:
                strength = EDIT_STRENGTH if prepared.mask is None else MASKED_STRENGTH
            request = EditRequest(options, prepared.size, prepared.image, prepared.mask, strength)
            await backend.check(request)
            return self._run(backend.edit(request), place)

    async def vary(
        self, options: ImageOptions, image: bytes, strength: float | None
    ) -> ImageEvents:
        with self._take_place() as place:
            backend, auto_size = await self._prepare()
            prepared = await self._files.run(
                lambda _: read_variation(image, lambda own: _choose_size(options, own, auto_size))
            )
            strength = VARIATION_STRENGTH if strength is None else strength
            request = VariationRequest(options, prepared.size, prepared.image, strength)
            await backend.check(request)
            return self._run(backend.vary(request), place)

    def close(self) -> None:
        """From any thread. What is at work fails with CapabilityError."""
        self._is_closed = True
        for task in tuple(self._tasks):
            with suppress(RuntimeError):  # a loop that is closed has ended them already
                task.get_loop().call_soon_threadsafe(task.cancel)
        self._files.close()
        if self._backend is not None:
            self._backend.close()

    @contextmanager
    def _take_place(self) -> Iterator[_Place]:
        """Kept until the work ends, unless an error comes before it. Raises CapabilityError."""
        if len(self._places) > MAX_WAITING:
            raise CapabilityError(
                f"{MAX_WAITING} requests for images wait already. Try again later."
            )
        place = _Place()
        self._places.add(place)
        try:
            yield place
        except BaseException:
            self._places.discard(place)
            raise

    async def _prepare(self) -> tuple[ImageBackend, Size]:
        if self._backend is None:
            raise NotConfiguredError(
                "There is nothing to make images with. Set SD_WEBUI_URL or openai-sd_webui_url to "
                "the address of a Stable Diffusion web UI, or openai-image_model to the folder of "
                "a diffusers pipeline."
            )
        await self._files.run(lambda _: None)  # or else Pillow is missing
        return self._backend, await self._backend.prepare()

    async def _run(self, events: ImageEvents, place: _Place) -> ImageEvents:
        """In a task of its own: who leaves may be cancelled again at every await, and to stop the
        work needs some.
        """
        inbox: asyncio.Queue[ImageEvent | None] = asyncio.Queue()
        task = asyncio.create_task(self._work(events, inbox))
        self._tasks.add(task)  # the loop holds tasks loosely
        task.add_done_callback(partial(self._forget, place))
        try:
            while (event := await inbox.get()) is not None:
                yield event
            await task  # raises what has ended it
        finally:
            task.cancel()

    def _forget(self, place: _Place, task: asyncio.Task[None]) -> None:
        self._places.discard(place)
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # or else asyncio logs one that nobody was left to hear of

    async def _work(self, events: ImageEvents, inbox: asyncio.Queue[ImageEvent | None]) -> None:
        try:
            async with self._turn, asyncio.timeout(self._timeout), aclosing(events):
                async for event in events:
                    inbox.put_nowait(event)
        except TimeoutError:
            raise BackendError(
                f"The images have taken longer than {self._timeout} s (openai-image_timeout)."
            ) from None
        except asyncio.CancelledError:
            if self._is_closed:
                raise CapabilityError("The server is shutting down.") from None
            raise
        finally:
            inbox.put_nowait(None)


def _choose_backend(settings: Settings, files: Worker[None]) -> ImageBackend | None:
    if settings.image_model is not None:
        return DiffusersPipeline(settings.image_model, is_on_cpu=settings.cpu)
    if settings.sd_webui_url is not None:
        return SdWebUi(settings.sd_webui_url, settings.sd_base_model_size, files)
    return None


def _choose_size(options: ImageOptions, own: Size, most: Size) -> Size:
    return options.size or choose_auto_size(own, most)
