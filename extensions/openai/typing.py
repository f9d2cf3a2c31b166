"""The wire schema: every field that a request may carry, with its default, range and meaning.

What stands here is what users read at /docs, and after the requests what answers look like. It
knows which requests are valid, not what becomes of them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn, Required, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    RootModel,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
    with_config,
)
from pydantic_core import InitErrorDetails, PydanticCustomError
from starlette.datastructures import UploadFile
from typing_extensions import TypedDict

# Far beyond any meaning, and still harmless in float32 arithmetic.
MAX_MAGNITUDE = 1e6
# Of counts and token ids: beyond any meaning, and still fits into every tensor.
MAX_INT = 2**31 - 1
MAX_CHOICES_PER_PROMPT = 128
MAX_CHOICES_PER_REQUEST = 2048
# Alternatives shown beside each token. OpenAI's completions stop at 5, its chats at 20.
MAX_LOGPROBS = 20
# Every token of a reply is compared with them.
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1000
MAX_STOP_TOKEN_IDS = 1024
MAX_BIAS = 100
# As many as the largest vocabularies have.
MAX_NAMED_TOKENS = 2**18
MAX_DRY_BREAKERS = 64
MAX_DRY_BREAKER_CHARS = 100
MAX_NUM_BEAMS = 64
MAX_SPEECH_CHARS = 4096
# Of texts to embed or to compare: as many as OpenAI takes, and some novels together.
MAX_INPUTS = 2048
MAX_INPUT_CHARS = 10_000_000

# Known fields that change the meaning of an answer and are not implemented yet, each with the
# values that ask for nothing. Any other is refused: better no answer than one to another question.
REFUSED_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
    "grammar_string": ("",),
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


def _to_dry_breakers(value: Any) -> Any:
    """A list, or such a list as JSON in a string, with or without its brackets."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    try:
        return json.loads(text if text.startswith("[") else f"[{text}]")
    except (ValueError, RecursionError):
        message = "Input should be a list of strings, or quoted strings with commas between them"
        raise PydanticCustomError("breakers", message) from None


def _to_sampler_names(value: Any) -> Any:
    """A list, or such a list as JSON in a string, or names with commas or lines between them."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return [name.strip() for name in re.split(r"[,\n]", value) if name.strip()]


def _require_each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise PydanticCustomError("repeated", "{name} is there twice", {"name": twice})
    return names


def _split_token_ids(value: Any) -> tuple[int, ...]:
    """ "1, 2" → (1, 2)"""
    if not isinstance(value, str):
        raise PydanticCustomError("string_type", "Input should be a string")
    _refuse_crowd(value.count(","))
    return tuple(_to_token_id(part.strip()) for part in value.split(",") if part.strip())


def _to_token_id(text: str) -> int:
    if not _TOKEN_ID.fullmatch(text):
        message = "Token ids should be whole numbers, not {text}"
        raise PydanticCustomError("token_id", message, {"text": repr(text[:20])})
    return int(text)


def _to_biases(value: Any) -> dict[str, float]:
    """At the first fault an end: a list of all of them may take longer than anything else."""
    if not isinstance(value, dict):
        raise PydanticCustomError("dict_type", "Input should be an object")
    _refuse_crowd(len(value))
    for text, bias in value.items():
        _to_token_id(text)
        if type(bias) not in (int, float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            message = "The bias of token {text} should be a number from -100 to 100"
            raise PydanticCustomError("bias", message, {"text": text})
    return {text: float(bias) for text, bias in value.items()}


def _refuse_crowd(num_tokens: int) -> None:
    if num_tokens > MAX_NAMED_TOKENS:
        message = "There may be at most {most} tokens"
        raise PydanticCustomError("token_count", message, {"most": MAX_NAMED_TOKENS})


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _to_token_ids(value: list[int]) -> tuple[int, ...]:
    # Which ids the model knows is its own affair; one of a thousand digits is nobody's.
    if any(abs(item) > MAX_INT for item in value):
        raise PydanticCustomError("token_id", "A token id is out of every model's range")
    return tuple(value)


def _to_prompt(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return value
    if _is_token_ids(value):
        return _to_token_ids(value)
    raise PydanticCustomError("prompt_type", "Input should be a string or a list of token ids")


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


def _to_inputs(value: Any) -> tuple[str | tuple[int, ...], ...]:
    inputs = _to_prompts(value)
    _check_inputs(inputs)
    return inputs


def _to_texts(value: Any) -> tuple[str, ...]:
    """A text, or a list of texts."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(i, str) for i in texts):
        message = "Input should be a string or a list of strings, not empty"
        raise PydanticCustomError("texts_type", message)
    _check_inputs(texts)
    return tuple(texts)


def _to_documents(value: Any) -> tuple[str, ...]:
    """A list of texts, or of objects that have them as `text`."""
    if not isinstance(value, list):
        raise PydanticCustomError("list_type", "Input should be a list")
    texts = [item.get("text") if isinstance(item, dict) else item for item in value]
    if not texts or not all(isinstance(text, str) for text in texts):
        message = "Input should be a list of strings, or of objects with a text, not empty"
        raise PydanticCustomError("documents_type", message)
    return _to_texts(texts)


def _check_inputs(inputs: Sequence[str | tuple[int, ...]]) -> None:
    if len(inputs) > MAX_INPUTS:
        message = "There may be at most {most} of them"
        raise PydanticCustomError("input_count", message, {"most": MAX_INPUTS})
    empty = next((index for index, item in enumerate(inputs) if not item), None)
    if empty is not None:
        message = "There is nothing in number {index}, counted from 0"
        raise PydanticCustomError("input_empty", message, {"index": empty})
    if sum(map(len, inputs)) > MAX_INPUT_CHARS:
        message = "There may be at most {most} characters, or tokens, in all"
        raise PydanticCustomError("input_length", message, {"most": MAX_INPUT_CHARS})


# Decimal, and written in one way only.
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")

# As the engine's SamplerStep, which this layer does not know.
SamplerName = Literal[
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "dry",
    "top_n_sigma",
    "temperature",
    "dynamic_temperature",
    "quadratic_sampling",
    "top_k",
    "top_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "tfs",
    "top_a",
    "min_p",
    "adaptive_p",
    "mirostat",
    "xtc",
    "encoder_repetition_penalty",
    "no_repeat_ngram",
]

Integer = Annotated[int, BeforeValidator(_to_int)]
# The range comes first: around a validator, or in a union, it would be missing on /docs.
Count = Annotated[int, Field(ge=0, le=MAX_INT), BeforeValidator(_to_int)]
NumBeams = Annotated[int, Field(ge=1, le=MAX_NUM_BEAMS), BeforeValidator(_to_int)]
NumChoices = Annotated[int, Field(ge=1, le=MAX_CHOICES_PER_PROMPT), BeforeValidator(_to_int)]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS), BeforeValidator(_to_int)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0, le=MAX_MAGNITUDE)]
Factor = Annotated[float, Field(ge=1 / MAX_MAGNITUDE, le=MAX_MAGNITUDE)]
Penalty = Annotated[float, Field(ge=-MAX_MAGNITUDE, le=MAX_MAGNITUDE)]
TenThousandths = Annotated[float, Field(ge=0, le=10_000)]
StopString = Annotated[str, Field(max_length=MAX_STOP_CHARS)]
StopStrings = Annotated[
    list[str],
    BeforeValidator(
        _to_stop_strings,
        json_schema_input_type=StopString
        | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)],
    ),
]
DryBreakerList = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_DRY_BREAKER_CHARS)]],
    Field(max_length=MAX_DRY_BREAKERS),
]
DryBreakers = Annotated[
    DryBreakerList,
    BeforeValidator(_to_dry_breakers, json_schema_input_type=str | DryBreakerList),
]
SamplerNames = Annotated[
    list[SamplerName],
    Field(fail_fast=True),
    AfterValidator(_require_each_once),
    BeforeValidator(_to_sampler_names, json_schema_input_type=str | list[SamplerName]),
]
TokenIdList = Annotated[
    tuple[int, ...], PlainValidator(_split_token_ids, json_schema_input_type=str)
]
Biases = Annotated[
    dict[str, float],
    PlainValidator(
        _to_biases,
        json_schema_input_type=dict[str, Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]],
    ),
]
Prompt = Annotated[
    str | tuple[int, ...], PlainValidator(_to_prompt, json_schema_input_type=str | list[int])
]
Prompts = Annotated[
    tuple[str | tuple[int, ...], ...],
    PlainValidator(
        _to_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
    ),
]
Inputs = Annotated[
    tuple[str | tuple[int, ...], ...],
    PlainValidator(
        _to_inputs, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
    ),
]
Texts = Annotated[
    tuple[str, ...], PlainValidator(_to_texts, json_schema_input_type=str | list[str])
]
Documents = Annotated[
    tuple[str, ...],
    PlainValidator(_to_documents, json_schema_input_type=list[str | dict[str, str]]),
]
# Of one text that others are compared with.
Query = Annotated[str, Field(min_length=1, max_length=MAX_INPUT_CHARS)]
NumResults = Annotated[int, Field(ge=1, le=MAX_INT), BeforeValidator(_to_int)]


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


class SamplingOptions(WireModel):
    """How tokens are chosen: what a preset may say too."""

    do_sample: bool = Field(
        default=True,
        description="false: always take the most probable token, as with temperature 0.",
    )
    temperature: Amount = Field(
        default=1.0, description="Higher is more random; 0 always takes the most probable token."
    )
    dynamic_temperature: bool = Field(
        default=False,
        description="Let the temperature follow the entropy, from `dynatemp_low` where the model "
        "is sure to `dynatemp_high` where all tokens are alike. `temperature` is not used then, "
        "except that 0 is greedy.",
    )
    dynatemp_low: Amount = Field(
        default=1.0, description="The temperature of no entropy, with `dynamic_temperature`."
    )
    dynatemp_high: Amount = Field(
        default=1.0, description="The temperature of the most entropy, with `dynamic_temperature`."
    )
    dynatemp_exponent: Amount = Field(
        default=1.0,
        description="The power to which the share of the most entropy is raised, with "
        "`dynamic_temperature`.",
    )
    temperature_last: bool = Field(
        default=False,
        description="Apply temperature, dynamic temperature and smoothing after all other steps.",
    )
    smoothing_factor: Amount = Field(
        default=0.0,
        description="Bend logits down by this factor times the square of their distance from the "
        "highest one. 0: off.",
    )
    smoothing_curve: Annotated[float, Field(ge=1, le=MAX_MAGNITUDE)] = Field(
        default=1.0, description="The share of the cube in `smoothing_factor`. 1: none."
    )
    top_p: Fraction = Field(
        default=1.0,
        description="Keep the most probable tokens that together reach this probability.",
    )
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT), BeforeValidator(_to_int)] = Field(
        default=0, description="Keep this many of the most probable tokens. 0 or -1: all."
    )
    min_p: Fraction = Field(
        default=0.0,
        description="Drop tokens less probable than this share of the most probable one.",
    )
    typical_p: Fraction = Field(
        default=1.0,
        description="Keep the tokens whose surprise is nearest to the expected one, until they "
        "reach this probability. 1: off.",
    )
    tfs: Fraction = Field(
        default=1.0,
        description="Tail-free sampling: cut where the curve of sorted probabilities has used up "
        "this share of its bends. 1: off.",
    )
    top_a: Fraction = Field(
        default=0.0,
        description="Drop tokens less probable than this times the square of the highest "
        "probability. 0: off.",
    )
    epsilon_cutoff: TenThousandths = Field(
        default=0.0,
        description="Drop tokens less probable than this, in units of 1e-4. 0: off.",
    )
    eta_cutoff: TenThousandths = Field(
        default=0.0,
        description="Drop tokens less probable than this, in units of 1e-4, or than a limit that "
        "falls with the entropy, whichever is lower. 0: off.",
    )
    top_n_sigma: Amount = Field(
        default=0.0,
        description="Keep logits at most this many standard deviations below the highest. 0: off.",
    )
    xtc_threshold: Fraction = Field(
        default=0.1,
        description="XTC: of the tokens at least this probable, only the least probable stays.",
    )
    xtc_probability: Fraction = Field(
        default=0.0,
        description="How often XTC is applied, except where it would rule out the end of a line "
        "or of the text. 0: off.",
    )
    adaptive_target: Fraction = Field(
        default=0.0,
        description="Adaptive-p: prefer tokens of about this probability, so that it is the "
        "average; best with `min_p`, as all unlikely tokens are about as far from it. 0: off.",
    )
    adaptive_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9,
        description="How slowly adaptive-p forgets the probabilities of earlier tokens.",
    )
    mirostat_mode: Annotated[int, Field(ge=0, le=2), BeforeValidator(_to_int)] = Field(
        default=0, description="Hold the surprise per token by Mirostat 1 or 2. 0: off."
    )
    mirostat_tau: Amount = Field(
        default=5.0, description="The surprise that Mirostat aims at, in bits per token."
    )
    mirostat_eta: Fraction = Field(default=0.1, description="How fast Mirostat learns.")
    repetition_penalty: Factor = Field(
        default=1.0,
        description="Divides positive logits of tokens of prompt and reply, and multiplies "
        "negative ones. 1: off.",
    )
    repetition_penalty_range: Count = Field(
        default=1024,
        description="How many of the last tokens `repetition_penalty` and DRY look at. 0: all.",
    )
    presence_penalty: Penalty = Field(
        default=0.0,
        description="Subtracted once from the logit of each token that was generated before.",
    )
    frequency_penalty: Penalty = Field(
        default=0.0,
        description="Subtracted from the logit of a token for each time that it was generated.",
    )
    encoder_repetition_penalty: Factor = Field(
        default=1.0, description="Above 1, tokens of the prompt become more probable. 1: off."
    )
    no_repeat_ngram_size: Count = Field(
        default=0,
        description="No sequence of so many tokens is written twice: a ban, before all other "
        "steps. 0: off.",
    )
    dry_multiplier: Amount = Field(
        default=0.0,
        description="DRY: subtract this times `dry_base` to the power of how much longer than "
        "`dry_allowed_length` a repetition would become. 0: off.",
    )
    dry_base: Annotated[float, Field(ge=1, le=MAX_MAGNITUDE)] = Field(
        default=1.75, description="How fast DRY's penalty grows with the repetition."
    )
    dry_allowed_length: Count = Field(
        default=2, description="The longest repetition, in tokens, that DRY lets pass."
    )
    dry_sequence_breakers: DryBreakers = Field(
        default=["\n", ":", '"', "*"],
        description="Texts at which DRY's repetitions end: a list, or quoted strings with commas "
        "between them.",
    )
    sampler_priority: SamplerNames = Field(
        default_factory=list,
        description="Names of steps in the order in which to take them: a list, or names with "
        "commas or line breaks between them. Steps that are not named come first, in the usual "
        "order.",
    )
    min_length: Count = Field(
        default=0, description="The reply does not end before prompt and reply have so many tokens."
    )
    guidance_scale: Penalty = Field(
        default=1.0,
        description="Classifier-free guidance: how far to go from what follows `negative_prompt` "
        "to what follows the prompt, and beyond. 1: off.",
    )
    penalty_alpha: Fraction = Field(
        default=0.0,
        description="Contrastive search: the weight of being unlike what was said before. It "
        "needs `do_sample: false` and `top_k` above 1. 0: off.",
    )
    num_beams: NumBeams = Field(
        default=1, description="How many replies beam search pursues at a time. 1: off."
    )
    length_penalty: Penalty = Field(
        default=1.0, description="Above 0, beam search prefers longer replies; below, shorter."
    )
    early_stopping: bool = Field(
        default=False, description="End beam search with the first `num_beams` complete replies."
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_implemented(cls, data: Any) -> Any:
        for name, neutral_values in REFUSED_FIELDS.items():
            value = data.get(name) if isinstance(data, dict) else None
            if value is not None and not _is_neutral(value, neutral_values):
                _refuse(name, "This field is not supported yet; leave it out", value)
        return data


class GenerationOptions(SamplingOptions):
    """What completions and chat completions have in common.

    Unknown fields are ignored, and null means the default.
    """

    model: str | None = Field(
        default=None,
        description="Name of a model that is loaded, or can be, see `--model-autoload`. For any "
        "other name the first one answers. `model:adapter` names an adapter too.",
    )
    lora: str | None = Field(
        default=None,
        description="Name of the adapter (LoRA) that is to answer; `none`: the model without any. "
        "Left out: all that are loaded, together.",
    )
    stream: bool = Field(
        default=False, description="Send the answer in pieces, as server-sent events."
    )
    stream_options: StreamOptions = Field(
        default_factory=StreamOptions, description="Options that only matter with `stream`."
    )
    preset: str = Field(
        default="",
        description="Name of a file in presets, without `.yaml`: it fills what is left out here.",
    )
    n: NumChoices = Field(default=1, description="How many choices to generate per prompt.")
    max_tokens: Count | None = Field(
        default=None,
        description="Most tokens to generate. null: 16 for completions, and for chats until the "
        "context is full.",
    )
    max_completion_tokens: Count | None = Field(
        default=None, description="OpenAI's newer name of `max_tokens`; wins over it."
    )
    auto_max_new_tokens: bool = Field(
        default=False, description="Instead of `max_tokens`: until the context is full."
    )
    truncation_length: Count = Field(
        default=0,
        description="Most tokens of prompt and reply together. Of a prompt that does not leave "
        "`max_tokens` of them (512 or half, if that is not given), the last tokens are kept, of a "
        "chat the last turns. 0: the model's context, and completions whose prompt is too long are "
        "refused.",
    )
    max_tokens_second: Count = Field(
        default=0, description="Stream at most so many tokens per second. 0: no limit."
    )
    min_tokens: Count = Field(
        default=0, description="The reply does not end before it has so many tokens."
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
    ban_eos_token: bool = Field(
        default=False, description="Never generate an end-of-sequence token."
    )
    ignore_eos: bool = Field(
        default=False, description="Generate end-of-sequence tokens, and go on after them."
    )
    logit_bias: Biases = Field(
        default_factory=dict,
        description="Token ids of the model, as strings, and what to add to their logits. -100 "
        "bans a token; with 100, only tokens that have 100 can be generated.",
    )
    custom_token_bans: TokenIdList = Field(
        default=(), description='Token ids that are never generated, as in "1, 2".'
    )
    allowed_token_ids: (
        Annotated[list[Count], Field(min_length=1, max_length=MAX_NAMED_TOKENS, fail_fast=True)]
        | None
    ) = Field(default=None, description="No other token ids are generated. null: all may be.")
    negative_prompt: str = Field(
        default="",
        description="What to stay away from, with `guidance_scale`. Empty: the prompt's last "
        "token.",
    )
    seed: Integer = Field(
        default=-1,
        ge=-(2**63),
        lt=2**63,
        description="The same seed gives the same answer. -1: a random one.",
    )
    prompt_lookup_num_tokens: Count = Field(
        default=0,
        description="Guess up to this many tokens at a time from what has been said before. It "
        "changes no answer, and is faster where answers repeat their prompts. 0: off.",
    )
    add_bos_token: bool = Field(
        default=True,
        description="false: leave out the beginning-of-sequence tokens that a text begins with.",
    )
    skip_special_tokens: bool = Field(
        default=True, description="Leave special tokens such as `<|im_end|>` out of the text."
    )
    user: str | None = Field(default=None, description="Accepted and not used.")


class CompletionRequest(GenerationOptions):
    """Continue a text. Unknown fields are ignored, and null means the default."""

    model_config = _example({"prompt": "This is a cake recipe:\n\n1.", "max_tokens": 100})

    prompt: Prompts = Field(
        description="A text, several texts, or token ids. Each prompt has choices of its own."
    )
    max_tokens: Count = Field(default=16, description="Most tokens to generate.")
    echo: bool = Field(default=False, description="Begin each choice with its prompt.")
    logprobs: NumLogprobs | None = Field(
        default=None,
        description="Show the log-probability of each token, and of so many of the likeliest ones "
        "in its place. With `echo`, of the prompt's tokens too. null: of none.",
    )
    suffix: str = Field(
        default="",
        description="What comes after the text that is asked for, with models that have learnt to "
        "fill in the middle. It is not part of the answer.",
    )
    token_healing: bool = Field(
        default=False,
        description="For prompts that may end inside a word: the last token is read as the "
        "beginning of the next one.",
    )
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


class GenerateRequest(CompletionRequest):
    """The same in the words of the first engines, where `context` is the prompt and `length` is
    `max_tokens`.
    """

    model_config = _example({"context": "This is a cake recipe:\n\n1.", "length": 100})

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, data: Any) -> Any:
        """Those that are given by their present names win."""
        if not isinstance(data, dict):
            return data
        names = {"context": "prompt", "length": "max_tokens"}
        return {names[name]: data[name] for name in names if name in data} | data


# A longer one names no file, and nobody.
Name = Annotated[str, Field(max_length=256)]
# Longer ones fit into no model's context.
Text = Annotated[str, Field(max_length=1_000_000)]


# What goes into a prompt is checked where prompts are built; from here it is only passed on.
@with_config(ConfigDict(extra="allow"))
class Message(TypedDict, total=False):
    """One message. More fields may be given; they are there for the model's template."""

    role: Required[Literal["system", "developer", "user", "assistant", "tool"]]
    content: Annotated[
        Any,
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array"}, {"type": "null"}]}),
        Field(
            description='A text, or a list of parts like {"type": "text", "text": "..."} and, for '
            'models that see, {"type": "image_url", "image_url": {"url": "data:image/png;base64,'
            '..."}}.'
        ),
    ]
    name: str | None


MessageList = Annotated[list[Message], Field(fail_fast=True)]


class ChatCompletionRequest(GenerationOptions):
    """Reply to a conversation. Unknown fields are ignored, and null means the default."""

    model_config = _example({"messages": [{"role": "user", "content": "Hello!"}]})

    messages: MessageList = Field(description="The conversation so far.")
    max_tokens: Count | None = Field(
        default=None,
        description="Most tokens to generate. null or 0: until the context is full.",
    )
    mode: Literal["instruct", "chat", "chat-instruct"] = Field(
        default="instruct",
        description="instruct: with the model's template. chat: as a dialogue with a character. "
        "chat-instruct: the dialogue as one instruction.",
    )
    instruction_template: Name | None = Field(
        default=None,
        description="Name of a file in instruction-templates, without `.yaml`. null: the model's.",
    )
    instruction_template_str: str | None = Field(
        default=None,
        validation_alias=AliasChoices("instruction_template_str", "chat_template"),
        description="A Jinja2 template; wins over `instruction_template`. Also taken as "
        "`chat_template`.",
    )
    turn_template: Text | None = Field(
        default=None,
        description="A template in the older format: one turn, with `<|user|>`, `<|bot|>`, "
        "`<|user-message|>` and `<|bot-message|>`.",
    )
    name1_instruct: Text | None = Field(
        default=None, description="With an older template: what stands for `<|user|>`."
    )
    name2_instruct: Text | None = Field(
        default=None, description="With an older template: what stands for `<|bot|>`."
    )
    context_instruct: Text | None = Field(
        default=None,
        description="With an older template: what comes before the first turn; "
        "`<|system-message|>` is filled in.",
    )
    system_message: Text | None = Field(
        default=None,
        description="For conversations that begin with no system message, in instruct and "
        "chat-instruct.",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Variables for the instruction template, such as `tools` or `enable_thinking`.",
    )
    documents: list[dict[str, Any]] = Field(
        default_factory=list, description="For instruction templates that read documents."
    )
    character: Name | None = Field(
        default=None,
        description="Name of a file in characters, without `.yaml`, for the chat modes.",
    )
    name1: Name | None = Field(
        default=None,
        validation_alias=AliasChoices("user_name", "name1"),
        description="Your name in the chat modes. Also taken as `name1`.",
    )
    name2: Name | None = Field(
        default=None,
        validation_alias=AliasChoices("bot_name", "name2"),
        description="Instead of the character's name. Also taken as `name2`.",
    )
    context: Text | None = Field(default=None, description="Instead of the character's context.")
    greeting: Text | None = Field(default=None, description="Instead of the character's greeting.")
    user_bio: Text | None = Field(default=None, description="What the character knows about you.")
    chat_template_str: str | None = Field(
        default=None, description="A Jinja2 template for the dialogue of the chat modes."
    )
    chat_instruct_command: Text | None = Field(
        default=None,
        description="The instruction of chat-instruct. `<|character|>` and `<|prompt|>` are "
        "replaced by the character's name and the dialogue.",
    )
    continue_: bool = Field(
        default=False,
        description="Go on with the last message, which is the assistant's. The answer is the new "
        "text alone.",
    )
    continue_final_message: bool = Field(
        default=False, description="The same by another name, with `add_generation_prompt: false`."
    )
    truncate: Literal["turns", "error"] | None = Field(
        default=None,
        description="What becomes of a conversation that is too long. turns: its oldest turns are "
        "left out, and `usage.dropped_messages` says how many messages that were. error: it is "
        "refused. null: as the settings say.",
    )
    logprobs: bool = Field(
        default=False, description="Show the log-probability of each token of the reply."
    )
    top_logprobs: NumLogprobs = Field(
        default=0,
        description="With `logprobs`: of so many of the likeliest tokens in its place, too.",
    )
    add_generation_prompt: bool = Field(
        default=True, description="Open the assistant's turn at the end of the prompt."
    )

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            _refuse("top_logprobs", "This field needs logprobs to be true", self.top_logprobs)
        return self

    @model_validator(mode="after")
    def _check_turn_at_the_end(self) -> Self:
        is_asked = "add_generation_prompt" in self.model_fields_set and self.add_generation_prompt
        if self.continue_final_message and is_asked:
            message = "A message is continued, or a new one opened, not both"
            _refuse("continue_final_message", message, True)
        return self

    @property
    def brings_template(self) -> bool:
        """It has a text in it that is a program."""
        return bool(self.instruction_template_str or self.chat_template_str or self.turn_template)

    @property
    def continues(self) -> bool:
        """The reply goes on with the last message."""
        return self.continue_ or self.continue_final_message


class LogitsRequest(GenerationOptions):
    """Ask for the likeliest next tokens. Unknown fields are ignored, and null means the default."""

    model_config = _example({"prompt": "The best thing about", "top_logits": 5})

    prompt: Prompt = Field(description="A text, or token ids.")
    use_samplers: bool = Field(
        default=False,
        description="true: as the parameters of this request change the probabilities. false: as "
        "the model says, whatever they are.",
    )
    top_logits: Annotated[int, Field(ge=1, le=MAX_INT), BeforeValidator(_to_int)] = Field(
        default=50, description="How many tokens to return, at most the whole vocabulary."
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
    dropped_messages: int = Field(
        default=0,
        description="Of a chat, how many messages did not fit into the prompt. Only there if some "
        "did not; the header X-Dropped-Messages says it too.",
    )


FinishReason = Annotated[
    Literal["stop", "length"],
    Field(description="stop: the text has ended. length: `max_tokens` or the context was full."),
]


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class TokenLogprob(BaseModel):
    token: str
    logprob: float = Field(description="-9999 for what is impossible.")
    bytes: list[int] = Field(description="UTF-8; of a part of a character for some tokens.")


class ListedToken(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ListedToken]
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int = Field(description="Seconds since 1970.")
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None] = Field(
        description="null for the first token of a prompt; -9999 for what is impossible."
    )
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="In characters of the choice's text.")


class TextChoice(BaseModel):
    text: str
    index: int
    logprobs: TextLogprobs | None
    finish_reason: FinishReason


class TextCompletion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int = Field(description="Seconds since 1970.")
    model: str
    choices: list[TextChoice]
    usage: Usage


class Model(BaseModel):
    id: str = Field(description="What `model` may be in a request; of an adapter, `base:adapter`.")
    object: Literal["model"]
    created: int = Field(description="When its files were changed; 0 if that is not known.")
    owned_by: str
    loaded: bool = Field(description="It is in memory.")
    kind: Literal[
        "text", "embedding", "rerank", "classification", "transcription", "voice", "image"
    ]
    context_length: int | None = Field(
        description="In tokens: of a loaded model what it takes, else what it was made for."
    )
    accepts_images: bool
    alias_of: str | None = Field(description="The model that a request with this name gets.")


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class NextTokens(RootModel[dict[str, float]]):
    """Tokens as the model's files spell them, and their probabilities; the likeliest first."""


class UsedTemplate(BaseModel):
    name: str
    source: Literal["settings", "model", "config", "default"] = Field(
        description="config: a file of the folder models."
    )
    reason: str = Field(description="In words.")


class LoadedModelInfo(BaseModel):
    name: str
    device: str
    dtype: str = Field(description="Of the weights.")
    max_model_len: int = Field(description="Most tokens of prompt and reply together.")


class ModelInfo(BaseModel):
    model_name: str | None
    lora_names: list[str]
    chat_template: UsedTemplate | None = Field(
        description="What makes prompts of messages, unless a request brings another one."
    )
    models: list[LoadedModelInfo] = Field(description="All that are loaded, the first one first.")
    asleep: list[str] = Field(
        description="Those that were unloaded because nobody used them, see `--idle-timeout`; a "
        "request brings them back."
    )


class ModelNames(BaseModel):
    model_names: list[str]


class ModelLoadRequest(WireModel):
    model_name: str = Field(
        min_length=1, description="As `--model` takes it: a name of the list, a path, a hub's name."
    )
    args: dict[str, Any] = Field(
        default={},
        description="How to load it, instead of what the server was started with: `cpu`, `dtype` "
        "(`load_in_8bit`, `load_in_4bit`, `bf16`), `device_map`, `max_model_len`, "
        "`kv_cache_memory`, `max_num_seqs`, `max_num_batched_tokens`, `deterministic`, `lora`.",
    )
    settings: dict[str, Any] = Field(
        default={},
        description="How to chat with it: keys of settings.yaml, such as `instruction_template`, "
        "and `truncation_length`, which is `max_model_len`.",
    )
    stream: bool = Field(default=False, description="Tell how far it is, as server-sent events.")


class ModelUnloadRequest(WireModel):
    model_name: str | None = Field(default=None, description="Of one; all, if left out.")


class LoadAdaptersRequest(WireModel):
    model_config = _example({"lora_names": ["my-adapter"]})

    lora_names: list[str] = Field(
        min_length=1, description="Folders in the adapter folder. One that is loaded is read anew."
    )
    model: str | None = Field(
        default=None, description="Name of the loaded model that they are for."
    )


class UnloadAdaptersRequest(WireModel):
    model_config = _example({})

    lora_names: list[str] | None = Field(default=None, description="Those to unload. null: all.")
    model: str | None = Field(default=None, description="Name of the loaded model that has them.")


class AdapterList(BaseModel):
    lora_names: list[str] = Field(description="Those in the adapter folder, loaded or not.")


class Health(BaseModel):
    status: Literal["ok"]
    model: str | None = Field(description="Name of the loaded model.")


# Tokens


TokenIds = Annotated[
    list[Count], Field(fail_fast=True, description="Token ids of the model's own.")
]
Length = Annotated[int, Field(description="The number of tokens.")]


TokensModel = Annotated[str | None, Field(description="The model whose tokens they are.")]


class EncodeRequest(WireModel):
    model_config = _example({"text": "Hello!"})

    text: str = Field(description="What to cut into tokens, special ones added.")
    model: TokensModel = None


class EncodedText(BaseModel):
    tokens: TokenIds
    length: Length


class TokenCount(BaseModel):
    length: Length


class DecodeRequest(WireModel):
    model_config = _example({"tokens": [19556, 17]})

    tokens: TokenIds
    model: TokensModel = None


class DecodedText(BaseModel):
    text: str = Field(description="Without special tokens.")


class ChatPrompt(BaseModel):
    prompt: str = Field(description="What the model would read.")
    length: Length
    dropped_messages: int = Field(description="How many messages did not fit into it.")


class TokenizeRequest(WireModel):
    """Either `prompt` or `messages`; with these, any field of a chat completion."""

    model_config = ConfigDict(extra="allow", **_example({"prompt": "Hello!"}))

    prompt: str | None = Field(default=None, description="What to cut into tokens.")
    messages: MessageList | None = Field(default=None, description="A conversation instead.")
    model: TokensModel = None
    add_special_tokens: bool | None = Field(
        default=None,
        description="Add those that the tokenizer adds. null: with `prompt`, and where the "
        "template does not spell them out.",
    )
    add_generation_prompt: bool = Field(
        default=True, description="Open the assistant's turn after `messages`."
    )
    return_token_strs: bool = Field(default=False, description="Answer with `token_strs` too.")

    @model_validator(mode="after")
    def _check_that_there_is_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            _refuse("prompt", "There should be either a prompt or messages", None)
        return self


class TokenizedText(BaseModel):
    count: Length
    max_model_len: int = Field(description="Most tokens of prompt and reply together.")
    tokens: TokenIds
    token_strs: list[str] | None = Field(description="As the tokenizer's files spell them.")


class DetokenizeRequest(DecodeRequest):
    pass


class DetokenizedText(BaseModel):
    prompt: str = Field(description="With special tokens.")


class PresetList(BaseModel):
    preset_names: list[str]


# Forms


class FormModel(WireModel):
    """Of a form, whose fields are all text: "1" is a number, and an empty text is the default."""

    model_config = ConfigDict(strict=False)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_empty(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value != ""}


def _check_upload(value: Any) -> UploadFile:
    if not isinstance(value, UploadFile):
        raise PydanticCustomError("file_type", "Input should be a file")
    return value


UploadField = Annotated[Any, WithJsonSchema({"type": "string", "format": "binary"})]
Upload = Annotated[UploadField, AfterValidator(_check_upload)]


# Files


SecondsOfLife = Annotated[int, Field(ge=3600, le=2_592_000)]
FilePurpose = Literal[
    "assistants", "batch", "batch_output", "evals", "fine-tune", "user_data", "vision"
]
FileId = Annotated[str, Field(pattern=r"^file-[0-9a-f]{32}$")]
BatchId = Annotated[str, Field(pattern=r"^batch_[0-9a-f]{32}$")]
Order = Literal["asc", "desc"]


class FileUpload(FormModel):
    """A form with a file."""

    file: Upload = Field(description="What to keep.")
    purpose: Literal["assistants", "batch", "evals", "fine-tune", "user_data", "vision"] = Field(
        description="`batch` for the input of a batch. Otherwise it is only kept."
    )
    anchor: Literal["created_at"] | None = Field(
        default=None,
        alias="expires_after[anchor]",
        description="What `expires_after[seconds]` is counted from.",
    )
    seconds: SecondsOfLife | None = Field(
        default=None,
        alias="expires_after[seconds]",
        description="Delete the file after so many seconds. Left out: never.",
    )


class File(BaseModel):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int = Field(description="Seconds since 1970.")
    expires_at: int | None
    filename: str
    purpose: FilePurpose
    status: Literal["processed"]
    status_details: None


class FileList(BaseModel):
    object: Literal["list"]
    data: list[File]
    first_id: str | None
    last_id: str | None = Field(description="For `after`, to see the next ones.")
    has_more: bool


class DeletedFile(BaseModel):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


# Batches


class ExpiresAfter(WireModel):
    anchor: Literal["created_at"] = Field(description="What `seconds` is counted from.")
    seconds: SecondsOfLife


class BatchRequest(WireModel):
    model_config = _example(
        {
            "input_file_id": "file-0123456789abcdef0123456789abcdef",
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        }
    )

    input_file_id: Name = Field(
        description="An uploaded file with the purpose `batch`: one request a line, as "
        '`{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {...}}`.'
    )
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"] = Field(
        description="What all lines ask for; the `url` of each is the same."
    )
    completion_window: Literal["24h"] = Field(
        description="What has no answer after that time is left out."
    )
    metadata: (
        Annotated[
            dict[
                Annotated[str, Field(max_length=64)],
                Annotated[str, Field(max_length=512)],
            ],
            Field(max_length=16),
        ]
        | None
    ) = Field(default=None, description="Up to 16 texts by name, kept with the batch.")
    output_expires_after: ExpiresAfter | None = Field(
        default=None, description="Delete its output after so long. null: never."
    )


class BatchLine(WireModel):
    """One line of a batch's input."""

    custom_id: Annotated[str, Field(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


class BatchError(BaseModel):
    code: str
    line: int | None = Field(description="Of the input file, from 1.")
    message: str
    param: str | None


class BatchErrors(BaseModel):
    object: Literal["list"]
    data: list[BatchError]


class BatchCounts(BaseModel):
    total: int
    completed: int
    failed: int


class BatchInputDetails(BaseModel):
    cached_tokens: int


class BatchOutputDetails(BaseModel):
    reasoning_tokens: int


class BatchUsage(BaseModel):
    input_tokens: int
    input_tokens_details: BatchInputDetails
    output_tokens: int
    output_tokens_details: BatchOutputDetails
    total_tokens: int


class Batch(BaseModel):
    id: str
    object: Literal["batch"]
    endpoint: str
    model: str | None
    errors: BatchErrors | None = Field(description="Why the input file cannot be used.")
    input_file_id: str
    completion_window: Literal["24h"]
    status: Literal[
        "validating",
        "failed",
        "in_progress",
        "finalizing",
        "completed",
        "expired",
        "cancelling",
        "cancelled",
    ]
    output_file_id: str | None = Field(description="Answers, a line each, in the input's order.")
    error_file_id: str | None = Field(description="Requests that failed or were left out.")
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    usage: BatchUsage
    metadata: dict[str, str] | None


class BatchList(BaseModel):
    object: Literal["list"]
    data: list[Batch]
    first_id: str | None
    last_id: str | None = Field(description="For `after`, to see the next ones.")
    has_more: bool


# Embeddings


EmbeddingModelName = Annotated[
    str | None,
    Field(
        description="Any name: the embedding model of the settings answers. Of token ids it says "
        "whose they are: OpenAI's, the loaded model's, or else the embedding model's own."
    ),
]


class EmbeddingRequest(WireModel):
    """Texts as vectors of length 1. Unknown fields are ignored, and null means the default."""

    model_config = _example({"input": ["The cat sits outside.", "A kitten is in the garden."]})

    input: Inputs = Field(
        description=f"A text, several texts, or token ids: at most {MAX_INPUTS} of them."
    )
    model: EmbeddingModelName = None
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="base64: the bytes of little-endian 32-bit floats."
    )
    dimensions: NumResults | None = Field(
        default=None,
        description="Keep so many of the first dimensions, and make the length 1 again. Only "
        "models that were trained for it stay good then.",
    )
    user: str | None = Field(default=None, description="Accepted and not used.")


class EmbeddingUsage(BaseModel):
    prompt_tokens: int = Field(description="That the model has read, special ones included.")
    total_tokens: int
    truncated_inputs: int = Field(
        default=0,
        description="How many texts were longer than what the model reads, and are cut off. Only "
        "there if some were; the header X-Truncated-Inputs says it too.",
    )


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(BaseModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class RerankRequest(WireModel):
    """Order documents by how well they answer a query, as Cohere's, Jina's and vLLM's API do."""

    model_config = _example(
        {
            "query": "How long do cats sleep?",
            "documents": ["Cats sleep for most of the day.", "The cat is outside."],
            "top_n": 1,
        }
    )

    query: Query = Field(description="What is asked for.")
    documents: Documents = Field(
        description=f"Texts, or objects with a `text`: at most {MAX_INPUTS} of them."
    )
    model: str | None = Field(
        default=None, description="Any name: the model of the settings answers."
    )
    top_n: NumResults | None = Field(
        default=None, description="Return only so many, the best. null: all."
    )
    return_documents: bool = Field(default=True, description="Return the texts, too.")


class RerankedDocument(BaseModel):
    text: str


class RerankResult(BaseModel):
    index: int = Field(description="Of the document, in the request.")
    relevance_score: float = Field(
        description="Of a cross-encoder, what it was trained to say; else a cosine, from -1 to 1."
    )
    document: RerankedDocument | None = None


class Reranking(BaseModel):
    id: str
    model: str
    results: list[RerankResult]
    usage: EmbeddingUsage


class ScoreRequest(WireModel):
    """How well pairs of texts go together, as vLLM tells it."""

    model_config = _example(
        {"text_1": "How long do cats sleep?", "text_2": ["Most of the day.", "It is outside."]}
    )

    text_1: Texts = Field(description="A text, or as many as there are in `text_2`.")
    text_2: Texts = Field(description="A text, or several.")
    model: str | None = Field(
        default=None, description="Any name: the model of the settings answers."
    )

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if len(self.text_1) not in (1, len(self.text_2)):
            message = (
                f"There should be one text, or as many as in text_2, which has {len(self.text_2)}"
            )
            _refuse("text_1", message, None)
        return self


class Score(BaseModel):
    index: int
    object: Literal["score"]
    score: float


class ScoreList(BaseModel):
    id: str
    object: Literal["list"]
    created: int = Field(description="Seconds since 1970.")
    model: str
    data: list[Score]
    usage: EmbeddingUsage


# Moderations


class ModerationPart(TypedDict):
    type: Literal["text"]
    text: str


class ModerationRequest(WireModel):
    model_config = _example({"input": ["I like your garden.", "I will hurt you."]})

    # Looked at where it is read, which says what is wrong with which of them.
    input: Annotated[
        Any, WithJsonSchema(TypeAdapter(str | list[str] | list[ModerationPart]).json_schema())
    ] = Field(
        description="A text, a list of texts, or a list of text parts, which together are one "
        "text. Images are refused: nothing here looks at them."
    )
    model: str | None = Field(default=None, description="Accepted and not used.")


class ModerationCategories(RootModel[dict[str, bool]]):
    """By category, whether the text belongs to it: its score is 0.5 or more."""


class ModerationScores(RootModel[dict[str, float]]):
    """By category, the probability that the text belongs to it."""


class ModerationResult(BaseModel):
    flagged: bool = Field(description="Whether it belongs to any of the categories.")
    categories: ModerationCategories
    category_scores: ModerationScores
    category_applied_input_types: dict[str, list[Literal["text"]]]


class Moderations(BaseModel):
    id: str
    model: str = Field(description="The model that has judged.")
    results: list[ModerationResult] = Field(description="One for each text, in their order.")


# Images


MAX_IMAGES = 10
MAX_PARTIAL_IMAGES = 3
MAX_IMAGE_PROMPT_CHARS = 32_000
# The web UI's own limits.
MAX_IMAGE_STEPS = 150
MAX_IMAGE_SEED = 2**32 - 1
MIN_IMAGE_SIDE = 64
MAX_IMAGE_SIDE = 4096
MAX_IMAGE_PIXELS = 3840 * 2160
IMAGE_SIDE_STEP = 8

# As REFUSED_FIELDS.
REFUSED_IMAGE_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "style": ("vivid",),
    "input_fidelity": ("low",),
    "complexity": (),
    "frame_count": (),
    "frame_duration_ms": (),
    "markup": (),
    "svg": (),
}


def _check_image_size(size: str) -> str:
    if size == "auto":
        return size
    found = re.fullmatch(r"([0-9]{2,4})x([0-9]{2,4})", size)
    sides = tuple(map(int, found.groups())) if found else ()
    is_right = (
        sides
        and all(MIN_IMAGE_SIDE <= side <= MAX_IMAGE_SIDE for side in sides)
        and not any(side % IMAGE_SIDE_STEP for side in sides)
        and sides[0] * sides[1] <= MAX_IMAGE_PIXELS
    )
    if not is_right:
        raise PydanticCustomError(
            "image_size",
            "Input should be auto or WIDTHxHEIGHT, as in 1024x1024, each of them a multiple of "
            "{step} from {low} to {high}, with at most {most} pixels in all",
            {
                "step": IMAGE_SIDE_STEP,
                "low": MIN_IMAGE_SIDE,
                "high": MAX_IMAGE_SIDE,
                "most": MAX_IMAGE_PIXELS,
            },
        )
    return size


def _check_only_upload(values: list[Any]) -> list[UploadFile]:
    if len(values) > 1:
        raise PydanticCustomError("uploads", "Only one image can be edited at a time")
    return [_check_upload(value) for value in values]


ImagePrompt = Annotated[str, Field(max_length=MAX_IMAGE_PROMPT_CHARS)]
ImageSize = Annotated[str, AfterValidator(_check_image_size)]
NumImages = Annotated[int, Field(ge=1, le=MAX_IMAGES), BeforeValidator(_to_int)]
ImageStrength = Annotated[float, Field(ge=0.01, le=1)]


class ImageOptions(WireModel):
    """What all requests for images may say."""

    prompt: ImagePrompt = Field(
        default="", description="What should be in the images, if you like."
    )
    n: NumImages = Field(default=1, description="How many images to make.")
    size: ImageSize = Field(
        default="auto",
        description="WIDTHxHEIGHT in pixels, both multiples of 8. auto: 1024x1024, or what the "
        "pipeline on this machine has learnt; of an image that is sent, its own, scaled down to as "
        "many pixels.",
    )
    response_format: Literal["url", "b64_json"] | None = Field(
        default=None,
        description="url: a data: URL, which holds the image itself. b64_json: the file in base64. "
        "null: url, but b64_json where `model` is one of OpenAI's GPT image models.",
    )
    output_format: Literal["png", "jpeg", "webp"] = Field(
        default="png", description="The file format of the images."
    )
    output_compression: Annotated[int, Field(ge=0, le=100), BeforeValidator(_to_int)] = Field(
        default=100, description="The quality of JPEG and WebP: 100 is the best."
    )
    quality: Literal["auto", "standard", "hd", "low", "medium", "high", "xhigh", "max"] = Field(
        default="auto",
        description="How many steps to take, if `steps` does not say it: half as many as usual for "
        "low, 1.5 times for high and hd, twice for xhigh, three times for max.",
    )
    background: Literal["auto", "opaque"] = Field(
        default="auto", description="Images are always opaque."
    )
    negative_prompt: ImagePrompt = Field(
        default="", description="What should not be in the images."
    )
    steps: Annotated[int, Field(ge=1, le=MAX_IMAGE_STEPS), BeforeValidator(_to_int)] | None = Field(
        default=None,
        description="How many steps to take. null: 30, or what the pipeline on this machine takes.",
    )
    seed: Annotated[int, Field(ge=-1, le=MAX_IMAGE_SEED), BeforeValidator(_to_int)] = Field(
        default=-1,
        description="The same seed gives the same image; the next image has the next seed. -1: a "
        "random one.",
    )
    sampler_name: Name | None = Field(
        default=None,
        validation_alias=AliasChoices("sampler_name", "sampler"),
        description="A sampler as the web UI calls it, such as `Euler a`. Also taken as "
        "`sampler`. null: DPM++ 2M Karras, or the pipeline's own.",
    )
    cfg_scale: Annotated[float, Field(ge=0, le=100)] | None = Field(
        default=None,
        validation_alias=AliasChoices("cfg_scale", "guidance_scale"),
        description="How closely to follow the prompt. Also taken as `guidance_scale`. null: 7, or "
        "the pipeline's own.",
    )
    model: str | None = Field(
        default=None, description="Any name; it only decides about `response_format`."
    )
    user: str | None = Field(default=None, description="Accepted and not used.")

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, data: Any) -> Any:
        for name, neutral_values in REFUSED_IMAGE_FIELDS.items():
            value = data.get(name) if isinstance(data, dict) else None
            if value is not None and not _is_neutral(value, neutral_values):
                _refuse(name, "This field is not supported; leave it out", value)
        return data

    @model_validator(mode="after")
    def _check_compression(self) -> Self:
        if self.output_format == "png" and self.output_compression != 100:
            message = "Only jpeg and webp can be smaller than they are"
            _refuse("output_compression", message, self.output_compression)
        return self


class StreamedImageOptions(ImageOptions):
    """Those of which the image can be seen while it is made."""

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_IMAGE_PROMPT_CHARS)] = Field(
        description="What should be in the images."
    )
    stream: bool = Field(
        default=False,
        description="Send each image when it is done, as a server-sent event, always in base64.",
    )
    partial_images: Annotated[int, Field(ge=0, le=MAX_PARTIAL_IMAGES), BeforeValidator(_to_int)] = (
        Field(
            default=0,
            description="With `stream`: show what the image is like so far, at most so many times.",
        )
    )


class ImageGenerationRequest(StreamedImageOptions):
    """Make images from words. Unknown fields are ignored, and null means the default."""

    model_config = _example(
        {"prompt": "A lighthouse at dusk, oil painting", "size": "512x512", "seed": 7}
    )


class ImageEditRequest(StreamedImageOptions, FormModel):
    """Change an image, or a part of it, by words. A form; unknown fields are ignored."""

    image: Annotated[list[UploadField], AfterValidator(_check_only_upload)] = Field(
        description="The image: PNG, JPEG, GIF or WebP. Without a mask, what is transparent in it "
        "is made anew; where nothing is, all of it is changed."
    )
    mask: Upload | None = Field(
        default=None,
        description="An image of the same size, transparent where to edit. What is opaque stays.",
    )
    denoising_strength: ImageStrength | None = Field(
        default=None,
        validation_alias=AliasChoices("denoising_strength", "strength"),
        description="How far to go from the image. Also taken as `strength`. null: 0.75, 1 where "
        "a part is edited, and 0.6 for variations.",
    )


class ImageVariationRequest(ImageOptions, FormModel):
    """Make images like another one. A form; unknown fields are ignored."""

    image: Upload = Field(description="The image: PNG, JPEG, GIF or WebP.")
    denoising_strength: ImageStrength | None = Field(
        default=None,
        validation_alias=AliasChoices("denoising_strength", "strength"),
        description="How far to go from the image. Also taken as `strength`. null: 0.6.",
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_streams(cls, data: Any) -> Any:
        stream = data.get("stream") if isinstance(data, dict) else None
        if stream not in (None, "false", "0"):
            _refuse("stream", "Variations cannot be streamed", stream)
        return data


class Image(BaseModel):
    """Either `url` or `b64_json`."""

    url: str | None = Field(default=None, description="A data: URL.")
    b64_json: str | None = Field(default=None, description="The file in base64.")
    revised_prompt: str | None = Field(
        default=None, description="What styles of the web UI have made of the prompt, if anything."
    )


class ImageList(BaseModel):
    created: int = Field(description="Seconds since 1970.")
    background: Literal["opaque"]
    data: list[Image]
    output_format: Literal["png", "jpeg", "webp"]
    size: str = Field(description="WIDTHxHEIGHT.")


# Audio


class VoiceActivityDetection(FormModel):
    type: Literal["server_vad"] = Field(description="Always server_vad.")
    threshold: float = Field(
        default=0.5, ge=0, le=1, description="How sure it has to be that somebody speaks."
    )
    silence_duration_ms: int = Field(
        default=200, ge=0, le=MAX_INT, description="Shorter pauses are left in."
    )
    prefix_padding_ms: int = Field(
        default=300, ge=0, le=10000, description="How much is left in around what is spoken."
    )


def _to_chunking_strategy(value: Any) -> Any:
    """ "auto", or an object, also as JSON."""
    if not isinstance(value, str) or value == "auto":
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        message = "Input should be auto or an object with the type server_vad"
        raise PydanticCustomError("chunking_strategy", message) from None


class AudioOptions(FormModel):
    file: Upload = Field(
        description="A recording, or a video with sound, in any common format: wav, mp3, m4a, mp4, "
        "ogg, opus, flac, webm and more."
    )
    model: str = Field(
        default="whisper-1",
        description="A Whisper model in the model folder, or the bundled one. Any other name means "
        "the one that the settings choose.",
    )
    prompt: str = Field(
        default="",
        description="Text that could stand before the recording: it sets the style, and spells "
        "names.",
    )
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt"] = Field(
        default="json",
        description="json: the text. verbose_json: with times. srt, vtt: subtitles.",
    )
    temperature: float = Field(
        default=0,
        ge=0,
        le=1,
        description="0: without chance, and more of it by steps where the text is not plausible.",
    )


class TranslationRequest(AudioOptions):
    pass


class TranscriptionRequest(AudioOptions):
    language: str | None = Field(
        default=None,
        description="What is spoken, as a code of ISO 639-1 or in English. null: it is found out.",
    )
    timestamp_granularities: Sequence[Literal["word", "segment"]] = Field(
        default=("segment",),
        description="With verbose_json: which times to tell. word takes longer.",
    )
    stream: bool = Field(
        default=False, description="Send the text as events while it is heard, with json and text."
    )
    chunking_strategy: Annotated[
        Literal["auto"] | VoiceActivityDetection | None, BeforeValidator(_to_chunking_strategy)
    ] = Field(
        default=None,
        description="auto, or an object with the type server_vad: silence is left out before the "
        "model hears the recording. null: it hears everything.",
    )
    include: list[Literal["logprobs"]] = Field(
        default_factory=list, description="logprobs is refused: it is not known here."
    )
    known_speaker_names: list[str] = Field(
        default_factory=list, description="Refused: speakers are not told apart."
    )

    @model_validator(mode="before")
    @classmethod
    def _join_brackets(cls, data: Any) -> Any:
        """Objects come in forms as `chunking_strategy[type]`."""
        if not isinstance(data, dict):
            return data
        parts = {
            name.removeprefix("chunking_strategy[").removesuffix("]"): value
            for name, value in data.items()
            if name.startswith("chunking_strategy[")
        }
        return {**data, "chunking_strategy": parts} if parts else data

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.include:
            _refuse("include", "Log-probabilities are not known here", self.include)
        if self.known_speaker_names:
            message = "Speakers are not told apart here"
            _refuse("known_speaker_names", message, self.known_speaker_names)
        if self.response_format != "verbose_json" and (
            "timestamp_granularities" in self.model_fields_set
        ):
            message = "It needs the response_format verbose_json"
            _refuse("timestamp_granularities", message, self.timestamp_granularities)
        if self.stream and self.response_format not in ("json", "text"):
            message = "A stream carries text only: Input should be json or text"
            _refuse("response_format", message, self.response_format)
        return self


class AudioUsage(BaseModel):
    type: Literal["duration"]
    seconds: float


class TranscribedSegment(BaseModel):
    id: int
    seek: int = Field(description="Where the window begins that it was heard in, in 10 ms.")
    start: float = Field(description="Seconds from the beginning of the recording.")
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float = Field(description="Above 2.4 the text repeats itself.")
    no_speech_prob: float


class TranscribedWord(BaseModel):
    word: str
    start: float = Field(description="Seconds from the beginning of the recording.")
    end: float


class Transcription(BaseModel):
    """With `verbose_json` also `task`, `language`, `duration`, `segments` and `words`."""

    text: str
    usage: AudioUsage
    task: Literal["transcribe"] | None = None
    language: str | None = Field(default=None, description="In English, in small letters.")
    duration: float | None = Field(default=None, description="In seconds.")
    segments: list[TranscribedSegment] | None = None
    words: list[TranscribedWord] | None = None


class Translation(BaseModel):
    """With `verbose_json` also `task`, `language`, `duration` and `segments`."""

    text: str
    task: Literal["translate"] | None = None
    language: Literal["english"] | None = None
    duration: float | None = Field(default=None, description="In seconds.")
    segments: list[TranscribedSegment] | None = None


class CustomVoice(WireModel):
    id: str


def _to_voice_name(value: Any) -> Any:
    return value.get("id") if isinstance(value, dict) else value


class SpeechRequest(WireModel):
    model_config = _example({"model": "tts-1", "voice": "alloy", "input": "How are you today?"})

    input: str = Field(min_length=1, max_length=MAX_SPEECH_CHARS, description="The text to speak.")
    model: str = Field(default="tts-1", description="Any; the voice decides.")
    voice: Annotated[str, BeforeValidator(_to_voice_name)] = Field(
        default="alloy",
        description="A voice of this machine; NAME:SPEAKER if it has several speakers. OpenAI's "
        "names mean the one that the settings choose. Also taken as an object with `id`.",
    )
    response_format: Literal["mp3", "opus", "aac", "flac", "wav", "pcm"] = Field(
        default="mp3",
        description="One channel, 24000 samples a second. opus comes in Ogg; pcm is 16 bits, "
        "little-endian, without a header.",
    )
    speed: float = Field(default=1, ge=0.25, le=4, description="How fast to speak; 2 is twice.")
    stream_format: Literal["audio", "sse"] = Field(
        default="audio", description="sse: as events, with the pieces of the file in base64."
    )
    instructions: str = Field(
        default="", description="Passed over, as OpenAI's tts-1 does: a voice has one manner."
    )


# Older programs


class SearchRequest(WireModel):
    """Order documents by how near they are to a query, as OpenAI's first API did."""

    model_config = _example(
        {"documents": ["White House", "hospital", "school"], "query": "the president"}
    )

    documents: Documents = Field(description=f"Texts, at most {MAX_INPUTS}.")
    query: Query = Field(description="What is looked for.")
    model: str | None = Field(default=None, description="Any name: the embedding model answers.")
    max_rerank: NumResults = Field(default=200, description="Return at most so many, the best.")
    return_metadata: bool = Field(
        default=False, description="Accepted and not used: these documents have none."
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_files(cls, data: Any) -> Any:
        file = data.get("file") if isinstance(data, dict) else None
        if file is not None:
            _refuse("file", "Documents cannot be taken from a file; send them as documents", file)
        return data


class SearchResult(BaseModel):
    object: Literal["search_result"]
    document: int = Field(description="Its index in the request.")
    score: float = Field(description="The cosine, from -1 to 1.")


class SearchResultList(BaseModel):
    object: Literal["list"]
    data: list[SearchResult]
    model: str


class Engine(BaseModel):
    id: str
    object: Literal["engine"]
    owner: str
    ready: bool = Field(description="Whether it is loaded.")


class EngineList(BaseModel):
    object: Literal["list"]
    data: list[Engine]


class BillingUsage(BaseModel):
    total_usage: int = Field(description="It costs nothing.")
