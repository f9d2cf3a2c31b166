"""A request as the hooks of other extensions know it, and what they make of it.

Hooks were written for text-generation-webui: its `state` is a dict of all parameters, of which some
have other names there.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import ValidationError

from extensions.openai.sampling import NUM_RESERVED, to_max_tokens
from extensions.openai.typing import GenerationOptions
from modules.extensions import Extensions
from modules.hooks import State
from modules.loaded_model import LoadedModel

Body = TypeVar("Body", bound=GenerationOptions)

EMPTY: Mapping[str, Any] = MappingProxyType({})

# The older name of a field → its own.
OTHER_NAMES = {
    "max_new_tokens": "max_tokens",
    "custom_stopping_strings": "stop",
    "chat-instruct_command": "chat_instruct_command",
}


async def modify_state(
    extensions: Extensions, body: Body, model: LoadedModel, more: Mapping[str, Any] = EMPTY
) -> tuple[Body, State]:
    """The request as `state_modifier` leaves it, and the state for all other hooks; that is empty
    if there is no hook that looks at it. `more` says what the request leaves open.

    Raises HookError, naming the extension that has put a senseless value into it.
    """
    if not extensions.needs_state:
        return body, {}
    given = {**build_state(body, model), **more}
    state = copy.deepcopy(given)  # scripts write into it
    if not extensions.has("state_modifier"):
        return body, state

    def find_fault(modified: State) -> str | None:
        try:
            _read_state(body, given, modified)
        except ValidationError as error:  # its text may quote a prompt
            place = error.errors()[0]["loc"]
            return f"{place[0] if place else 'state'} cannot have that value"
        return None

    future = extensions.chain("state_modifier", state, check=find_fault)
    modified: State = await asyncio.wrap_future(future)
    return _read_state(body, given, modified), modified


def build_state(body: GenerationOptions, model: LoadedModel) -> State:
    """Lengths are numbers in it, also where the request leaves them to the model."""
    fields = _dump(body)
    max_len = min(body.truncation_length or model.max_model_len, model.max_model_len)
    max_tokens = to_max_tokens(body) or min(NUM_RESERVED, max_len // 2)
    others = {other: fields.get(own) for other, own in OTHER_NAMES.items()}
    return {
        **fields,
        **others,
        "max_new_tokens": max_tokens,
        "truncation_length": max_len,
        "history": {"internal": [], "visible": []},
    }


def _read_state(body: Body, given: State, state: State) -> Body:
    """`body` with what `state` says in another way than `given`; what the request has left out
    stays so. Raises ValidationError.
    """
    changed = {
        OTHER_NAMES.get(name, name): value
        for name, value in state.items()
        if name not in given or given[name] != value
    }
    fields = type(body).model_fields
    changed = {name: value for name, value in changed.items() if name in fields}
    if not changed:
        return body
    if "max_tokens" in changed:
        changed.setdefault("max_completion_tokens", None)  # it would win
    said = {name: value for name, value in _dump(body).items() if name in body.model_fields_set}
    return type(body).model_validate({**said, **changed})


def _dump(body: GenerationOptions) -> dict[str, Any]:
    """Its fields as a request may have them."""
    fields = body.model_dump(mode="json", warnings=False)  # a warning would quote a prompt
    return {**fields, "custom_token_bans": ", ".join(map(str, body.custom_token_bans))}
