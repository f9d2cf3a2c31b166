"""Instruction templates: which one a model or a request uses, and messages → text through it.

Knows nothing of modes, characters and requests: that is chat.py. How a template's text is run, and
within which limits, is in template_sandbox.py.
"""

import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from types import CodeType
from typing import Any

from modules.data_files import load_data_file, read_yaml
from modules.errors import (
    DataFileNotFoundError,
    InvalidRequestError,
    SettingsError,
    TemplateError,
    TemplateLimitError,
)
from modules.template_sandbox import RenderClock, compile_template, render

TEMPLATES_FOLDER = "instruction-templates"
CONFIG_FILES = ("config", "config-user")
MAX_TEMPLATE_CHARS = 64 * 1024
MAX_STOP_CHARS = 256
# For a handful of short messages.
MAX_TURNS_SECONDS = 0.25


class TemplateSource(StrEnum):
    REQUEST = "request"
    SETTINGS = "settings"
    MODEL = "model"
    CONFIG = "config"
    DEFAULT = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnFields:
    """A template in the older file format: texts with placeholders such as <|user-message|>."""

    turn_template: str = ""
    """A question and its reply."""
    user: str = ""
    """What <|user|> stands for; <|bot|> likewise."""
    bot: str = ""
    context: str = ""
    """What comes before the first turn."""
    system_message: str = ""
    """What <|system-message|> in the context stands for, unless a message says it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnOverrides:
    """What a request says instead of the fields of an older template; None: nothing."""

    turn_template: str | None = None
    user: str | None = None
    bot: str | None = None
    context: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """A Jinja text that turns messages into a prompt."""

    text: str
    name: str
    source: TemplateSource
    reason: str = ""
    """Why this one, in words for the start-up line."""
    special_tokens: Mapping[str, str] = field(default_factory=dict, hash=False)
    """The tokenizer's, by name: bos_token, eos_token and so on."""
    param: str | None = None
    """Wire name of the field that brought it, for errors."""
    turn_fields: TurnFields | None = None
    """What `text` was made of, if it was in the older format."""

    @property
    def takes_generation_prompt(self) -> bool:
        """False for templates that cannot open the assistant's turn on their own."""
        return "add_generation_prompt" in self.text


# Which template


def choose_template(
    *,
    root: Path,
    model_name: str,
    model_chat_template: str | Mapping[str, str] | None = None,
    special_tokens: Mapping[str, str] | None = None,
    vocabulary: Container[str] = (),
    settings_name: str | None = None,
    settings_text: str | None = None,
) -> ChatTemplate:
    """A model's template: settings > its own > models/config.yaml > ChatML if it knows it > Alpaca.

    `root` holds instruction-templates/ and models/.
    Raises DataFileNotFoundError, TemplateError, SettingsError.
    """
    tokens = dict(special_tokens or {})
    if settings_text:
        reason = "instruction_template_str in the settings"
        return _build_template(
            settings_text,
            name="instruction_template_str",
            source=TemplateSource.SETTINGS,
            reason=reason,
            special_tokens=tokens,
        )
    note = ""
    if not _is_given(settings_name) and (own := _pick_own_text(model_chat_template)):
        try:
            return _build_template(
                own,
                name="the model's own",
                source=TemplateSource.MODEL,
                reason="it comes with the model",
                special_tokens=tokens,
            )
        except TemplateError as error:
            note = f" ({error})"
    name, source, reason = _choose_name(root, model_name, vocabulary, settings_name)
    return _load_template(root, name, source=source, reason=reason + note, special_tokens=tokens)


def _choose_name(
    root: Path, model_name: str, vocabulary: Container[str], settings_name: str | None
) -> tuple[str, TemplateSource, str]:
    if settings_name and _is_given(settings_name):
        return settings_name, TemplateSource.SETTINGS, "instruction_template in the settings"
    matches = _iterate_matches(root, model_name)
    named = [(place, entry["instruction_template"]) for place, entry in matches if _names(entry)]
    if named:
        place, name = named[-1]
        return str(name), TemplateSource.CONFIG, f"the model's name matches {place}"
    if "<|im_start|>" in vocabulary:
        return "ChatML", TemplateSource.DEFAULT, "the model knows <|im_start|>"
    return "Alpaca", TemplateSource.DEFAULT, "nothing says which one this model was trained with"


def _names(entry: Mapping[str, Any]) -> bool:
    return bool(entry.get("instruction_template"))


def override_template(
    model_template: ChatTemplate,
    *,
    root: Path,
    name: str | None = None,
    text: str | None = None,
    turns: TurnOverrides | None = None,
) -> ChatTemplate:
    """The template that a request asks for, by text or else by name; without a wish, the model's.

    `turns` overrides fields of the named template or the model's, if it is in the older format;
    with a turn_template it needs none. A text wins over it.
    Raises DataFileNotFoundError, TemplateError.
    """
    tokens = model_template.special_tokens
    if text:
        return build_request_template(text, "instruction_template_str", tokens)
    template = model_template
    if name and _is_given(name):
        template = _load_template(
            root,
            name,
            source=TemplateSource.REQUEST,
            special_tokens=tokens,
            param="instruction_template",
        )
    return _override_turns(template, turns) if turns else template


# What the wire calls the fields of TurnOverrides.
_TURN_PARAMS = {
    "turn_template": "turn_template",
    "user": "name1_instruct",
    "bot": "name2_instruct",
    "context": "context_instruct",
}


def _override_turns(template: ChatTemplate, turns: TurnOverrides) -> ChatTemplate:
    given = {key: value for key in _TURN_PARAMS if (value := getattr(turns, key)) is not None}
    if not turns.turn_template:
        given.pop("turn_template", None)
    # An empty text takes away what an older template has there, and asks nothing of another one.
    if not given or (template.turn_fields is None and not any(given.values())):
        return template
    param = _TURN_PARAMS[next(iter(given))]
    if template.turn_fields is None and not turns.turn_template:
        raise TemplateError(
            f"{param} needs turn_template, or an instruction_template in the older format with "
            f"turns; {template.name} is written in Jinja.",
            param,
        )
    return _build_turn_template(
        replace(template.turn_fields or TurnFields(), **given),
        name=param if turns.turn_template else template.name,
        source=TemplateSource.REQUEST,
        special_tokens=template.special_tokens,
        param=param,
    )


def build_request_template(
    text: str, param: str, special_tokens: Mapping[str, str]
) -> ChatTemplate:
    """A template from the text in the request field `param`. Raises TemplateError."""
    if len(text) > MAX_TEMPLATE_CHARS:
        raise TemplateError(
            f"{param} has {len(text)} characters; at most {MAX_TEMPLATE_CHARS} are allowed.", param
        )
    return _build_template(
        text,
        name=param,
        source=TemplateSource.REQUEST,
        special_tokens=special_tokens,
        param=param,
    )


def match_model_config(root: Path, model_name: str) -> dict[str, Any]:
    """What models/config.yaml, then models/config-user.yaml say about a model: later entries win.

    Patterns are matched from the start of the name, upper and lower case alike.
    Raises SettingsError.
    """
    settings: dict[str, Any] = {}
    for _, entry in _iterate_matches(root, model_name):
        settings |= entry
    return settings


def _iterate_matches(root: Path, model_name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where each stands, in words, and what it says."""
    for file_name in CONFIG_FILES:
        for pattern, entry in _load_patterns(root / "models", file_name).items():
            if _matches(str(pattern), model_name, file_name) and isinstance(entry, Mapping):
                yield f"{pattern} in models/{file_name}.yaml", entry


def _load_patterns(folder: Path, file_name: str) -> Mapping[Any, Any]:
    try:
        patterns = load_data_file(folder, file_name, {".yaml": read_yaml})
    except DataFileNotFoundError:
        return {}
    except InvalidRequestError as error:
        raise SettingsError(str(error)) from error
    return patterns if isinstance(patterns, Mapping) else {}


def _matches(pattern: str, model_name: str, file_name: str) -> bool:
    try:
        return re.match(pattern, model_name, re.IGNORECASE) is not None
    except re.error as error:
        raise SettingsError(
            f"models/{file_name}.yaml: {pattern!r} is no regular expression: {error}"
        ) from error


def _is_given(name: str | None) -> bool:
    return name not in (None, "", "None")


def _pick_own_text(template: str | Mapping[str, str] | None) -> str | None:
    """Models that bring several templates name the usual one `default`."""
    if isinstance(template, Mapping):
        return template.get("default") or next(iter(template.values()), None)
    return template


def _load_template(root: Path, name: str, **fields: Any) -> ChatTemplate:
    """From a file in either format."""
    match load_data_file(root / TEMPLATES_FOLDER, name):
        case {"instruction_template": str(text)}:
            return _build_template(text, name=name, **fields)
        case {"turn_template": str()} as data:
            return _build_turn_template(_to_turn_fields(data), name=name, **fields)
    raise TemplateError(
        f"{TEMPLATES_FOLDER}/{name}.yaml has no key instruction_template with a Jinja text.",
        fields.get("param"),
    )


def _build_template(text: str, **fields: Any) -> ChatTemplate:
    template = ChatTemplate(text=text, **fields)
    _compile(template)
    return template


# The older file format

# Its placeholders in a turn, as Jinja expressions.
_PLACEHOLDERS = {
    "<|user-message|>": "message['content']",
    "<|bot-message|>": "message['content']",
    "<|system-message|>": "messages[0]['content']",
    "<|round|>": "turn.round",
}


def _to_turn_fields(data: Mapping[Any, Any]) -> TurnFields:
    names = [field.name for field in fields(TurnFields)]
    return TurnFields(**{name: str(data.get(name) or "") for name in names})


def _build_turn_template(turns: TurnFields, **given: Any) -> ChatTemplate:
    try:
        text = _convert_turns(turns)
    except ValueError as error:
        message = f"The chat template ({given['name']}) cannot be used: {error}"
        raise TemplateError(message, given.get("param")) from error
    return _build_template(text, turn_fields=turns, **given)


def _convert_turns(turns: TurnFields) -> str:
    """As a Jinja text. Raises ValueError where it would leave a message out, or is too long."""
    user_turn, bot_turn = _split_turn(turns.turn_template)
    context, default = _split_context(turns)

    def expression(text: str) -> str:
        return _to_expression(_fill(_fill(text, "<|user|>", turns.user), "<|bot|>", turns.bot))

    text = (
        "{%- set turn = namespace(round=0) %}"
        "{%- if messages[0]['role'] == 'system' %}{{ " + expression(context) + " }}"
        "{% else %}{{ " + expression(default) + " }}{% endif %}"
        "{%- for message in messages %}"
        "{% if message['role'] == 'assistant' %}{{ " + expression(bot_turn) + " }}"
        "{% elif message['role'] != 'system' %}{% set turn.round = turn.round + 1 %}"
        "{{ " + expression(user_turn) + " }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ "
        + expression(bot_turn.partition("<|bot-message|>")[0])
        + " }}{% endif %}"
    )
    _check_length(len(text))
    return text


def _split_turn(turn: str) -> tuple[str, str]:
    """The user's part and the bot's, which begins with its name."""
    start, reply = turn.find("<|bot|>"), turn.find("<|bot-message|>")
    start = start if 0 <= start < reply else reply
    if not 0 <= turn.find("<|user-message|>") < start:
        raise ValueError("turn_template must hold <|user-message|>, and after it <|bot-message|>")
    return turn[:start], turn[start:]


def _split_context(turns: TurnFields) -> tuple[str, str]:
    """What comes first when there is a system message, and when there is none."""
    context = turns.context
    if "<|system-message|>" in context:
        default = _fill(context, "<|system-message|>", turns.system_message)
        return context, default if default.strip() else ""
    # A fixed text: what the client says instead of it takes its place.
    return "<|system-message|>" + (context[len(context.rstrip()) :] or "\n\n"), context


def _fill(text: str, placeholder: str, value: str) -> str:
    _check_length(len(text) + text.count(placeholder) * len(value))
    return text.replace(placeholder, value)


def _check_length(length: int) -> None:
    if length > MAX_TEMPLATE_CHARS:
        raise ValueError(f"it has more than {MAX_TEMPLATE_CHARS} characters")


def _to_expression(text: str) -> str:
    pattern = "(" + "|".join(map(re.escape, _PLACEHOLDERS)) + ")"
    parts = [part for part in re.split(pattern, text) if part]
    literals = (_PLACEHOLDERS.get(part) or json.dumps(part, ensure_ascii=False) for part in parts)
    return " ~ ".join(literals) or "''"


# Rendering


def render_template(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
    clock: RenderClock,
) -> str:
    """The prompt.

    Raises TemplateError when the template refuses the messages, TemplateLimitError when it takes
    too long or makes too much.
    """
    if reads_only_parts(template):
        messages = [_to_parts(message) for message in messages]
    return _render(template, messages, add_generation_prompt, variables, clock)


def _to_parts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    is_text = isinstance(content, str)
    return {**message, "content": [{"type": "text", "text": content}]} if is_text else message


@lru_cache(maxsize=64)
def reads_only_parts(template: ChatTemplate) -> bool:
    """Whether it writes a content that is a list of parts, and none that is a text, as some models'
    that see images do.
    """
    if "type" not in template.text:
        return False
    message = {"role": "user", "content": _SENTINELS[0]}
    return not _writes(template, message) and _writes(template, _to_parts(message))


def _writes(template: ChatTemplate, message: Mapping[str, Any]) -> bool:
    try:
        text = _render(template, [message], False, {}, RenderClock(MAX_TURNS_SECONDS))
    except TemplateError:
        return False
    return _SENTINELS[0] in text


def _render(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
    clock: RenderClock,
) -> str:
    scope = {
        "bos_token": "",
        "eos_token": "",
        "tools": None,
        "documents": None,
        **template.special_tokens,
        **variables,
        "messages": messages,
        "add_generation_prompt": add_generation_prompt,
    }
    code = _compile(template)
    try:
        return render(code, scope, clock)
    except TemplateError as error:
        kind = TemplateLimitError if isinstance(error, TemplateLimitError) else TemplateError
        raise kind(
            f"The chat template ({template.name}) cannot render these messages: {error}",
            template.param or "messages",
        ) from error


def _compile(template: ChatTemplate) -> CodeType:
    try:
        return compile_template(template.text)
    except TemplateError as error:
        raise TemplateError(
            f"The chat template ({template.name}) does not compile: {error}", template.param
        ) from error


# Stop strings

_SENTINELS = ("FirstQuestion", "FirstAnswer", "SecondQuestion")
_TURNS = [
    {"role": role, "content": content}
    for role, content in zip(("user", "assistant", "user"), _SENTINELS, strict=True)
]
_MARKER = re.compile(r" *(<[^<>\s]+>)")
_NUMBER = re.compile(r"\d")
_SOUGHT = re.compile(r"""split\(\s*["']([^"']+)|["']([^"']+)["']\s+(?:not\s+)?in\b""")


# What is kept is short: a template can make a text of millions of characters.
@lru_cache(maxsize=64)
def render_turns(template: ChatTemplate, *names: tuple[str, str]) -> str:
    """A rule, if the template takes one, and two questions with a reply between them.

    Raises TemplateLimitError, as any messages would.
    """
    clock = RenderClock(MAX_TURNS_SECONDS)
    for messages in ([{"role": "system", "content": "FirstRule"}, *_TURNS], _TURNS):
        try:
            text = render_template(
                template,
                messages,
                add_generation_prompt=False,
                variables=dict(names),
                clock=clock,
            )
        except TemplateLimitError:
            raise
        except TemplateError:
            continue
        return text if len(text) <= MAX_TEMPLATE_CHARS else ""
    return ""


@lru_cache(maxsize=64)
def find_sought_texts(template: ChatTemplate) -> frozenset[str]:
    """What it looks for inside messages, such as `</think>`, behind which a reply begins."""
    return frozenset(split or looked_for for split, looked_for in _SOUGHT.findall(template.text))


def derive_stop_strings(template: ChatTemplate, *names: tuple[str, str]) -> tuple[str, ...]:
    """What shows that the assistant's turn is over: read off between a reply and the next question.

    The marker right after the reply (`<|im_end|>`), unless it is the eos token, where the model
    stops anyway; and the last line in front of the question, with the line break before it and no
    space after it (`"\\n### Instruction:"`), and of several lines the first up to its number
    (`"\\n[Round"`). With `names`, which are variables of the template, what stands in front of a
    reply counts too: others may not speak for the bot again.
    """
    _, _, rest = render_turns(template, *names).partition(_SENTINELS[0])
    opening, reply, after = rest.partition(_SENTINELS[1])
    between, question, _ = after.partition(_SENTINELS[2])
    if not (reply and question):
        return ()
    found = [*_split_stop_strings(between, template.special_tokens)]
    if names:
        found += _split_stop_strings(opening, template.special_tokens)
    return tuple(dict.fromkeys(text for text in found if len(text) <= MAX_STOP_CHARS))


def _split_stop_strings(between: str, special_tokens: Mapping[str, str]) -> Iterable[str]:
    if end := _MARKER.match(between):
        between = between[end.end() :]
        if end[1] != special_tokens.get("eos_token"):
            yield end[1]
    between = between.removeprefix(special_tokens.get("bos_token") or "").rstrip()
    before, line_break, line = between.rpartition("\n")
    first = _NUMBER.split(before.strip())[0].rstrip().partition("\n")[0]
    if before.startswith("\n") and len(first) > 1:
        yield f"\n{first}"
    if len(line.strip()) > 1:
        yield line_break + (line if line_break else line.strip())
