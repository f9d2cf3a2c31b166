"""Fill-in-the-middle: a prompt of what comes before and after the text that is asked for, spelled
with the tokens that the model has learnt it with (Bavarian et al. 2022, arXiv:2207.14255).
"""

from __future__ import annotations

from dataclasses import dataclass

from modules.errors import InvalidRequestError
from modules.loaded_model import LoadedModel
from modules.prompt_tokens import EncodedPrompt


@dataclass(frozen=True, slots=True)
class Spelling:
    """Names of the tokens before each part."""

    prefix: str
    suffix: str
    middle: str | None = None
    """None: the suffix comes first, and the text that is asked for goes on after the prefix."""


SPELLINGS = (
    Spelling("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    Spelling("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    Spelling("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    Spelling("▁<PRE>", "▁<SUF>", "▁<MID>"),  # CodeLlama
    Spelling("<PRE>", "<SUF>", "<MID>"),
    Spelling("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
    Spelling("[PREFIX]", "[SUFFIX]"),  # Codestral
)
# What a model may write when the middle is complete, beside its end-of-sequence tokens.
ENDS = (
    "▁<EOT>",
    "<EOT>",
    "<|endoftext|>",
    "<fim_pad>",
    "<|fim_pad|>",
    "<file_sep>",
    "<|file_sep|>",
    "<|file_separator|>",
    "<repo_name>",
    "<|repo_name|>",
)
# Begins no word, and merges with nothing.
MARK = "\u263a"


@dataclass(frozen=True, slots=True)
class FimTokens:
    prefix: int
    suffix: int
    middle: int | None
    ends: tuple[int, ...]


def find_fim_tokens(model: LoadedModel) -> FimTokens:
    """Raises InvalidRequestError if the model's tokenizer has none."""
    for spelling in SPELLINGS:
        prefix, suffix = (_find(model, name) for name in (spelling.prefix, spelling.suffix))
        middle = _find(model, spelling.middle) if spelling.middle else None
        if prefix is None or suffix is None or (spelling.middle and middle is None):
            continue
        ends = (prefix, suffix, middle, *(_find(model, name) for name in ENDS))
        return FimTokens(prefix, suffix, middle, tuple(i for i in ends if i is not None))
    raise InvalidRequestError(
        f"{model.name} cannot fill in the middle: its tokenizer has no tokens for it. Leave "
        "'suffix' out.",
        "suffix",
    )


def enclose(
    model: LoadedModel, tokens: FimTokens, prompt: EncodedPrompt, suffix: str
) -> EncodedPrompt:
    """`prompt`, which is what comes before, together with what comes after."""
    after = (tokens.suffix, *_encode_inside(model, suffix))
    if tokens.middle is None:
        return EncodedPrompt(prompt.text, start=(*prompt.start, *after, tokens.prefix))
    start = (*prompt.start, tokens.prefix)
    return EncodedPrompt(prompt.text, start, end=(*after, tokens.middle))


def _find(model: LoadedModel, name: str) -> int | None:
    token_id = model.tokenizer.convert_tokens_to_ids(name)
    if isinstance(token_id, int) and token_id != model.tokenizer.unk_token_id:
        return token_id
    return None


def _encode_inside(model: LoadedModel, text: str) -> tuple[int, ...]:
    """Without the space that SentencePiece puts before every text."""
    mark = model.encode(MARK, add_special_tokens=False)
    marked = model.encode(MARK + text, add_special_tokens=False)
    if marked[: len(mark)] == mark:
        return marked[len(mark) :]
    return model.encode(text, add_special_tokens=False)
