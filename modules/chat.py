"""Messages and a mode → Conversation: what is to be written, and where a reply to it ends.

Knows neither sampling nor HTTP, nor how long a prompt may be. How a template is rendered is in
chat_rendering.py; here is what is rendered: whose messages, under which names, and with which turn
left open.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from modules.characters import Character, fill_names, load_character
from modules.chat_rendering import EditOpening, Renderer
from modules.errors import InvalidRequestError, TemplateError
from modules.image_places import find_places, split_at_places
from modules.instruction_templates import (
    ChatTemplate,
    TemplateSource,
    TurnOverrides,
    build_request_template,
    derive_stop_strings,
    find_sought_texts,
    override_template,
    render_turns,
)
from modules.literal_text import Marker, is_marked, unmark
from modules.messages import Message, check_message, take_leading_system
from modules.template_sandbox import RenderClock

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

ChooseMarker = Callable[..., Marker]


@dataclass(frozen=True, slots=True)
class Prompt:
    text: str
    marks: tuple[int, ...] = ()
    """Places inside what looks like a special token and is the text of a message."""
    add_special_tokens: bool = False
    """Whether the tokenizer adds its own, such as bos: a model's own template spells them out."""
    images: tuple[int, ...] = ()
    """The numbers of those that it has places for, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages in one of the modes, which can be written with all of them or with fewer."""

    messages: tuple[Message, ...]
    """The client's, after those that a character brings."""
    stop_strings: tuple[str, ...]
    has_greeting: bool
    """The first message but for the system's is not the client's."""
    is_continued: bool
    """The last message, the assistant's, is to be gone on with."""
    template: ChatTemplate
    """Of the prompt as a whole."""
    render: Callable[[list[Message]], str]

    def write(self, messages: Sequence[Message]) -> Prompt:
        """The prompt that asks for the assistant's next message, or for more of the last one.

        Raises TemplateError when a template refuses the messages.
        """
        text, marks = unmark(self.render(list(messages)))
        images = tuple(n for message in messages for n in find_places(message["content"]))
        return Prompt(text, marks, self._needs_special_tokens(text, marks), images)

    def _needs_special_tokens(self, text: str, marks: Sequence[int]) -> bool:
        """A model's own template writes every special token; another one may leave bos to us."""
        if self.template.source is TemplateSource.MODEL:
            return False
        bos_token = self.template.special_tokens.get("bos_token")
        if not bos_token or not text.startswith(bos_token):
            return True
        return is_marked(0, len(bos_token), marks)


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
    turns: TurnOverrides | None = None
    system_message: str | None = None
    """For conversations that begin with none."""
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


@dataclass(frozen=True, slots=True)
class ChatResources:
    """What a conversation is made with, whatever the request says."""

    model_template: ChatTemplate
    root: Path
    """Holds characters/ and instruction-templates/."""
    choose_marker: ChooseMarker = lambda turn_text, sought=frozenset(): Marker()
    """For a template that writes such a text around messages, and looks for some inside of them:
    what marks their special tokens."""
    edit_opening: EditOpening | None = None
    """Exchanges what opens the assistant's turn."""


def open_conversation(
    messages: Sequence[Mapping[str, Any]], options: ChatOptions, resources: ChatResources
) -> Conversation:
    """Raises:
    InvalidRequestError: a message is not what it has to be; `param` says which.
    DataFileNotFoundError: no such character or template.
    TemplateError: a template does not compile.
    """
    history = [check_message(message, index) for index, message in enumerate(messages)]
    if not history:
        raise InvalidRequestError("messages is empty: there is nothing to reply to.", "messages")
    if options.continue_:
        _check_can_continue(history)
    if options.mode not in _OPENERS:
        known = ", ".join(_OPENERS)
        raise InvalidRequestError(f"mode must be one of {known}, not {options.mode!r}.", "mode")
    if options.mode != "instruct" and any(find_places(m["content"]) for m in history):
        message = f"In the mode {options.mode} there are no images, only in the mode instruct."
        raise InvalidRequestError(message, "mode")
    try:
        return _OPENERS[options.mode](history, options, resources)
    except RecursionError as error:
        raise InvalidRequestError("messages are nested too deeply.", "messages") from error


def _check_can_continue(history: list[Message]) -> None:
    param = f"messages[{len(history) - 1}]"
    if history[-1]["role"] != "assistant":
        raise InvalidRequestError(
            "continue_ needs a last message from the assistant, to go on with.", f"{param}.role"
        )
    if history[-1]["content"] is None:
        raise InvalidRequestError(f"{param} has no text to go on with.", f"{param}.content")


# The three modes


def _open_instruct(
    history: list[Message], options: ChatOptions, resources: ChatResources
) -> Conversation:
    template = _instruction_template(options, resources)
    if "image" not in template.text and any(find_places(m["content"]) for m in history):
        message = f"The chat template ({template.name}) has no place for images."
        raise TemplateError(message, template.param or "messages")
    turns = render_turns(template)
    marker = resources.choose_marker(turns)
    reply_marker = resources.choose_marker(turns, find_sought_texts(template))
    variables = marker.mark_nested(options.chat_template_kwargs)
    renderer = Renderer(template, variables, RenderClock())

    def write(messages: list[Message]) -> str:
        return _write(renderer, messages, options, resources)

    return Conversation(
        messages=_mark(_add_system_message(history, options), marker, reply_marker),
        stop_strings=derive_stop_strings(template),
        has_greeting=False,
        is_continued=options.continue_,
        template=template,
        render=write,
    )


def _open_chat(
    history: list[Message], options: ChatOptions, resources: ChatResources
) -> Conversation:
    template = _chat_template(options, resources)
    scene = _set_scene(options, resources.root)
    marker = resources.choose_marker(render_turns(template))
    renderer = Renderer(template, scene.mark_names(marker), RenderClock())

    def write(messages: list[Message]) -> str:
        return _write(renderer, messages, options, resources)

    return Conversation(
        messages=_mark(scene.open(history), marker),
        stop_strings=scene.find_stop_strings(template),
        has_greeting=scene.greets(history),
        is_continued=options.continue_,
        template=template,
        render=write,
    )


def _open_chat_instruct(
    history: list[Message], options: ChatOptions, resources: ChatResources
) -> Conversation:
    """The whole dialogue is one user turn; the reply to it begins with the bot's name."""
    command = re.split(r"(<\|character\|>|<\|prompt\|>)", options.chat_instruct_command)
    if command.count("<|prompt|>") != 1:
        raise InvalidRequestError(
            "chat_instruct_command must hold <|prompt|> once, where the dialogue goes.",
            "chat_instruct_command",
        )
    template = _instruction_template(options, resources)
    scene = _set_scene(options, resources.root)
    marker = resources.choose_marker(render_turns(template))
    names = scene.mark_names(marker)
    clock = RenderClock()
    inner = Renderer(_chat_template(options, resources), names, clock)
    outer = Renderer(template, marker.mark_nested(options.chat_template_kwargs), clock)
    rules = _mark(_add_system_message(history, options)[: -len(history)], marker)

    def write(messages: list[Message]) -> str:
        opening = f"{names['name2']}:"
        if options.continue_:
            opening += f" {messages[-1]['content']}"
            messages = messages[:-1]
        elif resources.edit_opening is not None:
            opening = resources.edit_opening(opening)
        filling = {"<|character|>": names["name2"], "<|prompt|>": inner.render(messages).strip()}
        turn = "".join(filling[part] if part in filling else marker.mark(part) for part in command)
        asked = {"role": "user", "content": turn}
        return outer.render_open_reply([*rules, asked], {"role": "assistant", "content": opening})

    spoken = scene.find_stop_strings(inner.template)
    stop_strings = dict.fromkeys((*spoken, *derive_stop_strings(template)))
    return Conversation(
        messages=_mark(scene.open(history), marker),
        stop_strings=tuple(stop_strings),
        has_greeting=scene.greets(history),
        is_continued=options.continue_,
        template=template,
        render=write,
    )


Opener = Callable[[list[Message], ChatOptions, ChatResources], Conversation]
_OPENERS: Mapping[str, Opener] = {
    "instruct": _open_instruct,
    "chat": _open_chat,
    "chat-instruct": _open_chat_instruct,
}


def _write(
    renderer: Renderer, messages: list[Message], options: ChatOptions, resources: ChatResources
) -> str:
    if options.continue_:
        *before, last = messages
        return renderer.render_open_reply(before, last)
    if not options.add_generation_prompt:
        return renderer.render(messages)
    return renderer.render_to_reply(messages, resources.edit_opening)


def _instruction_template(options: ChatOptions, resources: ChatResources) -> ChatTemplate:
    return override_template(
        resources.model_template,
        root=resources.root,
        name=options.instruction_template,
        text=options.instruction_template_str,
        turns=options.turns,
    )


def _chat_template(options: ChatOptions, resources: ChatResources) -> ChatTemplate:
    tokens = resources.model_template.special_tokens
    if options.chat_template_str:
        return build_request_template(options.chat_template_str, "chat_template_str", tokens)
    return ChatTemplate(
        text=DEFAULT_CHAT_TEMPLATE,
        name="of the chat modes",
        source=TemplateSource.DEFAULT,
        special_tokens=tokens,
    )


def _add_system_message(history: list[Message], options: ChatOptions) -> list[Message]:
    if not options.system_message or take_leading_system(history):
        return history
    return [{"role": "system", "content": options.system_message}, *history]


def _mark(
    history: Sequence[Message], marker: Marker, reply_marker: Marker | None = None
) -> tuple[Message, ...]:
    """What a template takes out of replies, such as thoughts, it must find in them."""
    return tuple(
        _mark_message(
            message, reply_marker if reply_marker and message["role"] == "assistant" else marker
        )
        for message in history
    )


def _mark_message(message: Message, marker: Marker) -> Message:
    texts = {key: message[key] for key in ("content", "name") if isinstance(message.get(key), str)}
    marked = {key: _mark_text(text, marker) for key, text in texts.items()}
    return {**marker.mark_nested(message), **marked}


def _mark_text(text: str, marker: Marker) -> str:
    """Each of the texts between images: a template may write them somewhere else."""
    pieces = split_at_places(text)
    pieces[::2] = map(marker.mark, pieces[::2])
    return "".join(pieces)


# Characters


@dataclass(frozen=True, slots=True)
class _Scene:
    """Who talks to whom, and what came before the first message."""

    name1: str
    name2: str
    context: str
    greeting: str

    def mark_names(self, marker: Marker) -> dict[str, str]:
        return {"name1": marker.mark(self.name1), "name2": marker.mark(self.name2)}

    def find_stop_strings(self, template: ChatTemplate) -> tuple[str, ...]:
        """What shows that somebody else's turn begins, or another one of the bot's."""
        own = derive_stop_strings(template, ("name1", self.name1), ("name2", self.name2))
        names = (f"\n{self.name1}:", f"\n{self.name2}:")
        return tuple(dict.fromkeys((*names, *own)))

    def greets(self, history: list[Message]) -> bool:
        """A history whose dialogue the assistant opens has its greeting already."""
        dialogue = history[len(take_leading_system(history)) :]
        return bool(self.greeting) and not (dialogue and dialogue[0]["role"] == "assistant")

    def open(self, history: list[Message]) -> list[Message]:
        """Context, the client's leading system messages, greeting, then the rest."""
        leading = take_leading_system(history)
        context = {"role": "system", "content": self.context}
        greeting = {"role": "assistant", "content": self.greeting}
        return [
            *([context] if self.context else []),
            *leading,
            *([greeting] if self.greets(history) else []),
            *history[len(leading) :],
        ]


def find_names(options: ChatOptions, root: Path) -> tuple[str, str]:
    """What the user and the bot are called. Raises DataFileNotFoundError, InvalidRequestError."""
    return _choose_names(options, _load_character(options, root))


def _load_character(options: ChatOptions, root: Path) -> Character:
    """Where there is dialogue; elsewhere nobody asks whether it is there."""
    has_character = options.mode != "instruct" and options.character not in (None, "", "None")
    return load_character(root, options.character or "") if has_character else Character()


def _choose_names(options: ChatOptions, character: Character) -> tuple[str, str]:
    name1 = options.name1 or character.user_name or options.default_name1
    return name1, options.name2 or character.name or "AI"


def _set_scene(options: ChatOptions, root: Path) -> _Scene:
    character = _load_character(options, root)
    name1, name2 = _choose_names(options, character)
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
