"""Characters: `characters/<name>.yaml` → Character, in the spellings of related programs too.

Knows nothing of prompts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.data_files import load_data_file
from modules.errors import InvalidRequestError

CHARACTERS_FOLDER = "characters"

# What each field is called in character files; the first one present counts.
_NAME = ("name", "bot", "<|bot|>", "char_name")
_USER_NAME = ("your_name", "user", "<|user|>")
_GREETING = ("greeting", "char_greeting", "first_mes")
# Used together where there is no `context`.
_PERSONA = (
    ("char_persona", "description"),
    ("personality",),
    ("world_scenario", "scenario"),
    ("example_dialogue", "mes_example"),
)
_PLACEHOLDER = re.compile(r"\{\{(user|char)\}\}|<(user|char|bot)>", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Character:
    name: str | None = None
    context: str = ""
    """Who the bot is: what the model reads before the dialogue. May hold {{user}} and {{char}}."""
    greeting: str = ""
    user_name: str | None = None
    """What the bot calls the user."""


def load_character(root: Path, name: str) -> Character:
    """Raises DataFileNotFoundError, InvalidRequestError."""
    data = load_data_file(root / CHARACTERS_FOLDER, name)
    if not isinstance(data, Mapping):
        raise InvalidRequestError(f"The character file of {name!r} holds no fields.", "character")
    return to_character(data)


def to_character(data: Mapping[str, Any]) -> Character:
    context = _read(data, ("context",)) or "\n\n".join(
        text for keys in _PERSONA if (text := _read(data, keys))
    )
    return Character(
        name=_read(data, _NAME) or None,
        context=context,
        greeting=_read(data, _GREETING),
        user_name=_read(data, _USER_NAME) or None,
    )


def fill_names(text: str, user: str, char: str) -> str:
    """`text` with {{user}}, {{char}}, <USER> and <BOT> replaced, in one pass."""

    def name_of(match: re.Match[str]) -> str:
        return user if (match[1] or match[2]).lower() == "user" else char

    return _PLACEHOLDER.sub(name_of, text)


def _read(data: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    return next((str(data[key]).strip() for key in keys if data.get(key)), "")
