from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest

from extensions.openai.sampling import to_max_tokens, to_sampling_params
from extensions.openai.typing import GenerationOptions, SamplerName
from modules.engine.sampling_params import DEFAULT_SAMPLER_ORDER, SamplerStep, SamplingParams
from modules.errors import InvalidRequestError
from modules.models import LoadedModel
from tests.fakes import END_OF_TEXT, IM_END, IM_START, VOCAB_SIZE

Convert = Callable[..., SamplingParams]


@pytest.fixture
def convert(model: LoadedModel) -> Convert:
    return lambda **fields: to_sampling_params(GenerationOptions(**fields), model, max_tokens=None)


def test_the_defaults_are_neutral(convert: Convert) -> None:
    assert convert() == SamplingParams()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"temperature": 0.7, "top_p": 0.9, "min_p": 0.1}, None),
        ({"presence_penalty": 1.0, "frequency_penalty": -1.0}, None),
        ({"repetition_penalty": 1.2, "repetition_penalty_range": 64}, None),
        ({"top_k": 40, "seed": 7}, None),
        ({"prompt_lookup_num_tokens": 10}, None),
        ({"top_k": -1}, {}),
        ({"seed": -1}, {}),
        ({"seed": 0}, {"seed": 0}),
        ({"seed": -2}, {"seed": 2**64 - 2}),
        ({"seed": -(2**63)}, {"seed": 2**63}),
        ({"stop_token_ids": [1, 2]}, {"stop_token_ids": (1, 2)}),
        ({"min_tokens": 5}, None),
        ({"typical_p": 0.5, "tfs": 0.9, "top_a": 0.2, "top_n_sigma": 1.5}, None),
        ({"smoothing_factor": 0.3, "smoothing_curve": 2.0}, None),
        (
            {"xtc_threshold": 0.2, "xtc_probability": 0.5},
            {
                "xtc_threshold": 0.2,
                "xtc_probability": 0.5,
                "xtc_protected_token_ids": (10, IM_END),
            },
        ),
        ({"xtc_threshold": 0.2}, None),
        ({"mirostat_mode": 2, "mirostat_tau": 4.0, "mirostat_eta": 0.2}, None),
        ({"encoder_repetition_penalty": 1.1, "no_repeat_ngram_size": 3}, None),
        (
            {"dry_multiplier": 0.8, "dry_base": 2.0, "dry_allowed_length": 3},
            {
                "dry_multiplier": 0.8,
                "dry_base": 2.0,
                "dry_allowed_length": 3,
                "dry_breaker_token_ids": frozenset(b'\n:"*'),
            },
        ),
        ({"adaptive_target": 0.3, "adaptive_decay": 0.5}, None),
        ({"adaptive_target": 0.0}, {}),
        ({"epsilon_cutoff": 3, "eta_cutoff": 30}, {"epsilon_cutoff": 3e-4, "eta_cutoff": 3e-3}),
        ({"dynatemp_low": 0.5, "dynatemp_high": 2}, {}),
        (
            {"dynamic_temperature": True, "dynatemp_low": 0, "dynatemp_high": 2},
            {"dynamic_temperature": (1e-5, 2.0, 1.0)},
        ),
        ({"ban_eos_token": True}, {"ban_eos": True}),
        ({"ignore_eos": True}, {"ignore_eos": True}),
        ({"logit_bias": {"5": 1.5, "3": -2}}, {"logit_bias": ((3, -2.0), (5, 1.5))}),
        ({"logit_bias": {"5": -100}}, {"logit_bias": ((5, -math.inf),)}),
        (
            {"custom_token_bans": "7, 5", "logit_bias": {"5": 3}},
            {"logit_bias": ((5, -math.inf), (7, -math.inf))},
        ),
        (
            {"logit_bias": {"5": 100, "3": 100, "4": -100}},
            {"allowed_token_ids": (3, 5), "logit_bias": ((4, -math.inf),)},
        ),
        ({"allowed_token_ids": [5, 3, 5]}, {"allowed_token_ids": (3, 5)}),
        (
            {"allowed_token_ids": [5, 3], "logit_bias": {"3": 100, "9": 100}},
            {"allowed_token_ids": (3,)},
        ),
        ({"do_sample": False, "temperature": 0.8}, {"temperature": 0.0}),
        ({"top_p": 0.0}, {"temperature": 0.0}),
        ({"temperature": 1e-30}, {"temperature": 0.0}),
    ],
)
def test_wire_names_become_engine_names(
    convert: Convert, fields: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    assert convert(**fields) == SamplingParams(**(fields if expected is None else expected))


def test_max_tokens() -> None:
    assert to_max_tokens(GenerationOptions()) is None
    assert to_max_tokens(GenerationOptions(max_tokens=5)) == 5
    assert to_max_tokens(GenerationOptions(max_tokens=5, max_completion_tokens=0)) == 0


@pytest.mark.parametrize(
    ("breakers", "expected"),
    [
        (["x"], {ord("x"), END_OF_TEXT}),  # <|endoftext|> has one too
        (["ab"], {ord("b")}),  # no token has both
        ('"ab", "\\n"', {ord("b"), 10}),
        ('["|"]', {ord("|"), END_OF_TEXT, IM_START, IM_END}),
        ("", set()),
    ],
)
def test_dry_breakers_become_tokens(convert: Convert, breakers: Any, expected: set[int]) -> None:
    params = convert(dry_multiplier=1.0, dry_sequence_breakers=breakers)
    assert params.dry_breaker_token_ids == expected


def test_every_step_can_be_named() -> None:
    assert get_args(SamplerName) == tuple(SamplerStep)


@pytest.mark.parametrize(
    "priority",
    [
        ["min_p", "temperature"],
        '["min_p", "temperature"]',
        "min_p, temperature",
        "min_p\ntemperature\n",
    ],
)
def test_steps_that_are_named_come_last(convert: Convert, priority: Any) -> None:
    order = convert(sampler_priority=priority).sampler_order
    assert order[-2:] == (SamplerStep.MIN_P, SamplerStep.TEMPERATURE)
    others = [step for step in DEFAULT_SAMPLER_ORDER if step not in order[-2:]]
    assert list(order[:-2]) == others


def test_temperature_last(convert: Convert) -> None:
    order = convert(temperature_last=True).sampler_order
    assert order[-3:] == ("temperature", "dynamic_temperature", "quadratic_sampling")
    assert sorted(order) == sorted(DEFAULT_SAMPLER_ORDER)
    order = convert(temperature_last=True, sampler_priority="quadratic_sampling, temperature, tfs")
    assert order.sampler_order[-4:] == (
        "tfs",
        "dynamic_temperature",
        "quadratic_sampling",
        "temperature",
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": [5], "custom_token_bans": "5"},
        {"allowed_token_ids": [5], "logit_bias": {"6": 100}},
        {"allowed_token_ids": [IM_END], "ban_eos_token": True},
        {"allowed_token_ids": [IM_END, 5], "min_tokens": 1, "stop_token_ids": [5]},
        {"logit_bias": {str(token_id): -100 for token_id in range(VOCAB_SIZE)}},
        {"custom_token_bans": ",".join(map(str, range(IM_END))), "ban_eos_token": True},
    ],
)
def test_some_token_must_be_left(convert: Convert, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="No token is left") as error:
        convert(**fields)
    assert error.value.param == next(iter(fields))
