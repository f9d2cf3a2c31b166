"""The images of a chat request, taken out of its messages within the limits of the settings."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from extensions.openai.typing import ChatCompletionRequest
from modules.image_fetching import ImageFetcher
from modules.image_reader import ImageReader, RequestImages
from modules.loaded_model import LoadedModel
from modules.message_images import ImageLimits, has_images, take_images
from modules.settings import Settings

Body = ChatCompletionRequest

# Slow servers and large pictures: the others that need a thread shall not wait for them.
READERS = ThreadPoolExecutor(4, "images of chats")


async def take_chat_images(
    settings: Settings, model: LoadedModel, body: Body
) -> tuple[Body, RequestImages | None]:
    """The request with places for its images. One for a model that reads text stays as it is, to be
    refused where prompts are made.

    Raises what `take_images` raises.
    """
    reader = model.image_reader
    if reader is None or not has_images(body.messages):
        return body, None
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(READERS, _take, settings, reader, body)


def _take(settings: Settings, reader: ImageReader, body: Body) -> tuple[Body, RequestImages]:
    limits = ImageLimits(settings.max_images, settings.max_image_pixels)
    fetch = ImageFetcher().fetch if settings.fetch_images else None
    messages, images = take_images(body.messages, limits, fetch)
    return body.model_copy(update={"messages": messages}), RequestImages(reader, images)
