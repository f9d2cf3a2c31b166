"""Messages and a template → text, with every system message in it and the right turn left open.

Which messages and which template is not decided here: that is chat.py.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from modules.errors import TemplateError, TemplateLimitError
from modules.image_places import find_places, to_parts
from modules.instruction_templates import ChatTemplate, TemplateSource, render_template
from modules.literal_text import make_mark
from modules.messages import Message, is_system, take_leading_system
from modules.template_sandbox import RenderClock

# Ends the text of the turn that stays open; what the template writes after it is cut off.
_OPEN_END = make_mark()
# With a number, ends each text that must not get lost.
_KEPT = make_mark()
_KEPT_END = re.compile(_KEPT + r"(\d{8})")

EditOpening = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Renderer:
    """A template with all it is rendered with but the messages."""

    template: ChatTemplate
    variables: Mapping[str, Any]
    clock: RenderClock

    def render_to_reply(
        self, history: list[Message], edit_opening: EditOpening | None = None
    ) -> str:
        """The prompt up to where the assistant's text begins.

        `edit_opening` may exchange what the template writes to open the assistant's turn.
        """
        if self.template.takes_generation_prompt:
            text = self.render(history, add_generation_prompt=True)
        else:
            text = self.render_open_reply(history, {"role": "assistant", "content": ""})
        # A reply's first token carries its own space; what a model was trained on is left as it is.
        text = text if self.template.source is TemplateSource.MODEL else text.rstrip(" ")
        if edit_opening is None:
            return text
        before = commonprefix([text, self.render(history)])
        return before + edit_opening(text[len(before) :])

    def render_open_reply(self, history: list[Message], reply: Message) -> str:
        """The prompt up to the end of the assistant's `reply`, which is to be gone on with."""
        reply = reply | {"content": reply["content"] + _OPEN_END}
        text, mark, _ = self.render([*history, reply]).rpartition(_OPEN_END)
        if not mark:
            name, param = self.template.name, self.template.param or "messages"
            message = f"The chat template ({name}) leaves out the assistant's last message."
            raise TemplateError(message, param)
        return text

    def render(self, history: list[Message], *, add_generation_prompt: bool = False) -> str:
        """Render with every system message in the text, where it stands if the template can do
        that, and with every result of a tool.

        Many templates refuse or drop a system message that is not the first, or two user messages
        in a row. Then these are folded into the user's messages, rather than lost.
        """
        history = [_adapt_message(message, self.template) for message in history]
        history, num_kept = _number_kept(history)
        rendered: list[str] = []
        refusals: list[TemplateError] = []
        for messages in _arrangements(history):
            try:
                text = self._render(messages, add_generation_prompt)
            except TemplateLimitError:
                raise
            except TemplateError as error:
                refusals.append(error)
                continue
            rendered.append(_KEPT_END.sub("", text))
            if len(set(_KEPT_END.findall(text))) == num_kept:
                return rendered[-1]
        if not rendered:
            raise refusals[0]
        return rendered[0]

    def _render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        return render_template(
            self.template,
            [_show_images(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            variables=self.variables,
            clock=self.clock,
        )


def _show_images(message: Message) -> Message:
    content = message["content"]
    return message | {"content": to_parts(content)} if find_places(content) else message


def _number_kept(history: list[Message]) -> tuple[list[Message], int]:
    """With a number at the end of each text that must be found in the prompt."""
    numbered, number = [], 0
    for message in history:
        text = message["content"]
        if text and (is_system(message) or message["role"] == "tool"):
            end = len(text.rstrip())
            message = message | {"content": f"{text[:end]}{_KEPT}{number:08}{text[end:]}"}
            number += 1
        numbered.append(message)
    return numbered, number


def _adapt_message(message: Message, template: ChatTemplate) -> Message:
    """Say it in words that the template knows: not all have developers, tools and calls of them."""
    if message["role"] == "developer" and "developer" not in template.text:
        return message | {"role": "system"}
    if message["role"] == "tool" and "tool" not in template.text:
        return _say_as_text(message)
    if "tool_calls" in message and "tool_calls" not in template.text:
        return _say_as_text(message)
    return message


def _say_as_text(message: Message) -> Message:
    """The result of a tool as the user's message, a call of one as part of the reply's text."""
    if message["role"] == "tool":
        return message | {"role": "user"}
    if "tool_calls" not in message:
        return message
    calls = [call.get("function", call) for call in message["tool_calls"]]
    texts = (message["content"], *(json.dumps(call, ensure_ascii=False) for call in calls))
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return rest | {"content": "\n".join(filter(None, texts))}


def _arrangements(history: list[Message]) -> Iterator[list[Message]]:
    """Each different way to say the same, the most faithful first."""
    tried: list[list[Message]] = []
    for spoken in (history, [_say_as_text(message) for message in history]):
        for arrange in (list, _fold_later_system, _fold_all_system):
            messages = arrange(spoken)
            if messages not in tried:
                yield messages
                tried.append(messages)


def _fold_later_system(history: list[Message]) -> list[Message]:
    leading = take_leading_system(history)
    if not leading:
        return _fold_all_system(history)
    return [_join(leading), *_fold_all_system(history[len(leading) :])]


def _fold_all_system(history: list[Message]) -> list[Message]:
    """System texts go in front of the next user's text; messages of one role in a row become one,
    but for calls and results of tools.
    """
    groups: list[list[Message]] = []
    for message in history:
        if is_system(message):
            message = {"role": "user", "content": message["content"]}
        if groups and _are_alike(groups[-1][-1], message):
            groups[-1].append(message)
        else:
            groups.append([message])
    return [_join(group) for group in groups]


def _are_alike(one: Message, other: Message) -> bool:
    is_plain = "tool_calls" not in one and "tool_calls" not in other
    return one["role"] == other["role"] and one["role"] in ("user", "assistant") and is_plain


def _join(messages: list[Message]) -> Message:
    if len(messages) == 1:
        return messages[0]
    return messages[0] | {"content": "\n\n".join(message["content"] for message in messages)}
