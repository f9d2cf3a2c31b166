"""The hooks of other extensions on the way from a chat request to its prompt."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

from extensions.openai.chat_prompts import (
    ChatPrompt,
    Measure,
    build_chat_prompt,
    build_custom_prompt,
    name_speakers,
)
from extensions.openai.hooks import modify_state
from extensions.openai.typing import ChatCompletionRequest
from modules.chat_history import Dialogue, find_history_fault, read_dialogue
from modules.chat_rendering import EditOpening
from modules.context import Context
from modules.extensions import Extensions
from modules.hooks import State
from modules.literal_text import unmark
from modules.loaded_model import LoadedModel

Body = ChatCompletionRequest

# What clients send as templates may take its time, but only one at a time: the others that need a
# thread shall not wait for it.
STRANGERS = ThreadPoolExecutor(1, "clients' templates")


async def prepare_chat(
    context: Context, model: LoadedModel, body: Body
) -> tuple[Body, State, ChatPrompt]:
    """The request and its prompt as hooks leave them, and the state for the hooks to come.

    Raises HookError, and what `build_chat_prompt` raises.
    """
    extensions = context.extensions
    body, state = await _modify_request(context, body, model)
    text = await _ask_for_prompt(extensions, body, state)
    if text is not None:
        build = partial(build_custom_prompt, model, body, text)
    else:
        edit_opening = _make_opening_editor(extensions, state)
        measure = _make_measure(extensions)
        build = partial(build_chat_prompt, model, body, edit_opening, measure)
    executor = STRANGERS if body.brings_template else None
    prompt = await asyncio.get_running_loop().run_in_executor(executor, build)
    return body, state, prompt


async def _modify_request(context: Context, body: Body, model: LoadedModel) -> tuple[Body, State]:
    extensions = context.extensions
    if not extensions.needs_state and not extensions.has("history_modifier"):
        return body, {}
    names = await asyncio.to_thread(name_speakers, model, body)
    more = {**names, "history": read_dialogue(body.messages).history}
    body, state = await modify_state(extensions, body, model, more)
    dialogue = await _modify_history(extensions, read_dialogue(body.messages))
    state["history"] = dialogue.history
    dialogue = await _modify_input(extensions, dialogue, state)
    return body.model_copy(update={"messages": list(dialogue.messages)}), state


async def _modify_history(extensions: Extensions, dialogue: Dialogue) -> Dialogue:
    if not extensions.has("history_modifier"):
        return dialogue
    future = extensions.chain("history_modifier", dialogue.history, check=find_history_fault)
    return dialogue.replace_history(await asyncio.wrap_future(future))


async def _modify_input(extensions: Extensions, dialogue: Dialogue, state: State) -> Dialogue:
    text = dialogue.input
    if text is None:
        return dialogue
    if extensions.has("chat_input_modifier"):
        future = extensions.chain("chat_input_modifier", text, text, state)
        text, _ = await asyncio.wrap_future(future)
    if extensions.has("input_modifier"):
        text = await asyncio.wrap_future(extensions.chain("input_modifier", text, state, True))
    return dialogue.replace_input(str(text))


async def _ask_for_prompt(extensions: Extensions, body: Body, state: State) -> str | None:
    """The whole prompt, if an extension writes it."""
    if not extensions.has("custom_generate_chat_prompt"):
        return None
    dialogue = read_dialogue(body.messages)
    history = dialogue.whole_history if body.continues else dialogue.history
    future = extensions.first(
        "custom_generate_chat_prompt",
        dialogue.input or "",
        state,
        history=history,
        _continue=body.continues,
    )
    text: str | None = await asyncio.wrap_future(future)
    return text


def _make_opening_editor(extensions: Extensions, state: State) -> EditOpening | None:
    """A prompt is tried out with fewer messages until it fits: a hook hears of it once."""
    if not extensions.has("bot_prefix_modifier"):
        return None

    @cache
    def edit(opening: str) -> str:
        plain, _ = unmark(opening)
        edited: str = extensions.chain("bot_prefix_modifier", plain, state).result()
        return opening + edited.removeprefix(plain) if edited.startswith(plain) else edited

    return edit


def _make_measure(extensions: Extensions) -> Measure | None:
    if not extensions.has("custom_tokenized_length"):
        return None

    def measure(text: str) -> int | None:
        length: int | None = extensions.first("custom_tokenized_length", text).result()
        return length

    return measure
