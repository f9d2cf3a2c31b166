"""JSON with files in it: the same as with their base64 as a string."""

from __future__ import annotations

import base64
import json
import os

import pytest

from extensions.openai.file_json import PIECE_BYTES, EncodedFile, to_file_json

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("num_bytes", [0, 1, 2, 3, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1])
async def test_files_of_any_length(num_bytes: int) -> None:
    data = os.urandom(num_bytes)
    value = {"a": [EncodedFile(data), "b\u2028\n\U0001f642", EncodedFile(data, "data:x;base64,")]}
    first, text, second = json.loads(await to_file_json(value))["a"]
    assert base64.b64decode(first, validate=True) == data
    assert second == f"data:x;base64,{first}"
    assert text == "b\u2028\n\U0001f642"


async def test_without_files() -> None:
    assert await to_file_json({"a": [1, None]}) == b'{"a":[1,null]}'
