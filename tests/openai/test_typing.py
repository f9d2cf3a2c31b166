"""The wire schema: ranges, types, nulls, refused fields, and what /docs shows of it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from extensions.openai.typing import REFUSED_FIELDS, _is_neutral
from tests.fakes import VOCAB_SIZE, FakeEngine
from tests.openai.assertions import MESSAGES, assert_error_shape

pytestmark = pytest.mark.anyio

BAD_VALUES = {
    "temperature": [-0.1, True, "1", 1e9, [], 1e999],
    "top_p": [-0.1, 1.1, True, "x"],
    "min_p": [-0.1, 1.1, False],
    "top_k": [-2, 1.5, "5", True, 2**31, 10**4000, 1e300],
    "presence_penalty": [1e9, -1e9, "0", True],
    "frequency_penalty": [1e9, True],
    "repetition_penalty": [0, -1, True, 1e9],
    "repetition_penalty_range": [-1, 2.5, 2**31],
    "prompt_lookup_num_tokens": [-1, 2.5, True, 2**31],
    "n": [0, -1, 129, 1.5, True, "2"],
    "best_of": [0, 129, 2**70],
    "max_tokens": [-1, 1.5, True, "16", 2**31],
    "max_completion_tokens": [-1, True, 2**31],
    "seed": [1.5, "7", True, 2**63, -(2**63) - 1],
    "stop": [5, True, {"a": 1}, ["a"] * 65, "a" * 1001, ["a", "b" * 1001]],
    "stop_token_ids": [5, "a", [1] * 1025, [VOCAB_SIZE]],
    "min_tokens": [-1, 1.5, True, "1", 2**31],
    "dynamic_temperature": [1, "true"],
    "dynatemp_low": [-0.1, 1e9, 1e999, True, "1"],
    "dynatemp_high": [-0.1, 1e9, 1e999, True],
    "dynatemp_exponent": [-0.1, 1e9, 1e999, True],
    "temperature_last": [1, "true"],
    "smoothing_factor": [-0.1, 1e9, 1e999, True],
    "smoothing_curve": [0.9, 1e9, 1e999, True],
    "typical_p": [-0.1, 1.1, True, "x"],
    "tfs": [-0.1, 1.1, True, 1e999],
    "top_a": [-0.1, 1.1, True, 1e999],
    "epsilon_cutoff": [-0.1, 10001, True, 1e999],
    "eta_cutoff": [-0.1, 10001, True, 1e999],
    "top_n_sigma": [-0.1, 1e9, True, 1e999],
    "xtc_threshold": [-0.1, 1.1, True],
    "xtc_probability": [-0.1, 1.1, True],
    "adaptive_target": [-0.1, 1.1, True, 1e999],
    "adaptive_decay": [-0.1, 1, True, 1e999],
    "mirostat_mode": [-1, 3, 1.5, True, "2"],
    "mirostat_tau": [-0.1, 1e9, True, 1e999],
    "mirostat_eta": [-0.1, 1.1, True],
    "encoder_repetition_penalty": [0, -1, 1e9, True, 1e999],
    "no_repeat_ngram_size": [-1, 2.5, True, 2**31],
    "dry_multiplier": [-0.1, 1e9, True, 1e999],
    "dry_base": [0.9, 1e9, True, 1e999],
    "dry_allowed_length": [-1, 2.5, True, 2**31],
    "dry_sequence_breakers": [5, "\n,:", '["a"', "[" * 9999, ["a"] * 65],
    "sampler_priority": [5, {"a": 1}, "top_k, top_k", ["top_k", "top_k"]],
    "min_length": [-1, 2.5, True, 2**31],
    "guidance_scale": [1e9, -1e9, True, 1e999],
    "penalty_alpha": [-0.1, 1.1, True],
    "num_beams": [0, 65, 1.5, True, "2"],
    "length_penalty": [1e9, -1e9, True, 1e999],
    "early_stopping": [1, "true"],
    "negative_prompt": [5, ["a"]],
    "logit_bias": [[], "1", {"a": 1}, {"-1": 1}, {"01": 1}, {"1.0": 1}, {str(VOCAB_SIZE): 1}],
    "custom_token_bans": [5, [5], "a", "1;2", "-1", "1.5", str(VOCAB_SIZE), "9" * 5000],
    "allowed_token_ids": [5, "5", [], [VOCAB_SIZE]],
    "ignore_eos": ["false"],
    "preset": [5, ["a"], "no such preset", "../settings"],
    "truncation_length": [-1, 2.5, True, 2**31],
    "max_tokens_second": [-1, 2.5, True, 2**31],
    "auto_max_new_tokens": [1, "true"],
    "add_bos_token": [0, "false"],
    "suffix": [5, ["a"]],
    "token_healing": [1, "true"],
    "prompt": [[2**31], [-(2**31)], [[1], [10**4000]]],
    "stream": [1, "true"],
    "do_sample": [1],
    "ban_eos_token": ["false"],
    "skip_special_tokens": [0],
    "stream_options": [5, True],
    "model": [5],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD_VALUES.items() for value in values]
)
async def test_bad_values_are_named(client: httpx.AsyncClient, field: str, value: Any) -> None:
    content = json.dumps({"prompt": "a", field: value}).replace("Infinity", "1e999")
    response = await client.post("/v1/completions", content=content)
    message = assert_error_shape(response, 400, param=field)
    assert f"'{field}'" in message or (field == "preset" and "Known: Big O, " in message)


async def test_the_path_to_a_value_is_named(client: httpx.AsyncClient) -> None:
    for body, param in (
        ({"stop": ["a", 5]}, "stop[1]"),
        ({"stop_token_ids": [1, "a"]}, "stop_token_ids[1]"),
        ({"stop_token_ids": [0, -1]}, "stop_token_ids[1]"),
        ({"stop_token_ids": [2**31]}, "stop_token_ids[0]"),
        ({"allowed_token_ids": [1, "a"]}, "allowed_token_ids[1]"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"5": True}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(2**18 + 1)}}, "logit_bias"),
        ({"custom_token_bans": "1," * (2**18 + 1)}, "custom_token_bans"),
        ({"dry_sequence_breakers": ["a", ""]}, "dry_sequence_breakers[1]"),
        ({"dry_sequence_breakers": '"a", 5'}, "dry_sequence_breakers[1]"),
        ({"sampler_priority": ["top_k", "nope"]}, "sampler_priority[1]"),
        ({"sampler_priority": "top_k\nnope"}, "sampler_priority[1]"),
        ({"sampler_priority": '["top_k", 1]'}, "sampler_priority[1]"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    ):
        response = await client.post("/v1/completions", json={"prompt": "a", **body})
        assert_error_shape(response, 400, param=param)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"stop": 5}, "a string or a list of strings"),
        ({"stop": ["a"] * 65}, "at most 64 stop strings"),
        ({"stop": "a" * 1001}, "at most 1000 characters"),
        ({"stream_options": "x"}, "should be an object"),
        ({"messages": "x"}, "should be a list"),
        ({"stream": "yes"}, "should be true or false"),
        ({"top_k": "5"}, "should be an integer"),
        ({"top_k": 2**31}, "less than or equal to 2147483647"),
        ({"sampler_priority": "top_k, top_k"}, "top_k is there twice"),
        ({"custom_token_bans": "1, x"}, "whole numbers, not 'x'"),
        ({"logit_bias": {"999": 1}}, "vocabulary of 259"),
    ],
)
async def test_messages_say_what_is_right(
    client: httpx.AsyncClient, body: dict[str, Any], words: str
) -> None:
    response = await client.post("/v1/chat/completions", json={"messages": MESSAGES, **body})
    message = assert_error_shape(response, 400, param=next(iter(body)))
    assert words in message


@pytest.mark.parametrize(
    "body",
    [
        {"temperature": 0},
        {"temperature": 5},
        {"top_p": 0},
        {"top_k": -1},
        {"min_p": 1},
        {"max_tokens": 3.0},
        {"max_tokens": 2**31 - 1},
        {"top_k": 2**31 - 1},
        {"presence_penalty": -5},
        {"repetition_penalty": 0.5},
        {"dynatemp_low": 2, "dynatemp_high": 0, "dynatemp_exponent": 0},
        {"typical_p": 0, "tfs": 0, "top_a": 1, "epsilon_cutoff": 10_000, "eta_cutoff": 9},
        {"smoothing_curve": 10, "top_n_sigma": 1, "mirostat_mode": 2.0, "mirostat_tau": 0},
        {"dry_sequence_breakers": "", "sampler_priority": "", "custom_token_bans": " 1, 2,"},
        {"logit_bias": {"0": -100, "258": 100}},
        {"min_tokens": 100, "min_length": 2**31 - 1},
        {"seed": -1},
        {"seed": 2**62},
        {"stop": []},
        {"stop": ""},
        {"stop": ["a" * 1000] * 64},
        {"user": "me", "model": "gpt-3.5-turbo", "metadata": {"a": "b"}, "no_such_field": [1]},
        dict.fromkeys([*BAD_VALUES.keys() - {"prompt"}, *REFUSED_FIELDS, "echo", "user"]),
    ],
)
async def test_good_values(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    response = await client.post("/v1/completions", json={"prompt": "a", **body})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("field", REFUSED_FIELDS)
async def test_fields_that_do_not_work_yet(client: httpx.AsyncClient, field: str) -> None:
    for value in (None, *REFUSED_FIELDS[field]):
        response = await client.post("/v1/completions", json={"prompt": "a", field: value})
        assert response.status_code == 200, response.text
    response = await client.post("/v1/completions", json={"prompt": "a", field: {"x": 1}})
    assert "not supported yet" in assert_error_shape(response, 400, param=field)


def test_zero_is_not_false() -> None:
    assert _is_neutral(False, (False,))
    assert not _is_neutral(0, (False,))


async def test_null_is_the_default(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post("/v1/completions", json={"prompt": "a"})
    nulls = dict.fromkeys(BAD_VALUES.keys() - {"prompt"})
    await client.post("/v1/completions", json={"prompt": "a", **nulls})
    first, second = engine.requests
    assert first.params == second.params
