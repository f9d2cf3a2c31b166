"""Log-probabilities in OpenAI's two shapes, of the tokens of each delta.

A token is shown by the text of its own bytes; where they are only a part of a character, a chat
shows U+FFFD, and completions spell them like `bytes:\\xe2\\x80`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from extensions.openai.responses import Json
from modules.engine.outputs import FinishReason, TokenOutput
from modules.text_generation import TextDelta
from modules.vocabulary import Vocabulary

ReadLogprobs = Callable[[TextDelta], Json | None]

# What stands for minus infinity, which JSON does not know; OpenAI's number.
IMPOSSIBLE = -9999.0


def read_none(delta: TextDelta) -> None:
    """Nobody has asked for them."""


def make_chat_reader(vocabulary: Vocabulary) -> ReadLogprobs:
    """For chats: the token that ended the sequence is not listed."""

    def read(delta: TextDelta) -> Json:
        listed = (o for o in delta.outputs if o.finish_reason is not FinishReason.STOP)
        return {"content": [_build_chat_entry(vocabulary, o) for o in listed], "refusal": None}

    return read


def make_text_reader(vocabulary: Vocabulary, skip_special_tokens: bool) -> ReadLogprobs:
    """For completions: all tokens are listed, the one that ended the sequence too, so that there
    are as many as were generated. The text of a delta of prompt tokens is the prompt's.
    """
    cursors: dict[int, _Cursor] = defaultdict(_Cursor)

    def read_offset(cursor: _Cursor, output: TokenOutput) -> int:
        is_left_out = skip_special_tokens and vocabulary.is_special(output.token_id)
        return cursor.pass_over(b"" if is_left_out else vocabulary.bytes_of(output.token_id))

    def read(delta: TextDelta) -> Json:
        outputs, cursor = delta.outputs, cursors[delta.index]
        if any(output.is_prompt for output in outputs):
            pieces = [vocabulary.bytes_of(output.token_id) for output in outputs]
            offsets = cursor.follow(delta.text, pieces)
        else:
            cursor.num_chars -= delta.num_repeated_chars
            offsets = [read_offset(cursor, output) for output in outputs]
        return _build_text_logprobs(vocabulary, outputs, offsets)

    return read


def _build_chat_entry(vocabulary: Vocabulary, output: TokenOutput) -> Json:
    logprob = IMPOSSIBLE if output.logprob is None else output.logprob
    top = [_build_chat_token(vocabulary, *pair) for pair in output.top_logprobs]
    return {**_build_chat_token(vocabulary, output.token_id, logprob), "top_logprobs": top}


def _build_chat_token(vocabulary: Vocabulary, token_id: int, logprob: float) -> Json:
    token_bytes = vocabulary.bytes_of(token_id)
    return {
        "token": token_bytes.decode(errors="replace"),
        "logprob": max(logprob, IMPOSSIBLE),
        "bytes": list(token_bytes),
    }


def _build_text_logprobs(
    vocabulary: Vocabulary, outputs: Iterable[TokenOutput], offsets: list[int]
) -> Json:
    tokens, logprobs, top_logprobs = [], [], []
    for output in outputs:
        token = _to_text(vocabulary.bytes_of(output.token_id))
        logprob = None if output.logprob is None else max(output.logprob, IMPOSSIBLE)
        tokens.append(token)
        logprobs.append(logprob)
        top_logprobs.append(None if logprob is None else _build_top(vocabulary, output, token))
    return {
        "tokens": tokens,
        "token_logprobs": logprobs,
        "top_logprobs": top_logprobs,
        "text_offset": offsets,
    }


def _build_top(vocabulary: Vocabulary, output: TokenOutput, token: str) -> dict[str, float]:
    """The likeliest tokens and the one that was taken; of two that look the same, the likelier."""
    assert output.logprob is not None
    top: dict[str, float] = {}
    for token_id, logprob in output.top_logprobs:
        top.setdefault(_to_text(vocabulary.bytes_of(token_id)), max(logprob, IMPOSSIBLE))
    top.setdefault(token, max(output.logprob, IMPOSSIBLE))
    return top


def _to_text(token_bytes: bytes) -> str:
    try:
        return token_bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)


@dataclass(slots=True)
class _Cursor:
    """A place in the text of a choice, in characters."""

    num_chars: int = 0
    """Characters that have begun; less than 0 while a prompt's end is repeated that is not in the
    text.
    """

    def pass_over(self, part: bytes) -> int:
        """Where the character stands that `part` begins with, or goes on with."""
        is_inside = bool(part) and not _begins_character(part[0])
        if is_inside and self.num_chars <= 0:  # it began in the prompt
            self.num_chars += 1
        place = max(0, self.num_chars - is_inside)
        self.num_chars += sum(map(_begins_character, part))
        return place

    def follow(self, text: str, pieces: list[bytes]) -> list[int]:
        """The places of `pieces`, which are those of `text` or of its end, but for special tokens
        that are not in it and for the space that SentencePiece puts before a text.
        """
        data = text.encode()
        start = _find_start(data, pieces)
        self.num_chars = sum(map(_begins_character, data[:start]))
        places = []
        for piece in pieces:
            spellings = (piece, piece.removeprefix(b" "), b"")
            part = next(spelling for spelling in spellings if data.startswith(spelling, start))
            start += len(part)
            places.append(self.pass_over(part))
        self.num_chars = len(text)
        return places


def _find_start(data: bytes, pieces: list[bytes]) -> int:
    """Where the tokens begin of a text whose start was cut off, but maybe for a special token."""
    for read in (b"".join(pieces), b"".join(pieces[1:])):
        if data.startswith(read):  # the end may have been taken back
            return 0
        if data.endswith(read):
            return len(data) - len(read)
    return 0


def _begins_character(byte: int) -> bool:
    """Not so the later bytes of a character in UTF-8 (RFC 3629)."""
    return byte & 0xC0 != 0x80
