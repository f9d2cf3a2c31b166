"""Messages and a mode → Prompt: the text for the model, and where a reply to it ends.

Knows neither sampling nor HTTP. How a template is rendered is in instruction_templates.py; here is
what is rendered: whose messages, under which names, and with which turn left open.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from modules.characters import Character, fill_names, load_character
from modules.errors import InvalidRequestError, TemplateError, TemplateLimitError
from modules.instruction_templates import (
    ChatTemplate,
    TemplateSource,
    build_request_template,
    derive_stop_strings,
    override_template,
    render_template,
)

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")

DEFAULT_CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- name1 + ': ' + message['content'] | trim + '\\n' }}
    {%- elif message['role'] == 'assistant' %}
        {{- name2 + ': ' + message['content'] | trim + '\\n' }}
    {%- else %}
        {{- message['content'] | trim + '\\n\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- name2 + ':' }}
{%- endif %}"""


@dataclass(frozen=True, slots=True)
class Prompt:
    text: str
    stop_strings: tuple[str, ...] = ()
    add_special_tokens: bool = False
    """Whether the tokenizer adds its own, such as bos: a model's own template spells them out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """What shapes the prompt besides the messages: of the request, else of the settings."""

    mode: Literal["instruct", "chat", "chat-instruct"] = "instruct"
    continue_: bool = False
    """Go on with the last message, which is the assistant's. The reply is the new text alone."""
    add_generation_prompt: bool = True
    instruction_template: str | None = None
    """Name of a file; None and "None" mean the model's."""
    instruction_template_str: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables for the instruction template: tools, documents, enable_thinking and so on."""

    character: str | None = None
    name1: str | None = None
    """The user's name; None: what the character calls the user, else `default_name1`."""
    name2: str | None = None
    """The bot's name; None: the character's."""
    context: str | None = None
    """Instead of the character's context, and with it of its greeting."""
    greeting: str | None = None
    user_bio: str | None = None
    chat_template_str: str | None = None
    chat_instruct_command: str = "<|prompt|>"
    default_name1: str = "You"
    default_context: str = ""
    """For characters that bring none; the greeting likewise."""
    default_greeting: str = ""


def build_prompt(
    messages: Sequence[Mapping[str, Any]],
    options: ChatOptions,
    model_template: ChatTemplate,
    root: Path,
) -> Prompt:
    """The prompt that asks for the assistant's next message.

    `root` holds characters/ and instruction-templates/.

    Raises:
        InvalidRequestError: a message is not what it has to be; `param` says which.
        DataFileNotFoundError: no such character or template.
        TemplateError: a template does not compile, or refuses the messages.
    """
    history = [_check_message(message, index) for index, message in enumerate(messages)]
    if not history:
        raise InvalidRequestError("messages is empty: there is nothing to reply to.", "messages")
    if options.continue_:
        _check_can_continue(history)
    if options.mode not in _BUILDERS:
        known = ", ".join(_BUILDERS)
        raise InvalidRequestError(f"mode must be one of {known}, not {options.mode!r}.", "mode")
    return _BUILDERS[options.mode](history, options, model_template, root)


# The three modes


def _build_instruct(
    history: list[Message], options: ChatOptions, model_template: ChatTemplate, root: Path
) -> Prompt:
    template = _instruction_template(options, model_template, root)
    text = _render_to_reply(template, history, options, options.chat_template_kwargs)
    return Prompt(text, derive_stop_strings(template), _needs_special_tokens(template, text))


def _build_chat(
    history: list[Message], options: ChatOptions, model_template: ChatTemplate, root: Path
) -> Prompt:
    template = _chat_template(options, model_template)
    scene = _set_scene(options, root)
    text = _render_to_reply(template, scene.open(history), options, scene.names)
    return Prompt(text, scene.stop_strings, _needs_special_tokens(template, text))


def _build_chat_instruct(
    history: list[Message], options: ChatOptions, model_template: ChatTemplate, root: Path
) -> Prompt:
    """The whole dialogue is one user turn; the reply to it begins with the bot's name."""
    if "<|prompt|>" not in options.chat_instruct_command:
        raise InvalidRequestError(
            "chat_instruct_command must hold <|prompt|>, where the dialogue goes.",
            "chat_instruct_command",
        )
    scene = _set_scene(options, root)
    opening = f"{scene.name2}:"
    dialogue = scene.open(history)
    if options.continue_:
        opening += f" {dialogue.pop()['content']}"
    written = _render(_chat_template(options, model_template), dialogue, scene.names)
    command = options.chat_instruct_command.replace("<|character|>", scene.name2)
    turn = {"role": "user", "content": command.replace("<|prompt|>", written.strip())}

    template = _instruction_template(options, model_template, root)
    text = _render_open_reply(template, [turn], opening, options.chat_template_kwargs)
    stop_strings = (*scene.stop_strings, *derive_stop_strings(template))
    return Prompt(text, tuple(dict.fromkeys(stop_strings)), _needs_special_tokens(template, text))


_BUILDERS: dict[str, Callable[[list[Message], ChatOptions, ChatTemplate, Path], Prompt]] = {
    "instruct": _build_instruct,
    "chat": _build_chat,
    "chat-instruct": _build_chat_instruct,
}


def _instruction_template(
    options: ChatOptions, model_template: ChatTemplate, root: Path
) -> ChatTemplate:
    return override_template(
        model_template,
        root=root,
        name=options.instruction_template,
        text=options.instruction_template_str,
    )


def _chat_template(options: ChatOptions, model_template: ChatTemplate) -> ChatTemplate:
    text = options.chat_template_str or DEFAULT_CHAT_TEMPLATE
    return build_request_template(text, "chat_template_str", model_template.special_tokens)


def _needs_special_tokens(template: ChatTemplate, text: str) -> bool:
    """A model's own template writes every special token; another one may leave bos to us."""
    if template.source is TemplateSource.MODEL:
        return False
    bos_token = template.special_tokens.get("bos_token")
    return not (bos_token and text.startswith(bos_token))


# Characters


@dataclass(frozen=True, slots=True)
class _Scene:
    """Who talks to whom, and what came before the first message."""

    name1: str
    name2: str
    context: str
    greeting: str

    @property
    def names(self) -> dict[str, str]:
        return {"name1": self.name1, "name2": self.name2}

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((f"\n{self.name1}:", f"\n{self.name2}:")))

    def open(self, history: list[Message]) -> list[Message]:
        """Context, the client's leading system messages, greeting, then the rest.

        A history whose dialogue the assistant opens has its greeting already.
        """
        leading = _leading_system(history)
        dialogue = history[len(leading) :]
        is_greeted = bool(dialogue) and dialogue[0]["role"] == "assistant"
        return [
            *([{"role": "system", "content": self.context}] if self.context else []),
            *leading,
            *(
                [{"role": "assistant", "content": self.greeting}]
                if self.greeting and not is_greeted
                else []
            ),
            *dialogue,
        ]


def _set_scene(options: ChatOptions, root: Path) -> _Scene:
    has_character = options.character not in (None, "", "None")
    character = load_character(root, options.character or "") if has_character else Character()
    name1 = options.name1 or character.user_name or options.default_name1
    name2 = options.name2 or character.name or "AI"
    context = options.context
    greeting = options.greeting
    if context is None:
        context = character.context or options.default_context
        if greeting is None:
            greeting = character.greeting or options.default_greeting
    paragraphs = (context.strip(), (options.user_bio or "").strip())
    return _Scene(
        name1=name1,
        name2=name2,
        context=fill_names("\n\n".join(filter(None, paragraphs)), name1, name2),
        greeting=fill_names((greeting or "").strip(), name1, name2),
    )


# Rendering

# Stands for the text of the turn that stays open; what the template writes after it is cut off.
_OPEN_REPLY = "9f2c-open-reply-9f2c"


def _render_to_reply(
    template: ChatTemplate,
    history: list[Message],
    options: ChatOptions,
    variables: Mapping[str, Any],
) -> str:
    if options.continue_:
        *before, last = history
        return _render_open_reply(template, before, last["content"], variables)
    if not options.add_generation_prompt:
        return _render(template, history, variables)
    if template.takes_generation_prompt:
        text = _render(template, history, variables, add_generation_prompt=True)
    else:
        text = _render_open_reply(template, history, "", variables)
    # A reply's first token carries its own space; what a model was trained on is left as it is.
    return text if template.source is TemplateSource.MODEL else text.rstrip(" ")


def _render_open_reply(
    template: ChatTemplate, history: list[Message], opening: str, variables: Mapping[str, Any]
) -> str:
    """The prompt up to the end of `opening`, with which the assistant's turn begins."""
    reply = {"role": "assistant", "content": _OPEN_REPLY}
    text, mark, _ = _render(template, [*history, reply], variables).rpartition(_OPEN_REPLY)
    if not mark:
        raise TemplateError(
            f"The chat template ({template.name}) leaves out the assistant's last message.",
            template.param or "messages",
        )
    return text + opening


def _render(
    template: ChatTemplate,
    history: list[Message],
    variables: Mapping[str, Any],
    *,
    add_generation_prompt: bool = False,
) -> str:
    """Render with every system message in the text, where it stands if the template can do that.

    Many templates refuse or drop a system message that is not the first, or two user messages in
    a row. Then these are folded into the user's messages, rather than lost.
    """
    history = [_adapt_message(message, template) for message in history]
    system_texts = [message["content"].strip() for message in history if _is_system(message)]
    rendered: list[str] = []
    refusals: list[TemplateError] = []
    for messages in _arrangements(history):
        try:
            text = render_template(
                template,
                messages,
                add_generation_prompt=add_generation_prompt,
                variables=variables,
            )
        except TemplateLimitError:
            raise
        except TemplateError as error:
            refusals.append(error)
            continue
        if all(system_text in text for system_text in system_texts):
            return text
        rendered.append(text)
    if not rendered:
        raise refusals[0]
    return rendered[0]


def _adapt_message(message: Message, template: ChatTemplate) -> Message:
    """Say it in words that the template knows: not all have developers and calls of tools."""
    if message["role"] == "developer" and "developer" not in template.text:
        return message | {"role": "system"}
    if message["content"] is None and "tool_calls" not in template.text:
        return message | {"content": ""}
    return message


def _arrangements(history: list[Message]) -> Iterator[list[Message]]:
    """Each different way to say the same, the most faithful first."""
    tried: list[list[Message]] = []
    for arrange in (list, _fold_later_system, _fold_all_system):
        messages = arrange(history)
        if messages not in tried:
            yield messages
            tried.append(messages)


def _fold_later_system(history: list[Message]) -> list[Message]:
    leading = _leading_system(history)
    if not leading:
        return _fold_all_system(history)
    system = leading[0] | {"content": _join(message["content"] for message in leading)}
    return [system, *_fold_all_system(history[len(leading) :])]


def _fold_all_system(history: list[Message]) -> list[Message]:
    """System texts go in front of the next user's text; user messages in a row become one."""
    folded: list[Message] = []
    for message in history:
        if _is_system(message):
            message = {"role": "user", "content": message["content"]}
        if folded and folded[-1]["role"] == message["role"] == "user":
            texts = (folded[-1]["content"], message["content"])
            folded[-1] = folded[-1] | {"content": _join(texts)}
        else:
            folded.append(message)
    return folded


def _join(texts: Iterable[str]) -> str:
    return "\n\n".join(texts)


def _leading_system(history: list[Message]) -> list[Message]:
    return list(takewhile(_is_system, history))


def _is_system(message: Message) -> bool:
    return message["role"] in ("system", "developer")


# What a message has to be


def _check_message(message: Any, index: int) -> Message:
    """A copy for the templates: a known role, the content as one text, no fields without value."""
    param = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f"{param} must be an object.", param)
    role = message.get("role")
    if role not in ROLES:
        raise InvalidRequestError(
            f"{param}.role must be one of {', '.join(ROLES)}, not {role!r}.", f"{param}.role"
        )
    given = {key: value for key, value in message.items() if value is not None}
    if "tool_calls" in given:
        given["tool_calls"] = _check_tool_calls(given["tool_calls"], f"{param}.tool_calls")
    content = _check_content(given, f"{param}.content")
    return {**given, "content": content}


def _check_content(message: Mapping[str, Any], param: str) -> str | None:
    match message.get("content"):
        case str(text):
            return text
        case [*parts]:
            return "\n".join(_check_part(part, f"{param}[{i}]") for i, part in enumerate(parts))
        case None if message["role"] == "assistant" and message.get("tool_calls"):
            return None
    raise InvalidRequestError(f"{param} must be a text or a list of text parts.", param)


def _check_part(part: Any, param: str) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image_url" | "input_image" | "image"}:
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


def _check_can_continue(history: list[Message]) -> None:
    param = f"messages[{len(history) - 1}]"
    if history[-1]["role"] != "assistant":
        raise InvalidRequestError(
            "continue_ needs a last message from the assistant, to go on with.", f"{param}.role"
        )
    if history[-1]["content"] is None:
        raise InvalidRequestError(f"{param} has no text to go on with.", f"{param}.content")
