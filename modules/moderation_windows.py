"""How much of a text is judged at once, and what a judge says of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# After the punctuation of many scripts, or at the end of a line.
SENTENCE_END = re.compile(r"(?<=[.!?…。！？।؟])[\"'”’)\]]*\s+|(?<=[。！？])|[\r\n]+")


@dataclass(frozen=True, slots=True)
class Window:
    """How much of a text is judged at once: whole sentences up to so much, or a part of one."""

    max_words: int
    max_bytes: int
    """In UTF-8: no tokenizer makes more tokens of a text than that, so no model cuts it."""


@dataclass(frozen=True, slots=True)
class Judged:
    model: str
    scores: NDArray[np.float64]
    """[texts, categories], from 0 to 1."""


def split_text(text: str, window: Window) -> list[str]:
    """At least one. Parts of a sentence that is too long overlap by half."""
    windows: list[str] = []
    joined = ""
    for piece in _split_sentences(text, window):
        longer = f"{joined} {piece}" if joined else piece
        if _fits(longer, window):
            joined = longer
        else:
            windows += [joined] if joined else []
            joined = piece
    return [*windows, joined]


def _split_sentences(text: str, window: Window) -> Iterator[str]:
    for sentence in SENTENCE_END.split(text):
        words = [part for word in sentence.split() for part in _cut_word(word, window)]
        if not _fits(" ".join(words), window):
            yield from _cut_sentence(words, window)
        elif words:
            yield " ".join(words)


def _cut_sentence(words: Sequence[str], window: Window) -> Iterator[str]:
    start = 0
    while start < len(words):
        end = start + 1
        while end < len(words) and _fits(" ".join(words[start : end + 1]), window):
            end += 1
        yield " ".join(words[start:end])
        if end == len(words):
            return
        start = max(start + 1, (start + end) // 2)


def _cut_word(word: str, window: Window) -> Iterator[str]:
    """Where there are no spaces: so that two parts at least go into a window, to overlap."""
    max_bytes = window.max_bytes // 3
    if len(word.encode()) <= max_bytes:
        yield word
        return
    max_chars = max_bytes // (1 if word.isascii() else 4)
    for start in range(0, len(word), max_chars):
        yield word[start : start + max_chars]


def _fits(text: str, window: Window) -> bool:
    return text.count(" ") < window.max_words and len(text.encode()) <= window.max_bytes
