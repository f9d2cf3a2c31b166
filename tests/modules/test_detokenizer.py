"""Text out of token ids, whatever way the text is cut into tokens."""

from __future__ import annotations

import itertools
import random

import pytest
from tokenizers import Tokenizer, decoders, models

from modules.detokenizer import IncrementalDetokenizer


class ByteTokens:
    """Token ids are bytes; 256 and above are special."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        kept = [i for i in token_ids if i < 256]
        return bytes(kept).decode("utf-8", errors="replace")


class Pieces:
    """Token ids are indices of text pieces."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(self.pieces[i] for i in token_ids)


def read(decoder, token_ids, **options) -> list[str]:
    detokenizer = IncrementalDetokenizer(decoder, **options)
    texts = [detokenizer.add(token_id) for token_id in token_ids]
    return [*texts, detokenizer.finish()]


@pytest.mark.parametrize("text", ["naïve", "日本語", "👩‍👩‍👧‍👦 ok", "a\u0301", "🏳️‍🌈🏳️‍🌈", ""])
def test_characters_come_whole(text: str) -> None:
    parts = read(ByteTokens(), text.encode())
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


def test_a_genuine_replacement_character_is_released() -> None:
    parts = read(ByteTokens(), "a\ufffdb".encode())
    assert "".join(parts) == "a\ufffdb"
    assert "".join(parts[:-1]) == "a\ufffdb", "by the next token, not by the end"


def test_an_incomplete_tail_is_not_lost() -> None:
    assert "".join(read(ByteTokens(), "ok 👍".encode()[:-1])) == "ok \ufffd"


def test_garbage_without_end_does_not_pile_up() -> None:
    detokenizer = IncrementalDetokenizer(ByteTokens())
    texts = [detokenizer.add(0x80) for _ in range(200)]
    assert sum(map(len, texts)) > 100
    assert len(detokenizer._window) < 100
    tokens = [0x80] * 130 + list(b"abc")
    assert "".join(read(ByteTokens(), tokens)) == "\ufffd" * 130 + "abc"


def test_any_mixture_of_bytes_is_read_as_a_whole() -> None:
    draw = random.Random(0)
    for _ in range(300):
        whole = "".join(draw.choice(["a", "é", "日", "👍", " "]) for _ in range(30)).encode()
        cut = draw.randrange(len(whole))
        spoilt = whole[:cut] + bytes([draw.randrange(256)]) + whole[cut:]
        assert "".join(read(ByteTokens(), spoilt)) == spoilt.decode(errors="replace")


def test_a_prompt_that_ends_inside_a_character() -> None:
    whole = "x👍y".encode()
    parts = read(ByteTokens(), whole[3:], prompt_token_ids=list(whole[:3]))
    assert "".join(parts) == "👍y"


def test_leading_spaces_of_word_pieces_are_kept() -> None:
    vocab = [("▁Hello", 0.0), ("▁world", 0.0), ("!", 0.0)]
    tokenizer = Tokenizer(models.Unigram(vocab))
    tokenizer.decoder = decoders.Metaspace()

    class Words:
        def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
            return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    assert "".join(read(Words(), [1, 2, 1], prompt_token_ids=[0])) == " world! world"


def cuts(text: str, draw: random.Random) -> list[str]:
    """`text` in pieces of random length."""
    marks = sorted(draw.sample(range(1, len(text)), draw.randrange(len(text))))
    return [text[a:b] for a, b in itertools.pairwise([0, *marks, len(text)])]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one STOP two STOP", ["STOP"], "one "),
        ("one two", ["STOP"], "one two"),
        ("one STO", ["STOP"], "one STO"),
        ("a\n\nUser: b", ["\nUser:", "\n\nUser:"], "a"),
        ("abcX", ["abcX", "bc"], "a"),
        ("aaab", ["aab"], "a"),
        ("xyz", ["", "z"], "xy"),
        ("STOP", ["STOP"], ""),
        ("ababac", ["abac"], "ab"),
    ],
)
def test_stop_strings_however_the_text_is_cut(text, stops, expected) -> None:
    draw = random.Random(0)
    for _ in range(60):
        pieces = cuts(text, draw)
        detokenizer = IncrementalDetokenizer(Pieces(pieces), stop_strings=stops)
        sent = ""
        for index in range(len(pieces)):
            sent += detokenizer.add(index)
            assert expected.startswith(sent), "text of a stop string has leaked"
        sent += detokenizer.finish()
        assert sent == expected
        assert detokenizer.is_stopped == (expected != text)


def test_only_a_possible_beginning_is_held_back() -> None:
    detokenizer = IncrementalDetokenizer(Pieces(["hello S", "o", "S", "T"]), stop_strings=["STOP"])
    assert detokenizer.add(0) == "hello "
    assert detokenizer.add(1) == "So"
    assert detokenizer.add(2) == ""
    assert detokenizer.add(3) == ""
    assert detokenizer.finish() == "ST"


def test_nothing_comes_after_a_stop_or_a_discard() -> None:
    detokenizer = IncrementalDetokenizer(Pieces(["aSTOPb", "c"]), stop_strings=["STOP"])
    assert detokenizer.add(0) == "a"
    assert detokenizer.add(1) == detokenizer.finish() == ""
    dropped = IncrementalDetokenizer(Pieces(["S", "T"]), stop_strings=["STOP"])
    dropped.add(0)
    dropped.discard()
    assert dropped.add(1) == dropped.finish() == ""


def test_a_stop_string_completed_by_the_last_incomplete_bytes() -> None:
    parts = read(ByteTokens(), "ab\u00e9".encode()[:-1], stop_strings=["\ufffd"])
    assert "".join(parts) == "ab"


def test_what_repeats_the_prompt_is_left_out() -> None:
    parts = read(Pieces(["ab", "c", "d"]), [0, 1, 2], num_repeated_chars=3)
    assert parts == ["", "", "d", ""]
    parts = read(Pieces(["ab", "c"]), [0, 1], num_repeated_chars=1, stop_strings=["a", "bc"])
    assert parts == ["", "", ""]
    assert read(ByteTokens(), "éx".encode(), num_repeated_chars=1) == ["", "", "x", ""]
