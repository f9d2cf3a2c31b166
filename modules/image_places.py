"""Where the images of a message are in its text: marks, until a template is rendered.

So a message's content stays one text on its way there, whatever cuts and joins it. What the images
look like is not known here.
"""

import re
from collections.abc import Iterable
from typing import Any

from modules.literal_text import make_mark

_MARK = make_mark()
_PLACE = re.compile(_MARK + r"(\d{6})")


def make_place(number: int) -> str:
    """Of the image of that number; no message can spell it."""
    return f"{_MARK}{number:06}"


def find_places(text: str | None) -> list[int]:
    """The numbers of the images in a text, in order."""
    return [int(number) for number in _PLACE.findall(text or "")]


def split_at_places(text: str) -> list[str]:
    """The texts between images, with the places themselves at the odd indices."""
    return re.split(f"({_MARK}\\d{{6}})", text)


def join_parts(texts: Iterable[str]) -> str:
    """Texts on lines of their own; images are beside texts as they are."""
    joined = ""
    for text in texts:
        needs_break = joined and not (_PLACE.fullmatch(text) or _PLACE.fullmatch(joined[-_LENGTH:]))
        joined += f"\n{text}" if needs_break else text
    return joined


_LENGTH = len(make_place(0))


def to_parts(text: str) -> list[dict[str, Any]]:
    """The content in transformers' form: a list of images and texts."""
    pieces = split_at_places(text)
    return [
        {"type": "image"} if index % 2 else {"type": "text", "text": piece}
        for index, piece in enumerate(pieces)
        if piece
    ]
