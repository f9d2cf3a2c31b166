from __future__ import annotations

import math

import pytest

from modules.engine.sampling_params import SamplingParams
from modules.loaded_model import LoadedModel
from modules.token_healing import HealedPrompt, find_first_tokens, heal
from tests.fakes import IM_END, VOCAB_SIZE, FakeEngine, build_model, build_tokenizer

COLON, SLASH = ord(":"), ord("/")
# What the merges make
COLON_SLASH, COLON_SLASHES = VOCAB_SIZE, VOCAB_SIZE + 1


@pytest.fixture
def model(engine: FakeEngine) -> LoadedModel:
    return build_model(engine, build_tokenizer(merges=[(":", "/"), (":/", "/")]))


def test_the_last_token_becomes_the_beginning_of_the_next(model: LoadedModel) -> None:
    token_ids = model.encode("http:", add_special_tokens=False)
    assert heal(model, token_ids, SamplingParams(), True) == HealedPrompt(
        tuple(b"http"), (COLON, COLON_SLASH, COLON_SLASHES), 1
    )


def test_a_token_that_ends_a_character(model: LoadedModel) -> None:
    healed = heal(model, tuple("é".encode()), SamplingParams(), True)
    assert healed == HealedPrompt((0xC3,), (0xA9,), 1)


@pytest.mark.parametrize("token_ids", [(COLON,), (COLON, IM_END)])
def test_what_cannot_be_taken_back(model: LoadedModel, token_ids: tuple[int, ...]) -> None:
    """The only token, and a special one."""
    assert heal(model, token_ids, SamplingParams(), True) is None


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(logit_bias=((COLON, -math.inf), (COLON_SLASH, -5.0))), [1, 2]),
        (SamplingParams(allowed_token_ids=(COLON_SLASHES, SLASH)), [2]),
        (SamplingParams(stop_token_ids=(COLON_SLASH,)), [0, 2]),
        (SamplingParams(allowed_token_ids=(SLASH,)), []),
    ],
)
def test_tokens_that_may_not_come(
    model: LoadedModel, params: SamplingParams, expected: list[int]
) -> None:
    tokens = (COLON, COLON_SLASH, COLON_SLASHES)
    assert find_first_tokens(model, COLON, params) == tuple(tokens[i] for i in expected)


def test_a_prompt_stays_whole_if_nothing_may_follow(model: LoadedModel) -> None:
    params = SamplingParams(allowed_token_ids=(SLASH,))
    assert heal(model, (SLASH, COLON), params, True) is None
