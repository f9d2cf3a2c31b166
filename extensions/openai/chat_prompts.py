"""A chat request → the prompt that the model reads; settings fill what the request leaves out."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from extensions.openai.sampling import to_room
from extensions.openai.typing import ChatCompletionRequest
from modules.chat import (
    ChatOptions,
    ChatResources,
    Conversation,
    find_names,
    open_conversation,
)
from modules.chat_rendering import EditOpening
from modules.context_fitting import Room, fit_prompt
from modules.engine.image_inputs import ImageInputs
from modules.errors import ContextLengthExceededError, InvalidRequestError, SettingsError
from modules.image_reader import RequestImages
from modules.instruction_templates import ChatTemplate, TemplateSource, TurnOverrides
from modules.loaded_model import LoadedModel
from modules.prompt_tokens import strip_bos
from modules.settings import PROJECT_ROOT, Settings

TRIAL = {"role": "user", "content": "Hello!"}
ANY_TEMPLATE = "{{ messages[-1].content }}"

Measure = Callable[[str], int | None]
"""How many tokens a prompt has; None: as many as the tokenizer says."""


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    text: str
    token_ids: tuple[int, ...]
    num_dropped_messages: int
    stop_strings: tuple[str, ...]
    images: tuple[ImageInputs, ...] = ()


def build_chat_prompt(
    model: LoadedModel,
    body: ChatCompletionRequest,
    edit_opening: EditOpening | None = None,
    measure: Measure | None = None,
    images: RequestImages | None = None,
) -> ChatPrompt:
    """A template that a client sent may take its time: call it in a thread.

    Raises what `open_chat` and `fit_prompt` raise.
    """
    conversation = open_chat(model, body, edit_opening)
    drops_turns = (body.truncate or model.settings.truncate) == "turns"
    room = to_room(body, model)
    if measure is not None:
        room = _leave_room(room, conversation, model, measure)
    fitted = fit_prompt(conversation, model, room, drops_turns=drops_turns, images=images)
    token_ids = fitted.token_ids
    if not body.add_bos_token:
        token_ids = strip_bos(token_ids, model.tokenizer.bos_token_id)
    return ChatPrompt(
        fitted.text,
        token_ids,
        fitted.num_dropped_messages,
        conversation.stop_strings,
        fitted.images,
    )


def build_custom_prompt(model: LoadedModel, body: ChatCompletionRequest, text: str) -> ChatPrompt:
    """A prompt that was not made of a template; the replies to it end as others do."""
    conversation = open_chat(model, body)
    bos_token = model.tokenizer.bos_token
    has_bos = bool(bos_token) and text.startswith(str(bos_token))
    token_ids = model.prompt_encoder.encode(text, add_special_tokens=not has_bos)
    if not body.add_bos_token:
        token_ids = strip_bos(token_ids, model.tokenizer.bos_token_id)
    return ChatPrompt(text, token_ids, 0, conversation.stop_strings)


def _leave_room(
    room: Room, conversation: Conversation, model: LoadedModel, measure: Measure
) -> Room:
    """For tokens that are not those of the text. Raises ContextLengthExceededError."""
    prompt = conversation.write(conversation.messages)
    length = measure(prompt.text)
    if length is None:
        return room
    encoded = model.prompt_encoder.encode(prompt.text, prompt.marks, prompt.add_special_tokens)
    num_others = max(0, length - len(encoded))
    if num_others >= room.most:
        raise ContextLengthExceededError(room.most + 1, length, "messages")
    return Room(max(1, room.wished - num_others), room.most - num_others)


def open_chat(
    model: LoadedModel,
    body: ChatCompletionRequest,
    edit_opening: EditOpening | None = None,
) -> Conversation:
    """Raises what `open_conversation` raises."""
    marker = model.prompt_encoder.choose_marker
    resources = ChatResources(model.chat_template, PROJECT_ROOT, marker, edit_opening)
    return open_conversation(body.messages, _to_options(model.settings, body), resources)


def check_settings(settings: Settings) -> None:
    """Try out what shapes every chat. Raises SettingsError, naming the key."""
    template = ChatTemplate(text="", name="", source=TemplateSource.DEFAULT)
    for mode in ("chat", "chat-instruct"):
        body = ChatCompletionRequest.model_validate({"messages": [TRIAL], "mode": mode})
        options = replace(_to_options(settings, body), instruction_template_str=ANY_TEMPLATE)
        try:
            open_conversation(body.messages, options, ChatResources(template, PROJECT_ROOT))
        except InvalidRequestError as error:
            key = (error.param or "").replace("chat_instruct", "chat-instruct")
            raise SettingsError(f"settings: {key}: {error}") from error


def name_speakers(model: LoadedModel, body: ChatCompletionRequest) -> dict[str, str]:
    """By the fields that name them. Raises what `find_names` raises."""
    name1, name2 = find_names(_to_options(model.settings, body), PROJECT_ROOT)
    return {"name1": name1, "name2": name2}


def _to_options(settings: Settings, body: ChatCompletionRequest) -> ChatOptions:
    variables = {"documents": body.documents} if body.documents else {}
    return ChatOptions(
        mode=body.mode,
        continue_=body.continues,
        add_generation_prompt=body.add_generation_prompt,
        instruction_template=body.instruction_template,
        instruction_template_str=body.instruction_template_str,
        turns=TurnOverrides(
            turn_template=body.turn_template,
            user=body.name1_instruct,
            bot=body.name2_instruct,
            context=body.context_instruct,
        ),
        system_message=body.system_message,
        chat_template_kwargs=variables | body.chat_template_kwargs,
        character=body.character or settings.character,
        name1=body.name1,
        name2=body.name2,
        context=body.context,
        greeting=body.greeting,
        user_bio=settings.user_bio if body.user_bio is None else body.user_bio,
        chat_template_str=body.chat_template_str or settings.chat_template_str,
        chat_instruct_command=body.chat_instruct_command or settings.chat_instruct_command,
        default_name1=settings.name1,
        default_context=settings.context,
        default_greeting=settings.greeting,
    )
