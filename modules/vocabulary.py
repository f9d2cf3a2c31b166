"""Vocabulary: the bytes and the spelling of each token, and the tokens that contain or begin with a
text. Knows the ways in which tokenizers spell bytes; encodes and decodes nothing.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from itertools import takewhile
from typing import Any

from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

_ReadPiece = Callable[[str], bytes]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_WORD_START = "\u2581"
# Distinct texts whose tokens are remembered: requests name them.
_NUM_REMEMBERED = 256


class Vocabulary:
    """Of the tokens that a model knows. What a tokenizer lacks (an embedding may have more rows
    than there are tokens, so that it can be cut evenly) is spelled "" and has no bytes.

    Cheap to make. The first search takes up to a second of a large vocabulary, so let a thread do
    it; all else takes microseconds.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._search = lru_cache(_NUM_REMEMBERED)(self._find_containing)

    def piece(self, token_id: int) -> str:
        """As the tokenizer's files spell it, like `\\u0120word` or `\\u2581word`."""
        return self._lookup(token_id) or ""

    def bytes_of(self, token_id: int) -> bytes:
        """What the token adds to a text; a part of a character for some. A special token's are
        those of its name. With SentencePiece a word's first token has the space before it, which
        is left out where a text begins.
        """
        added = self._added.get(token_id)
        if added is not None:
            return added.encode()
        piece = self.piece(token_id)
        return self._read(piece) if piece else b""

    def is_special(self, token_id: int) -> bool:
        """Whether it is left out of a text, if those tokens are."""
        return token_id in self._special_ids

    def find_containing(self, text: str) -> frozenset[int]:
        """The tokens, special ones too, in which `text` is found."""
        return self._search(text.encode())

    def find_with_prefix(self, prefix: bytes) -> tuple[int, ...]:
        """The tokens, special ones left out, whose bytes begin with `prefix`; in rising order."""
        entries = self._sorted
        start = bisect_left(entries, (prefix, -1))
        rest = (entries[place] for place in range(start, len(entries)))
        matching = takewhile(lambda entry: entry[0].startswith(prefix), rest)
        return tuple(sorted(token_id for _, token_id in matching))

    def _find_containing(self, part: bytes) -> frozenset[int]:
        return frozenset(i for i, known in enumerate(self._all_bytes) if part in known)

    @cached_property
    def _lookup(self) -> Callable[[int], str | None]:
        if isinstance(self._tokenizer, PreTrainedTokenizerFast):
            return self._tokenizer.backend_tokenizer.id_to_token
        return {token_id: piece for piece, token_id in self._tokenizer.get_vocab().items()}.get

    @cached_property
    def _read(self) -> _ReadPiece:
        return _choose_reader(self._tokenizer)

    @cached_property
    def _added(self) -> dict[int, str]:
        return {i: token.content for i, token in self._tokenizer.added_tokens_decoder.items()}

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self._tokenizer.added_tokens_decoder.items()
        marked = (token_id for token_id, token in added if token.special)
        return frozenset((*marked, *self._tokenizer.all_special_ids))

    @cached_property
    def _all_bytes(self) -> list[bytes]:
        return [self.bytes_of(token_id) for token_id in range(self.vocab_size)]

    @cached_property
    def _sorted(self) -> list[tuple[bytes, int]]:
        return sorted(
            (known, token_id)
            for token_id, known in enumerate(self._all_bytes)
            if known and token_id not in self._special_ids
        )


def _choose_reader(tokenizer: PreTrainedTokenizerBase) -> _ReadPiece:
    """How this tokenizer's pieces spell bytes."""
    if isinstance(tokenizer, ByT5Tokenizer):  # a character is the byte of its number
        return lambda piece: piece.encode("latin-1")
    kinds = set(_decoder_kinds(tokenizer))
    if "ByteLevel" in kinds or hasattr(tokenizer, "byte_decoder"):
        return _read_byte_level
    if kinds & {"ByteFallback", "Metaspace"} or hasattr(tokenizer, "sp_model"):
        return _read_sentencepiece
    return _make_reader_by_decoding(tokenizer)


def _decoder_kinds(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return
    decoder: Any = tokenizer.backend_tokenizer.decoder
    steps = [json.loads(decoder.__getstate__())] if decoder is not None else []
    while steps:
        step = steps.pop()
        yield step["type"]
        steps += step.get("decoders", ())


def _build_byte_characters() -> dict[int, int]:
    """Which byte a character stands for: printable ones for themselves, the others in order from
    U+0100 on (GPT-2).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {256 + i: byte for i, byte in enumerate(others)}


_BYTE_OF = _build_byte_characters()


def _read_byte_level(piece: str) -> bytes:
    if all(ord(char) in _BYTE_OF for char in piece):
        return piece.translate(_BYTE_OF).encode("latin-1")
    return piece.encode()  # not cut from a text, but added as it is


def _read_sentencepiece(piece: str) -> bytes:
    """Kudo and Richardson 2018 (arXiv:1808.06226); bytes are spelled like `<0x0A>`."""
    byte = _BYTE_TOKEN.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(_WORD_START, " ").encode()


def _make_reader_by_decoding(tokenizer: PreTrainedTokenizerBase) -> _ReadPiece:
    """What a piece adds to the text of another before it."""
    before = "a"
    num_chars = len(tokenizer.convert_tokens_to_string([before]))

    def read(piece: str) -> bytes:
        return tokenizer.convert_tokens_to_string([before, piece])[num_chars:].encode()

    return read
