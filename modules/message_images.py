"""Images that clients put into messages → places in their texts, and the pictures for them.

What a model makes of a picture is not known here.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote_to_bytes

from modules.errors import InvalidRequestError
from modules.image_files import load_pillow, read_picture
from modules.image_places import make_place
from modules.image_reader import ShownImage

PART_TYPES = ("image_url", "input_image")
DETAILS = ("auto", "low", "high")
# What a picture is scaled down to where its details do not matter: 512 by 512.
LOW_DETAIL_PIXELS = 512 * 512

Fetch = Callable[[str, str], bytes]
"""The file at a URL; the second argument is the wire name of its field, for errors."""


@dataclass(frozen=True, slots=True)
class ImagePart:
    url: str
    detail: str
    param: str
    file: bytes | None = None
    """What is at the URL, where that is on the web and has been fetched."""

    @property
    def is_remote(self) -> bool:
        return self.file is None and self.url[:5].lower() != "data:"


def has_images(messages: Sequence[Mapping[str, Any]]) -> bool:
    return any(_is_image(part) for message in messages for part in _list_parts(message))


def place_images(
    messages: Sequence[Mapping[str, Any]], max_images: int
) -> tuple[list[Mapping[str, Any]], tuple[ImagePart, ...]]:
    """The messages with a place for each image, and the images by their numbers.

    What else may be wrong with messages is left to be found where prompts are made of them.
    Raises InvalidRequestError, naming the part.
    """
    found: list[ImagePart] = []
    placed = [_place(message, index, found) for index, message in enumerate(messages)]
    if len(found) > max_images:
        message = f"There are {len(found)} images; {max_images} are allowed in a request."
        raise InvalidRequestError(message, found[max_images].param)
    return placed, tuple(found)


def fetch_images(parts: Sequence[ImagePart], fetch: Fetch | None) -> tuple[ImagePart, ...]:
    """Waits for others. `fetch` None: only data URIs are allowed. Raises InvalidRequestError."""
    return tuple(_fetch(part, fetch) if part.is_remote else part for part in parts)


def read_images(parts: Sequence[ImagePart], max_pixels: int) -> tuple[ShownImage, ...]:
    """Computes. What has more pixels is scaled down. What is remote has been fetched.

    Raises InvalidRequestError, naming the part, and MissingPackageError.
    """
    load_pillow()
    return tuple(_read(part, max_pixels) for part in parts)


def _list_parts(message: Mapping[str, Any]) -> Sequence[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else ()


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in PART_TYPES


def _place(message: Mapping[str, Any], index: int, found: list[ImagePart]) -> Mapping[str, Any]:
    parts = list(_list_parts(message))
    if not any(map(_is_image, parts)):
        return message
    for number, part in enumerate(parts):
        if not _is_image(part):
            continue
        param = f"messages[{index}].content[{number}]"
        if message.get("role") != "user":
            text = f"{param} is an image, and only messages of the role user may have some."
            raise InvalidRequestError(text, param)
        parts[number] = {"type": "text", "text": make_place(len(found))}
        found.append(_check_part(part, param))
    return {**message, "content": parts}


def _check_part(part: Mapping[str, Any], param: str) -> ImagePart:
    match part.get("image_url"):
        case str(url):
            detail = part.get("detail")
        case {"url": str(url), **rest}:
            detail = rest.get("detail")
        case _:
            example = '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'
            raise InvalidRequestError(f"{param} must be an image with its URL: {example}.", param)
    if detail not in (None, *DETAILS):
        raise InvalidRequestError(f"The detail of {param} is one of {', '.join(DETAILS)}.", param)
    return ImagePart(url, detail or "auto", param)


def _fetch(part: ImagePart, fetch: Fetch | None) -> ImagePart:
    if fetch is None:
        message = (
            f"{part.param} must have a data URI (data:image/png;base64,...); this server fetches "
            "no images. The setting openai-fetch_images allows it."
        )
        raise InvalidRequestError(message, part.param)
    return replace(part, file=fetch(part.url, part.param))


def _read(part: ImagePart, max_pixels: int) -> ShownImage:
    if part.detail == "low":
        max_pixels = min(max_pixels, LOW_DETAIL_PIXELS)
    file = _decode_data_uri(part) if part.file is None else part.file
    return ShownImage(read_picture(file, part.param, max_pixels), part.param)


def _decode_data_uri(part: ImagePart) -> bytes:
    """RFC 2397. What kind of picture it says to be does not matter: the file says it too."""
    head, comma, data = part.url[5:].partition(",")
    if not comma or not head.lower().endswith(";base64"):
        message = f"The data URI of {part.param} is not in base64."
        raise InvalidRequestError(message, part.param)
    try:
        raw = unquote_to_bytes(data) if "%" in data else data.encode("ascii")
        return base64.b64decode(b"".join(raw.split()), validate=True)
    except ValueError:
        message = f"The data URI of {part.param} is no valid base64."
        raise InvalidRequestError(message, part.param) from None
