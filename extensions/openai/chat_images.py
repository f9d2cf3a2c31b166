"""The images of a chat request, taken out of its messages within the limits of the settings."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from extensions.openai.typing import ChatCompletionRequest
from modules.image_fetching import ImageFetcher
from modules.image_reader import RequestImages
from modules.loaded_model import LoadedModel
from modules.message_images import fetch_images, has_images, place_images, read_images
from modules.settings import Settings

Body = ChatCompletionRequest

# Slow servers and large pictures: neither shall wait for the other, nor anything else for them.
FETCHERS = ThreadPoolExecutor(8, "images from the web")
READERS = ThreadPoolExecutor(2, "images of chats")


async def take_chat_images(
    settings: Settings, model: LoadedModel, body: Body
) -> tuple[Body, RequestImages | None]:
    """The request with places for its images. One for a model that reads text stays as it is, to be
    refused where prompts are made.

    Raises InvalidRequestError, naming the part, and MissingPackageError.
    """
    reader = model.image_reader
    if reader is None or not has_images(body.messages):
        return body, None
    messages, parts = place_images(body.messages, settings.max_images)
    loop = asyncio.get_running_loop()
    if any(part.is_remote for part in parts):
        fetch = ImageFetcher().fetch if settings.fetch_images else None
        parts = await loop.run_in_executor(FETCHERS, fetch_images, parts, fetch)
    pixels = settings.max_image_pixels
    images = await loop.run_in_executor(READERS, read_images, parts, pixels)
    return body.model_copy(update={"messages": messages}), RequestImages(reader, images)
