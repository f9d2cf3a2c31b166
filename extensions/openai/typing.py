"""The wire schema: every field that a request may carry, with its default, range and meaning.

What stands here is what users read at /docs, and after the requests what answers look like. It
knows which requests are valid, not what becomes of them.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn, Required, Self

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    model_validator,
    with_config,
)
from pydantic_core import InitErrorDetails, PydanticCustomError
from typing_extensions import TypedDict

# Far beyond any meaning, and still harmless in float32 arithmetic.
MAX_MAGNITUDE = 1e6
# Of counts and token ids: beyond any meaning, and still fits into every tensor.
MAX_INT = 2**31 - 1
MAX_CHOICES_PER_PROMPT = 128
MAX_CHOICES_PER_REQUEST = 2048
# Every token of a reply is compared with them.
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1000
MAX_STOP_TOKEN_IDS = 1024

# Known fields that change the meaning of an answer and are not implemented yet, each with the
# values that ask for nothing. Any other is refused: better no answer than one to another question.
REFUSED_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
    "preset": ("",),
    "typical_p": (1,),
    "tfs": (1,),
    "top_a": (0,),
    "top_n_sigma": (0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "dynamic_temperature": (False,),
    "temperature_last": (False,),
    "smoothing_factor": (0,),
    "sampler_priority": ([], ""),
    "mirostat_mode": (0,),
    "adaptive_target": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "guidance_scale": (1,),
    "negative_prompt": ("",),
    "penalty_alpha": (0,),
    "num_beams": (1,),
    "min_length": (0,),
    "custom_token_bans": ("",),
    "grammar_string": ("",),
    "truncation_length": (0,),
    "max_tokens_second": (0,),
    "auto_max_new_tokens": (False,),
    "add_bos_token": (True,),
}


def _is_neutral(value: Any, neutral_values: tuple[Any, ...]) -> bool:
    """Equal to one of them, where true is not 1 and false is not 0."""
    return any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
        for neutral in neutral_values
    )


def _example(body: dict[str, Any]) -> ConfigDict:
    """What /docs sends unless it is edited; without it, every field with some value or other."""
    return ConfigDict(json_schema_extra={"examples": [body]})


def _refuse(field: str, message: str, value: Any) -> NoReturn:
    """Fail as if `field` itself had, so that a check of several fields names the one at fault."""
    error = PydanticCustomError("refused", "{message}", {"message": message})
    raise ValidationError.from_exception_data(
        field, [InitErrorDetails(type=error, loc=(field,), input=value)]
    )


def _to_int(value: Any) -> Any:
    """Some clients have one number type and write 16 as 16.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _to_stop_strings(value: Any) -> list[Any]:
    if not isinstance(value, str | list):
        message = "Input should be a string or a list of strings"
        raise PydanticCustomError("stop_type", message)
    strings = [value] if isinstance(value, str) else value
    if len(strings) > MAX_STOP_STRINGS:
        raise PydanticCustomError(
            "stop_count", "There may be at most {most} stop strings", {"most": MAX_STOP_STRINGS}
        )
    if any(isinstance(item, str) and len(item) > MAX_STOP_CHARS for item in strings):
        raise PydanticCustomError(
            "stop_length",
            "A stop string may have at most {most} characters",
            {"most": MAX_STOP_CHARS},
        )
    return strings


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _to_token_ids(value: list[int]) -> tuple[int, ...]:
    # Which ids the model knows is its own affair; one of a thousand digits is nobody's.
    if any(abs(item) > MAX_INT for item in value):
        raise PydanticCustomError("token_id", "A token id is out of every model's range")
    return tuple(value)


def _to_prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    match value:
        case str():
            return (value,)
        case [_, *_] if all(isinstance(item, str) for item in value):
            return tuple(value)
        case [_, *_] if _is_token_ids(value):
            return (_to_token_ids(value),)
        case [_, *_] if all(_is_token_ids(item) for item in value):
            return tuple(map(_to_token_ids, value))
    raise PydanticCustomError(
        "prompt_type",
        "Input should be a string, a list of strings, a list of token ids "
        "or a list of lists of token ids, not empty and not mixed",
    )


Integer = Annotated[int, BeforeValidator(_to_int)]
# The range comes first: around a validator, or in a union, it would be missing on /docs.
Count = Annotated[int, Field(ge=0, le=MAX_INT), BeforeValidator(_to_int)]
NumChoices = Annotated[int, Field(ge=1, le=MAX_CHOICES_PER_PROMPT), BeforeValidator(_to_int)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-MAX_MAGNITUDE, le=MAX_MAGNITUDE)]
StopString = Annotated[str, Field(max_length=MAX_STOP_CHARS)]
StopStrings = Annotated[
    list[str],
    BeforeValidator(
        _to_stop_strings,
        json_schema_input_type=StopString
        | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)],
    ),
]
Prompts = Annotated[
    tuple[str | tuple[int, ...], ...],
    PlainValidator(
        _to_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
    ),
]


class WireModel(BaseModel):
    """Types are taken as they are (no "1" for 1), unknown fields ignored, null is the default."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


class StreamOptions(WireModel):
    include_usage: bool = Field(
        default=False, description="Send the token counts in a chunk of their own, before the end."
    )


class GenerationOptions(WireModel):
    """What completions and chat completions have in common.

    Unknown fields are ignored, and null means the default.
    """

    model: str | None = Field(
        default=None,
        description="Name of a model. A name that the server does not know is ignored.",
    )
    stream: bool = Field(
        default=False, description="Send the answer in pieces, as server-sent events."
    )
    stream_options: StreamOptions = Field(
        default_factory=StreamOptions, description="Options that only matter with `stream`."
    )
    n: NumChoices = Field(default=1, description="How many choices to generate per prompt.")
    max_tokens: Count | None = Field(
        default=None, description="Most tokens to generate. null: until the context is full."
    )
    max_completion_tokens: Count | None = Field(
        default=None, description="OpenAI's newer name of `max_tokens`; wins over it."
    )
    stop: StopStrings = Field(
        default_factory=list,
        description="A text, or several, at which to stop. It is not part of the answer.",
    )
    stop_token_ids: list[Count] = Field(
        default_factory=list,
        max_length=MAX_STOP_TOKEN_IDS,
        description="Token ids at which to stop, beside the model's own end-of-sequence tokens.",
    )
    temperature: float = Field(
        default=1.0,
        ge=0,
        le=MAX_MAGNITUDE,
        description="Higher is more random; 0 always takes the most probable token.",
    )
    top_p: Fraction = Field(
        default=1.0,
        description="Keep the most probable tokens that together reach this probability.",
    )
    top_k: Integer = Field(
        default=0,
        ge=-1,
        le=MAX_INT,
        description="Keep this many of the most probable tokens. 0 or -1: all.",
    )
    min_p: Fraction = Field(
        default=0.0,
        description="Drop tokens less probable than this share of the most probable one.",
    )
    presence_penalty: Penalty = Field(
        default=0.0,
        description="Subtracted once from the logit of each token that already occurred.",
    )
    frequency_penalty: Penalty = Field(
        default=0.0,
        description="Subtracted from the logit of a token for each time that it occurred.",
    )
    repetition_penalty: float = Field(
        default=1.0,
        ge=1 / MAX_MAGNITUDE,
        le=MAX_MAGNITUDE,
        description="Divides positive logits of repeated tokens and multiplies negative ones. "
        "1: off.",
    )
    repetition_penalty_range: Count = Field(
        default=1024,
        description="How many of the last tokens `repetition_penalty` looks at. 0: all.",
    )
    prompt_lookup_num_tokens: Count = Field(
        default=0,
        description="Guess up to this many tokens at a time from what has been said before. It "
        "changes no answer, and is faster where answers repeat their prompts. 0: off.",
    )
    do_sample: bool = Field(
        default=True,
        description="false: always take the most probable token, as with temperature 0.",
    )
    seed: Integer = Field(
        default=-1,
        ge=-(2**63),
        lt=2**63,
        description="The same seed gives the same answer. -1: a random one.",
    )
    ban_eos_token: bool = Field(
        default=False, description="Go on when the model wants to end, up to `max_tokens`."
    )
    ignore_eos: bool = Field(default=False, description="Another name of `ban_eos_token`.")
    skip_special_tokens: bool = Field(
        default=True, description="Leave special tokens such as `<|im_end|>` out of the text."
    )
    user: str | None = Field(default=None, description="Accepted and not used.")

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_implemented(cls, data: Any) -> Any:
        for name, neutral_values in REFUSED_FIELDS.items():
            value = data.get(name) if isinstance(data, dict) else None
            if value is not None and not _is_neutral(value, neutral_values):
                _refuse(name, "This field is not supported yet; leave it out", value)
        return data


class CompletionRequest(GenerationOptions):
    """Continue a text. Unknown fields are ignored, and null means the default."""

    model_config = _example({"prompt": "This is a cake recipe:\n\n1.", "max_tokens": 100})

    prompt: Prompts = Field(
        description="A text, several texts, or token ids. Each prompt has choices of its own."
    )
    max_tokens: Count = Field(default=16, description="Most tokens to generate.")
    echo: bool = Field(default=False, description="Begin each choice with its prompt.")
    best_of: NumChoices | None = Field(
        default=None,
        description="Generate this many candidates per prompt and return the `n` whose tokens are "
        "the most probable on average. Not with `stream`.",
    )

    @property
    def num_candidates(self) -> int:
        """Generations per prompt."""
        return self.best_of or self.n

    @model_validator(mode="after")
    def _check_number_of_choices(self) -> Self:
        if self.num_candidates < self.n:
            _refuse("best_of", f"Input should be at least n, which is {self.n}", self.best_of)
        if self.stream and self.num_candidates > self.n:
            _refuse("best_of", "The best candidates cannot be streamed", self.best_of)
        if len(self.prompt) * self.num_candidates > MAX_CHOICES_PER_REQUEST:
            message = f"A request may have at most {MAX_CHOICES_PER_REQUEST} choices in all"
            _refuse("prompt", message, None)
        return self


# What goes into a prompt is checked where prompts are built; from here it is only passed on.
@with_config(ConfigDict(extra="allow"))
class Message(TypedDict, total=False):
    """One message. More fields may be given; they are there for the model's template."""

    role: Required[Literal["system", "developer", "user", "assistant", "tool"]]
    content: Annotated[
        Any,
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array"}, {"type": "null"}]}),
        Field(description='A text, or a list of parts like {"type": "text", "text": "..."}.'),
    ]
    name: str | None


class ChatCompletionRequest(GenerationOptions):
    """Reply to a conversation. Unknown fields are ignored, and null means the default."""

    model_config = _example({"messages": [{"role": "user", "content": "Hello!"}]})

    messages: list[Message] = Field(description="The conversation so far.")
    max_tokens: Count | None = Field(
        default=None,
        description="Most tokens to generate. null or 0: until the context is full.",
    )
    mode: Literal["instruct", "chat", "chat-instruct"] = Field(
        default="instruct",
        description="instruct: with the model's template. chat: as a dialogue with a character. "
        "chat-instruct: the dialogue as one instruction.",
    )
    instruction_template: str | None = Field(
        default=None,
        description="Name of a file in instruction-templates, without `.yaml`. null: the model's.",
    )
    instruction_template_str: str | None = Field(
        default=None, description="A Jinja2 template; wins over `instruction_template`."
    )
    character: str | None = Field(
        default=None,
        description="Name of a file in characters, without `.yaml`, for the chat modes.",
    )
    name1: str | None = Field(
        default=None,
        validation_alias=AliasChoices("user_name", "name1"),
        description="Your name in the chat modes. Also taken as `name1`.",
    )
    name2: str | None = Field(
        default=None,
        validation_alias=AliasChoices("bot_name", "name2"),
        description="Instead of the character's name. Also taken as `name2`.",
    )
    context: str | None = Field(default=None, description="Instead of the character's context.")
    greeting: str | None = Field(default=None, description="Instead of the character's greeting.")
    user_bio: str | None = Field(default=None, description="What the character knows about you.")
    chat_template_str: str | None = Field(
        default=None, description="A Jinja2 template for the dialogue of the chat modes."
    )
    chat_instruct_command: str | None = Field(
        default=None,
        description="The instruction of chat-instruct. `<|character|>` and `<|prompt|>` are "
        "replaced by the character's name and the dialogue.",
    )
    continue_: bool = Field(
        default=False, description="Go on with the last message, which is the assistant's."
    )
    add_generation_prompt: bool = Field(
        default=True, description="Open the assistant's turn at the end of the prompt."
    )


# Answers: only /docs shows them; responses.py builds them.


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """What every error looks like, in OpenAI's form; `param` names the field at fault."""

    error: Error


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Tokens that an earlier request had already computed.")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


FinishReason = Annotated[
    Literal["stop", "length"],
    Field(description="stop: the text has ended. length: `max_tokens` or the context was full."),
]


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int = Field(description="Seconds since 1970.")
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(BaseModel):
    text: str
    index: int
    logprobs: None
    finish_reason: FinishReason


class TextCompletion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int = Field(description="Seconds since 1970.")
    model: str
    choices: list[TextChoice]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok"]
    model: str | None = Field(description="Name of the loaded model.")
