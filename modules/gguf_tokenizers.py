"""The tokenizer a GGUF file describes, as one of transformers': same text in, the ids out that the
model was trained with. Knows the metadata keys under `tokenizer.`; knows no files and no weights.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    GGUF_TOKENIZER_MAPPING,
    convert_gguf_tokenizer,
)

from modules.errors import ModelLoadError

logger = logging.getLogger(__name__)

Metadata = Mapping[str, Any]

# Values of `tokenizer.ggml.token_type`.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

# Tokens that end a turn or a text wherever they occur; many files name only one of theirs.
_END_TOKENS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<turn|>",
    "<|tool_response>",
    "<end_of_utterance>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[e~[",
    "<｜end▁of▁sentence｜>",
)


def build_tokenizer(metadata: Metadata) -> PreTrainedTokenizerFast:
    """The tokenizer, with its special tokens, chat template and context length (tokens) set.

    Raises ModelLoadError if the metadata describes none, or one of a kind that is not known.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if not metadata.get("tokenizer.ggml.tokens"):
        raise ModelLoadError("it contains no vocabulary")
    if kind not in _BUILDERS:
        raise ModelLoadError(f"its tokenizer is of the unknown kind {kind!r}")
    architecture = metadata["general.architecture"]
    return PreTrainedTokenizerFast(
        tokenizer_object=_BUILDERS[kind](metadata),
        bos_token=_special_token(metadata, "bos"),
        eos_token=_special_token(metadata, "eos"),
        unk_token=_special_token(metadata, "unknown"),
        pad_token=_special_token(metadata, "padding"),
        add_bos_token=_adds_bos(metadata, kind),
        add_eos_token=bool(metadata.get("tokenizer.ggml.add_eos_token", kind == "t5")),
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=metadata.get(f"{architecture}.context_length"),
        clean_up_tokenization_spaces=False,
    )


def end_token_ids(metadata: Metadata) -> list[int]:
    """Ids of all tokens that end a generation, the file's own `eos` first. May be empty."""
    ids = [token_id(metadata, name) for name in ("eos", "eot", "eom")]
    special = {token.content: i for i, token in _added_tokens(metadata)}
    ids += [special.get(text) for text in _END_TOKENS]
    if "<|return|>" in special:  # here `<|end|>` only closes one of several messages
        ids = [i for i in ids if i != special.get("<|end|>")]
    return list(dict.fromkeys(i for i in ids if i is not None))


def token_id(metadata: Metadata, name: str) -> int | None:
    """Id of the special token `name` (`bos`, `eos`, `eot`, `padding`, ...), or None."""
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    in_vocabulary = value is not None and value < len(metadata["tokenizer.ggml.tokens"])
    return value if in_vocabulary else None


def _special_token(metadata: Metadata, name: str) -> str | None:
    i = token_id(metadata, name)
    return None if i is None else metadata["tokenizer.ggml.tokens"][i]


def _adds_bos(metadata: Metadata, kind: str) -> bool:
    """The file's word; without one, what llama.cpp assumes for the kind.

    gemma4 files set the flag, but the model's chat template writes `<bos>` itself.
    """
    if kind == "gemma4":
        return False
    default = _pre_tokenizer(metadata).add_bos if kind == "gpt2" else kind == "llama"
    return bool(metadata.get("tokenizer.ggml.add_bos_token", default))


def _byte_level_bpe(metadata: Metadata) -> Tokenizer:
    """`tokenizer.ggml.model` = gpt2: merges over bytes, after the text was split by regexes."""
    if (name := _pre_name(metadata)) not in _PRE_TOKENIZERS:
        logger.warning("Unknown pre-tokenizer %r: using that of gpt-2, tokens may differ", name)
    pre = _pre_tokenizer(metadata)
    vocab = _vocab(metadata)
    pairs = (_split_merge(merge) for merge in metadata.get("tokenizer.ggml.merges", ()))
    merges = [(a, b) for a, b in pairs if a in vocab and b in vocab and a + b in vocab]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return _with_added_tokens(tokenizer, metadata)


def _split_merge(merge: str) -> tuple[str, str]:
    """`"a b"` as a pair; a leading space belongs to the first token."""
    left, _, right = merge[1:].partition(" ")
    return merge[:1] + left, right


def _sentencepiece_bpe(metadata: Metadata) -> Tokenizer:
    """`tokenizer.ggml.model` = llama: SentencePiece's BPE, scores in place of merges."""
    unknown = _special_token(metadata, "unknown")
    tokenizer = Tokenizer(
        models.BPE(
            _vocab(metadata),
            _merges_from_scores(metadata),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    escape = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), escape]) if prefix else escape
    )
    decoding = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([*decoding, *strip])
    return _with_added_tokens(tokenizer, metadata)


def _merges_from_scores(metadata: Metadata) -> list[tuple[str, str]]:
    """All ways to join two tokens into a third, those with the best result first.

    SentencePiece joins the neighbours whose result scores best; BPE the pair that is listed first.
    """
    vocab = _vocab(metadata)
    tokens = _tokens(metadata)
    scores = metadata.get("tokenizer.ggml.scores") or [-float(i) for i in range(len(tokens))]
    types = _token_types(metadata)
    ranked = [
        ((-scores[i], i, vocab[text[:cut]], vocab[text[cut:]]), (text[:cut], text[cut:]))
        for i, text in enumerate(tokens)
        if types[i] == _NORMAL
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    ]
    ranked.sort()
    return [pair for _, pair in ranked]


def _transformers_own(metadata: Metadata) -> Tokenizer:
    """The kinds that transformers builds right by itself."""
    names = GGUF_TOKENIZER_MAPPING["tokenizer"]
    given = {name: metadata.get(f"tokenizer.{key}") for key, name in names.items()}
    present = {name: value for name, value in given.items() if value is not None}
    tokenizer, _ = convert_gguf_tokenizer(metadata["general.architecture"], present)
    return tokenizer


_BUILDERS = {
    "gpt2": _byte_level_bpe,
    "llama": _sentencepiece_bpe,
    "t5": _transformers_own,
    "gemma4": _transformers_own,
}


def _with_added_tokens(tokenizer: Tokenizer, metadata: Metadata) -> Tokenizer:
    added = [token for _, token in _added_tokens(metadata)]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    return tokenizer


def _added_tokens(metadata: Metadata) -> Iterator[tuple[int, AddedToken]]:
    """The tokens that are found in text before all else, each as a whole, with their ids."""
    strips = _swallows_white_space(metadata)
    for i, (text, kind) in enumerate(zip(_tokens(metadata), _token_types(metadata), strict=True)):
        if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED):
            rstrip = strips and text not in ("<s>", "<unk>", "<|endoftext|>")
            special = kind != _USER_DEFINED
            yield i, AddedToken(text, special=special, normalized=False, rstrip=rstrip)


def _swallows_white_space(metadata: Metadata) -> bool:
    """Phi-3's special tokens take the white space after them along; no key says so."""
    name = str(metadata.get("general.name", "")).lower()
    return metadata["tokenizer.ggml.model"] == "llama" and ("phi-3" in name or "phi3" in name)


def _tokens(metadata: Metadata) -> list[str]:
    return [text or f"[EMPTY_{i}]" for i, text in enumerate(metadata["tokenizer.ggml.tokens"])]


def _token_types(metadata: Metadata) -> Sequence[int]:
    return metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(_tokens(metadata))


def _vocab(metadata: Metadata) -> dict[str, int]:
    return {text: i for i, text in enumerate(_tokens(metadata))}


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """How text is cut before merging. Each pattern cuts what the one before it left: what matches
    becomes a piece, and so does what lies between two matches.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token is taken whole
    add_bos: bool = False  # if the file does not say
    nfc: bool = False  # the text is brought into Unicode form C first


def _pre_tokenizer(metadata: Metadata) -> _PreTokenizer:
    return _PRE_TOKENIZERS.get(_pre_name(metadata), _GPT2)


def _pre_name(metadata: Metadata) -> str:
    return str(metadata.get("tokenizer.ggml.pre", "default"))


_WORDS_OF_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def _like_cl100k(
    digits: str,
    contraction: str = _CONTRACTION,
    words: str = r"[^\r\n\p{L}\p{N}]?\p{L}+",
    symbols: str = r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    newlines: str = r"\s*[\r\n]+",
    spaces: str = r"\s+(?!\S)|\s+",
) -> str:
    """OpenAI's cl100k pattern, and its many relatives that change one part of it."""
    parts = (contraction, words, digits, symbols, newlines, spaces)
    return "|".join(part for part in parts if part)


def _like_o200k(digits: str, suffix: str = "") -> str:
    """OpenAI's o200k pattern: a word also ends where lower case turns to upper case."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{upper}*{lower}+{suffix}|{start}{upper}+{lower}*{suffix}"
    return _like_cl100k(digits, "", words, symbols=r" ?[^\s\p{L}\p{N}]+[\r\n/]*")


# Cased letters, without those that Unicode gained later than this pattern.
_DEEPSEEK_LETTER = (
    "(?![\u0560-\u0588\u10c7-\u10ff\u1c80-\u1c88\u2d00-\u2d2d\ua790-\ua7ff\uab30-\uab68"
    "\U00010570-\U000105bc\U00016e40-\U00016e7f\U0001d400-\U0001d7cb\U0001df00-\U0001df1e])"
    r"[\p{Lu}\p{Ll}\p{Lt}]"
)
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"

_GPT2 = _PreTokenizer((_WORDS_OF_GPT2,))
_GPT2_NFC = _PreTokenizer((_WORDS_OF_GPT2,), nfc=True)
_SINGLE_DIGITS = _PreTokenizer((r"\p{N}", _WORDS_OF_GPT2))
_CL100K = _PreTokenizer((_like_cl100k(r"\p{N}{1,3}"),))
_GLM4 = _PreTokenizer(_CL100K.patterns, ignore_merges=True)
_LLAMA3 = _PreTokenizer(_CL100K.patterns, ignore_merges=True, add_bos=True)
_QWEN = _PreTokenizer((_like_cl100k(r"\p{N}"),))
_QWEN2 = _PreTokenizer(_QWEN.patterns, nfc=True)
_QWEN35 = _PreTokenizer(
    (
        _like_cl100k(
            r"\p{N}",
            words=r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
            symbols=r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        ),
    ),
    nfc=True,
)
_GPT4O = _PreTokenizer((_like_o200k(r"\p{N}{1,3}", f"{_CONTRACTION}?"),))
_TEKKEN = _PreTokenizer((_like_o200k(r"\p{N}"),), ignore_merges=True, add_bos=True)
_TINY_AYA = _PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", *_GPT4O.patterns))
_DEFAULT = _PreTokenizer(
    (r"[\p{P}\$\+<=>\^~\|]+", _WORDS_OF_GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
)
_FALCON = _PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _WORDS_OF_GPT2, "[0-9][0-9][0-9]"))
_DEEPSEEK_LLM = _PreTokenizer(
    (
        r"[\r\n]",
        rf"\s?(?:{_DEEPSEEK_LETTER})+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        _DEEPSEEK_CJK,
        r"\p{N}+",
    )
)
_DEEPSEEK_CODER = _PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}"))
_DEEPSEEK_V3 = _PreTokenizer(
    (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)
_BLOOM = _PreTokenizer((" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+",))
_VIKING = _PreTokenizer((*_BLOOM.patterns, r"\p{N}"))
_JAIS2 = _PreTokenizer(
    (
        _like_cl100k(
            r"\p{N}{1,3}",
            spaces="|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))
            + r"|\s{1,2}(?!\S)|\s",
        ),
    )
)
_SUPERBPE = _PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))"))
_BAILINGMOE = _PreTokenizer(
    (
        _like_cl100k(
            r"\p{N}",
            contraction="'(?i:[sdmt]|ll|ve|re)",
            words=r"[^\r\n\p{L}\p{N}]?+\p{L}+",
            symbols=r" ?[^\s\p{L}\p{N}]++[\r\n]*",
            newlines=r"\s*[\r\n]",
        ),
    )
)
_SEED_CODER = _PreTokenizer((_like_cl100k(r"\p{N}", symbols=r" ?[^\s\p{L}\p{N}\r\n]+"),))
_EXAONE_MOE = _PreTokenizer(
    (
        _like_cl100k(
            r"\p{N}",
            words=r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
            symbols=r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
            newlines=r"\s*[\r\n]",
        ),
    )
)
_MINICPM5 = _PreTokenizer((r"\p{N}{1,3}", _like_cl100k(r"\p{N}+")), ignore_merges=True)

# The names are llama.cpp's (`tokenizer.ggml.pre`); the patterns are those of the models' own
# tokenizer files.
_PRE_TOKENIZERS = {
    "default": _DEFAULT,
    "gpt-2": _GPT2,
    "a.x-4.0": _GPT2,
    "exaone4": _GPT2,
    "gigachat": _GPT2,
    "granite-docling": _GPT2,
    "jais": _GPT2,
    "jina-de": _GPT2,
    "jina-es": _GPT2,
    "jina-v1-en": _GPT2,
    "jina-v2-code": _GPT2,
    "jina-v2-de": _GPT2,
    "jina-v2-es": _GPT2,
    "mellum": _GPT2,
    "modern-bert": _GPT2,
    "phi-2": _GPT2,
    "roberta-bpe": _GPT2,
    "trillion": _GPT2,
    "mpt": _GPT2_NFC,
    "olmo": _GPT2_NFC,
    "codeshell": _SINGLE_DIGITS,
    "exaone": _SINGLE_DIGITS,
    "mellum2": _SINGLE_DIGITS,
    "minerva-7b": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "command-r": _PreTokenizer(_SINGLE_DIGITS.patterns, nfc=True),
    "chatglm-bpe": _CL100K,
    "dbrx": _CL100K,
    "smaug-bpe": _CL100K,
    "glm4": _GLM4,
    "glm5": _GLM4,
    "falcon-h1": _LLAMA3,
    "falcon3": _LLAMA3,
    "jina-v5-nano": _LLAMA3,
    "lfm2": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "midm-2.0": _LLAMA3,
    "pixtral": _LLAMA3,
    "deepseek-r1-qwen": _QWEN,
    "f2llmv2": _QWEN,
    "grok-2": _QWEN,
    "hunyuan": _QWEN,
    "kormo": _QWEN,
    "megrez": _QWEN,
    "solar-open": _QWEN,
    "stablelm2": _QWEN,
    "ufakzeka": _PreTokenizer((_like_cl100k(r"\p{N}", contraction=""),)),
    "qwen2": _QWEN2,
    "qwen35": _QWEN35,
    "gpt-4o": _GPT4O,
    "kanana2": _GPT4O,
    "llama4": _GPT4O,
    "minimax-m2": _GPT4O,
    "talkie": _GPT4O,
    "cohere2moe": _TINY_AYA,
    "tiny_aya": _TINY_AYA,
    "tekken": _TEKKEN,
    "falcon": _FALCON,
    "deepseek-coder": _DEEPSEEK_CODER,
    "deepseek-llm": _DEEPSEEK_LLM,
    "deepseek-v3": _DEEPSEEK_V3,
    "hunyuan-dense": _DEEPSEEK_V3,
    "hy_v4": _DEEPSEEK_V3,
    "joyai-llm": _DEEPSEEK_V3,
    "bloom": _BLOOM,
    "gpt3-finnish": _BLOOM,
    "poro-chat": _BLOOM,
    "viking": _VIKING,
    "jais-2": _JAIS2,
    "superbpe": _SUPERBPE,
    "bailingmoe": _BAILINGMOE,
    "bailingmoe2": _BAILINGMOE,
    "llada-moe": _BAILINGMOE,
    "seed-coder": _SEED_CODER,
    "exaone-moe": _EXAONE_MOE,
    "minicpm5": _MINICPM5,
}
