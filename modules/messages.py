"""Messages: what a client's have to be, and which of them belong together when some must go.

Knows nothing of templates and modes.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from modules.errors import InvalidRequestError
from modules.image_places import join_parts

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")


def is_system(message: Mapping[str, Any]) -> bool:
    return message["role"] in ("system", "developer")


def take_leading_system(messages: Iterable[Message]) -> list[Message]:
    return list(takewhile(is_system, messages))


# What a message has to be


def check_message(message: Any, index: int) -> Message:
    """A copy for the templates: a known role, the content as one text, no fields without value.

    Raises InvalidRequestError, naming the field.
    """
    param = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f"{param} must be an object.", param)
    role = message.get("role")
    if role not in ROLES:
        raise InvalidRequestError(
            f"{param}.role must be one of {', '.join(ROLES)}, not {_show(role)}.", f"{param}.role"
        )
    given = {key: value for key, value in message.items() if value is not None}
    if "tool_calls" in given:
        given["tool_calls"] = _check_tool_calls(given["tool_calls"], f"{param}.tool_calls")
    content = _check_content(given, f"{param}.content")
    return {**given, "content": content}


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _check_content(message: Mapping[str, Any], param: str) -> str | None:
    match message.get("content"):
        case str(text):
            return text
        case [*parts]:
            return join_parts(_check_part(part, f"{param}[{i}]") for i, part in enumerate(parts))
        case None if message["role"] == "assistant" and message.get("tool_calls"):
            return None
    raise InvalidRequestError(f"{param} must be a text or a list of text parts.", param)


def _check_part(part: Any, param: str) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image_url" | "input_image" | "image"}:  # others have become places
            raise InvalidRequestError(
                f"{param} is an image, which only a vision model can see; this one reads text.",
                param,
            )
    raise InvalidRequestError(
        f'{param} must be a text part: {{"type": "text", "text": "..."}}.', param
    )


def _check_tool_calls(calls: Any, param: str) -> list[Message]:
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise InvalidRequestError(f"{param} must be a list of objects.", param)
    return [_parse_arguments(call) for call in calls]


def _parse_arguments(call: Mapping[str, Any]) -> Message:
    """Clients send the arguments as JSON text; templates expect the object."""
    match call.get("function"):
        case {"arguments": str(text), **function}:
            try:
                return {**call, "function": {**function, "arguments": json.loads(text)}}
            except (ValueError, RecursionError):
                pass
    return dict(call)


# What belongs together


def split_droppable(messages: Sequence[Message]) -> list[tuple[int, ...]]:
    """Indices of the messages that a prompt can do without, oldest first, in groups that go as one.

    A group is a user's message with all that was said until the next one; of the last turn, a reply
    with the results of its tools. System messages, the last user's message and what was said last
    are in none.
    """
    talk = [index for index, message in enumerate(messages) if not is_system(message)]
    *turns, last = _split_before(talk, lambda index: messages[index]["role"] == "user") or [()]
    *replies, _ = _split_before(last, lambda index: messages[index]["role"] != "tool") or [()]
    if replies and messages[replies[0][0]]["role"] == "user":
        replies = replies[1:]
    return [*turns, *replies]


def _split_before(indices: Sequence[int], is_start: Callable[[int], bool]) -> list[tuple[int, ...]]:
    """In groups, each of which begins with a start; the first may not."""
    groups: list[list[int]] = []
    for index in indices:
        if not groups or is_start(index):
            groups.append([])
        groups[-1].append(index)
    return list(map(tuple, groups))
