"""The lines of a batch: what has to be in its input, and what will be in its output."""

import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from extensions.openai.errors import to_validation_error
from extensions.openai.responses import Json
from extensions.openai.typing import BatchLine
from modules.batch_store import BatchFault, LineResult, TokenCounts

# OpenAI's own limit.
MAX_LINES = 50_000
# Nothing else is done in this process while a line is parsed.
MAX_LINE_BYTES = 4 * 2**20
# Nor while blanks are passed over.
NUM_BLANKS = 2**20
# Who made so many mistakes has made one in the program that wrote the file.
MAX_FAULTS = 100

NO_BLANK = re.compile(rb"\S")


@dataclass(frozen=True, slots=True)
class RawLine:
    number: int
    """In the file, from 0."""
    text: bytes


def split_lines(content: bytes) -> list[RawLine]:
    """Empty ones are left out; of too many, the first `MAX_LINES` and one more are there."""
    return list(islice(_split(content), MAX_LINES + 1))


def _split(content: bytes) -> Iterator[RawLine]:
    number = 0
    end = 3 if content.startswith(b"\xef\xbb\xbf") else 0
    while (first := _find_text(content, end)) is not None:
        number += content.count(b"\n", end, first)
        start = max(end, content.rfind(b"\n", end, first) + 1)
        end = content.find(b"\n", first)
        end = len(content) if end < 0 else end
        yield RawLine(number, content[start:end])


def _find_text(content: bytes, start: int) -> int | None:
    """Where the next line with anything in it has its first character that is no blank."""
    for place in range(start, len(content), NUM_BLANKS):
        found = NO_BLANK.search(content, place, place + NUM_BLANKS)
        if found:
            return found.start()
    return None


def parse_line(line: RawLine) -> BatchLine:
    """Raises ValueError, of which ValidationError is one."""
    return BatchLine.model_validate(from_json(line.text, allow_inf_nan=False))


def find_faults(lines: list[RawLine], endpoint: str) -> list[BatchFault]:
    """Why they cannot be a batch's input; the first `MAX_FAULTS` of the reasons."""
    if not lines:
        return [BatchFault("empty_file", "The input file has no lines.")]
    if len(lines) > MAX_LINES:
        message = f"The input file has more than {MAX_LINES} lines, which is what a batch may have."
        return [BatchFault("too_many_lines", message)]
    faults: list[BatchFault] = []
    seen: dict[str, int] = {}
    for line in lines:
        faults += _find_faults_of(line, endpoint, seen)
        if len(faults) >= MAX_FAULTS:
            break
    return faults


def _find_faults_of(line: RawLine, endpoint: str, seen: dict[str, int]) -> Iterator[BatchFault]:
    number = line.number + 1
    if len(line.text) > MAX_LINE_BYTES:
        message = f"This line has {len(line.text)} bytes; one may have {MAX_LINE_BYTES}."
        yield BatchFault("line_too_long", message, number)
        return
    try:
        parsed = parse_line(line)
    except ValidationError as error:
        detail = error.errors()[0]
        fault = to_validation_error(detail["loc"], detail)[1]["error"]
        yield BatchFault("invalid_line", fault["message"], number, fault["param"])
        return
    except ValueError:
        yield BatchFault("invalid_json_line", "This line is not valid JSON.", number)
        return
    if parsed.url != endpoint:
        message = f"The url of every line should be the batch's endpoint, {endpoint}."
        yield BatchFault("mismatched_url", message, number, "url")
    first = seen.setdefault(parsed.custom_id, number)
    if first != number:
        message = f"This custom_id is that of line {first} already."
        yield BatchFault("duplicate_custom_id", message, number, "custom_id")


def build_answered(line: RawLine, custom_id: str, status: int, body: Json) -> LineResult:
    """Of a request that was answered, be it with an error."""
    response = {"status_code": status, "request_id": f"req_{uuid.uuid4().hex}", "body": body}
    usage = body.get("usage") or {}
    return LineResult(
        line.number,
        _build_line(custom_id, response, None),
        is_error=status != 200,
        tokens=TokenCounts(
            usage.get("prompt_tokens", 0),
            usage.get("prompt_tokens_details", {}).get("cached_tokens", 0),
            usage.get("completion_tokens", 0),
        ),
        model=body.get("model"),
    )


def build_left_out(line: RawLine, code: str, message: str) -> LineResult:
    """Of a request that was not made."""
    error = {"code": code, "message": message}
    content = _build_line(parse_line(line).custom_id, None, error)
    return LineResult(line.number, content, is_error=True)


def _build_line(custom_id: str, response: Json | None, error: Json | None) -> str:
    line: dict[str, Any] = {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return json.dumps(line, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
