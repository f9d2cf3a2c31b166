from __future__ import annotations

import pytest

from modules.loaded_model import LoadedModel
from modules.prompt_tokens import EncodedPrompt, Truncation, encode_prompt
from tests.fakes import END_OF_TEXT as BOS

A, B, C = b"abc"


@pytest.mark.parametrize(
    ("prompt", "add_bos", "expected"),
    [
        ("ab", True, EncodedPrompt((A, B))),
        ("<|endoftext|>ab", True, EncodedPrompt((A, B), start=(BOS,))),
        ("<|endoftext|><|endoftext|>ab", False, EncodedPrompt((A, B))),
        ("<|endoftext|>", False, EncodedPrompt(())),
        ("", False, EncodedPrompt(())),
        ((BOS, A), False, EncodedPrompt((A,), start=(BOS,))),
        ((A, BOS), True, EncodedPrompt((A, BOS))),
    ],
)
def test_encoding(
    model: LoadedModel, prompt: str | tuple[int, ...], add_bos: bool, expected: EncodedPrompt
) -> None:
    assert encode_prompt(model, prompt, add_bos) == expected


def test_the_end_of_the_text_is_kept() -> None:
    prompt = EncodedPrompt((A, B, C), start=(BOS,), end=(1, 2))
    assert prompt.token_ids == (BOS, A, B, C, 1, 2)
    assert prompt.cut(6) == prompt
    assert prompt.cut(5).token_ids == (BOS, B, C, 1, 2)
    assert prompt.cut(1).token_ids == (BOS, C, 1, 2)
    assert EncodedPrompt(()).cut(1).token_ids == ()


def test_a_reply_has_room() -> None:
    assert Truncation(max_len=100, num_reserved=16).max_prompt_len == 84
