from __future__ import annotations

from typing import Any

import pytest

from extensions.openai.sampling import to_max_tokens, to_sampling_params
from extensions.openai.typing import GenerationOptions
from modules.engine.sampling_params import SamplingParams


def convert(**fields: Any) -> SamplingParams:
    return to_sampling_params(GenerationOptions(**fields), max_tokens=None)


def test_the_defaults_are_neutral() -> None:
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
        ({"ban_eos_token": True}, {"ignore_eos": True}),
        ({"ignore_eos": True}, {"ignore_eos": True}),
        ({"do_sample": False, "temperature": 0.8}, {"temperature": 0.0}),
        ({"top_p": 0.0}, {"temperature": 0.0}),
        ({"temperature": 1e-30}, {"temperature": 0.0}),
    ],
)
def test_wire_names_become_engine_names(
    fields: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    assert convert(**fields) == SamplingParams(**(fields if expected is None else expected))


def test_max_tokens() -> None:
    assert to_max_tokens(GenerationOptions()) is None
    assert to_max_tokens(GenerationOptions(max_tokens=5)) == 5
    assert to_max_tokens(GenerationOptions(max_tokens=5, max_completion_tokens=0)) == 0
