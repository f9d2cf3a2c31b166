from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from extensions.openai.sampling import (
    fill_from_preset,
    to_max_tokens,
    to_sampling_params,
    to_truncation,
)
from extensions.openai.typing import (
    CompletionRequest,
    GenerationOptions,
    SamplerName,
)
from modules.engine.sampling_params import DEFAULT_SAMPLER_ORDER, SamplerStep, SamplingParams
from modules.errors import InvalidRequestError
from modules.loaded_model import LoadedModel
from modules.presets import list_presets
from modules.prompt_tokens import Truncation
from modules.settings import PROJECT_ROOT
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
            {"dynamic_temperature": (0.0, 2.0, 1.0)},
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
        {"stop_token_ids": list(range(VOCAB_SIZE)), "min_length": 1},
    ],
)
def test_some_token_must_be_left(convert: Convert, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="No token is left") as error:
        convert(**fields)
    assert error.value.param == next(iter(fields))


def test_truncation(model: LoadedModel) -> None:
    def convert(max_tokens: int | None, /, **fields: Any) -> Truncation | None:
        return to_truncation(GenerationOptions(**fields), model, max_tokens)

    assert convert(16) is None
    assert convert(16, truncation_length=100) == Truncation(100, 16)
    assert convert(0, truncation_length=100) == Truncation(100, 1)
    assert convert(16, truncation_length=10**9) == Truncation(model.max_model_len, 16)
    assert convert(None, truncation_length=100) == Truncation(100, 50)
    assert convert(None, truncation_length=10**9) == Truncation(model.max_model_len, 512)
    for fields, param in (
        ({"max_tokens": 100}, "max_tokens"),
        ({"max_completion_tokens": 100}, "max_completion_tokens"),
    ):
        with pytest.raises(InvalidRequestError, match="100 tokens leaves no room") as error:
            convert(100, truncation_length=100, **fields)
        assert error.value.param == param


def test_until_the_context_is_full(model: LoadedModel) -> None:
    options = GenerationOptions(max_tokens=5, auto_max_new_tokens=True)
    assert to_sampling_params(options, model, max_tokens=5).max_tokens is None


# Presets


def write_preset(root: Path, text: str) -> None:
    (root / "presets").mkdir(exist_ok=True)
    (root / "presets" / "mine.yaml").write_text(text)


def test_a_preset_fills_what_the_request_leaves_out(tmp_path: Path) -> None:
    write_preset(tmp_path, "temperature: 0.5\ntop_k: 7\nmin_p: 0.1\nxtc_threshold: null\n")
    options = GenerationOptions(preset="mine", top_k=0, min_p=None, top_p=0.9)
    filled = fill_from_preset(options, tmp_path)
    assert (filled.temperature, filled.top_k, filled.min_p, filled.top_p) == (0.5, 0, 0.1, 0.9)
    assert filled.xtc_threshold == 0.1
    assert options.temperature == 1.0


def test_a_preset_keeps_its_request_what_it_is(tmp_path: Path) -> None:
    write_preset(tmp_path, "temperature: 0.5")
    options = CompletionRequest(prompt="a", preset="mine", echo=True)
    filled = fill_from_preset(options, tmp_path)
    assert isinstance(filled, CompletionRequest) and filled.echo
    assert fill_from_preset(CompletionRequest(prompt="a"), tmp_path).temperature == 1.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("temperature: -1", "'mine' cannot be used: temperature: "),
        ("temperature: .nan", "'mine' cannot be used: temperature: "),
        ("top_k: '5'", "'mine' cannot be used: top_k: "),
        ("sampler_priority: [nope]", "'mine' cannot be used: sampler_priority: "),
        ("temprature: 1", "'mine' cannot be used: temprature: There is no such parameter"),
        ("seed: 5", "'mine' cannot be used: seed: "),
        ("5: 5", "'mine' cannot be used: 5: "),
        ("- temperature", "'mine' holds no parameters"),
        ("a: [", "mine.yaml cannot be used: line "),
    ],
)
def test_a_bad_preset_is_named_with_its_key(tmp_path: Path, text: str, words: str) -> None:
    write_preset(tmp_path, text)
    with pytest.raises(InvalidRequestError, match=re.escape(words)) as error:
        fill_from_preset(GenerationOptions(preset="mine"), tmp_path)
    assert error.value.param == "preset"


def test_an_empty_preset(tmp_path: Path) -> None:
    write_preset(tmp_path, "# nothing yet")
    options = GenerationOptions(preset="mine")
    assert fill_from_preset(options, tmp_path) == options


@pytest.mark.parametrize("name", list_presets(PROJECT_ROOT))
def test_the_presets_that_come_along(name: str) -> None:
    options = GenerationOptions(preset=name)
    filled = fill_from_preset(options, PROJECT_ROOT)
    assert filled.model_dump() != options.model_dump() or name == "Null preset"
