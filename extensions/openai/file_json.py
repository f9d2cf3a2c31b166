"""JSON with whole files in it, in base64, made without looking at each of their characters.

An encoder of JSON would, for a tenth of a second and more with every image, and nothing else of
Python runs meanwhile: not the streams of those who chat, either.
"""

import asyncio
import base64
import json
import uuid
from dataclasses import dataclass
from typing import Any

from extensions.openai.responses import Json

# Read at a time; a multiple of three bytes is one of four characters, with nothing left over.
PIECE_BYTES = 3 * 2**14


@dataclass(frozen=True, slots=True)
class EncodedFile:
    """What becomes a string: the file in base64, after a prefix."""

    data: bytes
    prefix: str = ""


async def to_file_json(value: Json) -> bytes:
    """As UTF-8. An EncodedFile may stand wherever a string may."""
    return await asyncio.to_thread(_to_file_json, value)


def _to_file_json(value: Json) -> bytes:
    files: list[EncodedFile] = []
    mark = uuid.uuid4().hex

    def put_mark(item: Any) -> str:
        if not isinstance(item, EncodedFile):
            raise TypeError(f"{type(item).__name__} is nothing for JSON")
        files.append(item)
        return mark

    text = json.dumps(value, separators=(",", ":"), allow_nan=False, default=put_mark)
    before, *others = text.encode().split(mark.encode())
    parts = [before]
    for file, after in zip(files, others, strict=True):
        parts += [file.prefix.encode(), *_to_base64(file.data), after]
    return b"".join(parts)


def _to_base64(data: bytes) -> list[bytes]:
    """In pieces: between two of them, other threads may run."""
    starts = range(0, len(data), PIECE_BYTES)
    return [base64.b64encode(data[start : start + PIECE_BYTES]) for start in starts]
