"""What each sampling parameter does to what comes next, through HTTP, with a tiny, real model.

The distributions come from /v1/internal/logits, which runs the real chain of a request; what a
parameter is worth only after some tokens is seen in completions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import httpx
import numpy as np
import pytest

from modules.engine.engine import EngineConfig
from modules.loaded_model import LoadedModel
from tests.fakes import (
    IM_END,
    VOCAB_SIZE,
    FakeEngine,
    FakeModelManager,
    build_model,
    build_tokenizer,
)
from tests.openai.tiny import start_tiny_engine

pytestmark = pytest.mark.anyio

PROMPT = "abc abd abc ab"


@pytest.fixture(scope="module")
def loaded() -> Iterator[LoadedModel]:
    eos = frozenset({IM_END})
    config = EngineConfig(max_model_len=256, num_cache_tokens=1024, eos_token_ids=eos)
    engine = start_tiny_engine(config)
    yield replace(build_model(FakeEngine(), build_tokenizer()), engine=engine, max_model_len=256)
    engine.stop()


@pytest.fixture
def manager(loaded: LoadedModel) -> FakeModelManager:
    return FakeModelManager(loaded)


async def look(client: httpx.AsyncClient, **wishes: Any) -> dict[str, float]:
    """Probabilities of all tokens after the prompt."""
    body = {"prompt": PROMPT, "use_samplers": True, "top_logits": VOCAB_SIZE, **wishes}
    response = await client.post("/v1/internal/logits", json=body)
    assert response.status_code == 200, response.text
    probs: dict[str, float] = response.json()
    return probs


def alive(probs: dict[str, float]) -> set[str]:
    return {piece for piece, prob in probs.items() if prob > 0}


def entropy(probs: dict[str, float]) -> float:
    values = np.array([prob for prob in probs.values() if prob > 0])
    return float(-(values * np.log(values)).sum())


def is_head(after: dict[str, float], plain: dict[str, float]) -> bool:
    """Only the likeliest tokens are left, and fewer than before."""
    return alive(after) == set(list(plain)[: len(alive(after))]) and len(alive(after)) < len(plain)


def top(probs: dict[str, float]) -> str:
    return next(iter(probs))


FILTERS: list[dict[str, Any]] = [
    {"top_k": 7},
    {"top_p": 0.6},
    {"min_p": 0.05},
    {"tfs": 0.8},
    {"top_a": 0.2},
    {"epsilon_cutoff": 90},
    {"eta_cutoff": 90},
    {"top_n_sigma": 1.2},
    {"mirostat_mode": 1, "mirostat_tau": 1.5},
    {"mirostat_mode": 2, "mirostat_tau": 1.5},
]


@pytest.mark.parametrize("wishes", FILTERS, ids=str)
async def test_filters_leave_the_likeliest(client: httpx.AsyncClient, wishes) -> None:
    plain = await look(client)
    assert is_head(await look(client, **wishes), plain)


async def test_typical_p_may_leave_the_likeliest_out(client: httpx.AsyncClient) -> None:
    plain = await look(client)
    after = await look(client, typical_p=0.3)
    assert alive(after) < alive(plain)
    middle = [piece for piece in plain if after[piece] > 0]
    assert sum(plain[piece] for piece in middle) == pytest.approx(0.3, abs=0.1)


async def test_xtc_leaves_the_least_of_the_top_choices(client: httpx.AsyncClient) -> None:
    plain = await look(client)
    choices = [piece for piece in plain if plain[piece] >= 0.02]
    after = await look(client, xtc_probability=1, xtc_threshold=0.02)
    assert len(choices) > 1
    assert alive(plain) - alive(after) == set(choices[:-1])
    assert await look(client, xtc_probability=1, xtc_threshold=1) == plain


SHAPES: list[tuple[dict[str, Any], Callable[[float, float], bool]]] = [
    ({"temperature": 2.0}, float.__gt__),
    ({"temperature": 0.5}, float.__lt__),
    ({"dynamic_temperature": True, "dynatemp_low": 1.5, "dynatemp_high": 3}, float.__gt__),
    ({"dynamic_temperature": True, "dynatemp_low": 0.1, "dynatemp_high": 0.9}, float.__lt__),
    ({"smoothing_factor": 2.0}, float.__lt__),
]


@pytest.mark.parametrize(("wishes", "compare"), SHAPES, ids=str)
async def test_shapes_keep_the_order(client: httpx.AsyncClient, wishes, compare) -> None:
    plain = await look(client)
    after = await look(client, **wishes)
    assert top(after) == top(plain)
    assert compare(entropy(after), entropy(plain))


async def test_dynatemp_exponent_and_smoothing_curve(client: httpx.AsyncClient) -> None:
    spread = {"dynamic_temperature": True, "dynatemp_low": 0.2, "dynatemp_high": 3}
    low, high = [await look(client, **spread, dynatemp_exponent=e) for e in (4.0, 0.25)]
    assert entropy(low) < entropy(high)
    flat, steep = [await look(client, smoothing_factor=0.5, smoothing_curve=c) for c in (1, 3)]
    assert flat != steep
    assert top(flat) == top(steep)


async def test_adaptive_target_prefers_its_probability(client: httpx.AsyncClient) -> None:
    plain = await look(client)
    low, high = [await look(client, adaptive_target=t) for t in (0.01, 0.9)]
    assert top(high) == top(plain)
    assert plain[top(low)] < plain[top(plain)]


async def test_penalties_on_the_prompt(client: httpx.AsyncClient) -> None:
    plain = await look(client)
    seen = [piece for piece in plain if piece in set("abcdĠ")]
    after = await look(client, repetition_penalty=1.8)
    assert sum(after[p] for p in seen) < sum(plain[p] for p in seen)
    near = await look(client, repetition_penalty=1.8, repetition_penalty_range=1)
    assert near["c"] / near["d"] == pytest.approx(plain["c"] / plain["d"], rel=1e-3)
    assert near["b"] / near["c"] < plain["b"] / plain["c"]
    favoured = await look(client, encoder_repetition_penalty=1.8)
    assert sum(favoured[p] for p in seen) > sum(plain[p] for p in seen)


async def test_repetitions_of_the_prompt(client: httpx.AsyncClient) -> None:
    """After "ab", the prompt has gone on with c and with d."""
    plain = await look(client)
    once = await look(client, no_repeat_ngram_size=3)
    assert alive(plain) - alive(once) == {"c", "d"}
    ratio = plain["c"] / plain["x"]
    dry = await look(client, dry_multiplier=0.8, dry_allowed_length=1, dry_base=2)
    # " ab" is repeated: three tokens, two longer than what is allowed
    assert dry["c"] / dry["x"] == pytest.approx(ratio * np.exp(-0.8 * 2**2), rel=1e-3)
    patient = await look(client, dry_multiplier=0.8, dry_allowed_length=4)
    assert patient["c"] / patient["x"] == pytest.approx(ratio, rel=1e-3)
    broken = await look(
        client, dry_multiplier=0.8, dry_allowed_length=1, dry_base=2, dry_sequence_breakers=["a"]
    )
    assert broken["c"] / broken["x"] == pytest.approx(ratio * np.exp(-0.8), rel=1e-3)


async def test_single_tokens(client: httpx.AsyncClient) -> None:
    plain = await look(client)
    x, y = str(ord("x")), str(ord("y"))
    biased = await look(client, logit_bias={x: 2.5, y: -100})
    assert biased["x"] / biased["z"] == pytest.approx(
        plain["x"] / plain["z"] * np.exp(2.5), rel=1e-3
    )
    assert biased["y"] == 0
    assert alive(await look(client, logit_bias={x: 100})) == {"x"}
    assert alive(await look(client, allowed_token_ids=[int(x), int(y)])) == {"x", "y"}
    assert (await look(client, custom_token_bans=f"{x}, {y}"))["x"] == 0
    assert plain["<|im_end|>"] > 0
    for wish in ({"ban_eos_token": True}, {"min_length": 100}, {"min_tokens": 1}):
        assert (await look(client, **wish))["<|im_end|>"] == 0
    assert (await look(client, ignore_eos=True)) == plain


async def test_greedy_is_sure(client: httpx.AsyncClient) -> None:
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    texts = [await complete(client, **body, **more) for more in ({}, {"top_k": 5}, {"seed": 3})]
    texts.append(await complete(client, prompt=PROMPT, max_tokens=12, do_sample=False))
    assert len(set(texts)) == 1


async def test_order(client: httpx.AsyncClient) -> None:
    wishes = {"temperature": 3.0, "min_p": 0.2}
    usual = await look(client, **wishes)
    for late in (
        {"temperature_last": True},
        {"sampler_priority": ["min_p", "temperature"]},
        {"sampler_priority": "min_p\ntemperature"},
        {"sampler_priority": "min_p, temperature"},
    ):
        assert alive(await look(client, **wishes, **late)) < alive(usual)


async def complete(client: httpx.AsyncClient, **body: Any) -> str:
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


async def test_counts_of_what_was_generated(client: httpx.AsyncClient) -> None:
    body = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0, "ban_eos_token": True}
    plain = await complete(client, **body)
    for penalty in ("presence_penalty", "frequency_penalty"):
        text = await complete(client, **body, **{penalty: 50})
        assert len(set(text)) > len(set(plain))


async def test_no_ngram_comes_twice(client: httpx.AsyncClient) -> None:
    body = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0, "ban_eos_token": True}
    for size, has_twice in ((0, True), (2, False)):
        response = await client.post(
            "/v1/completions", json={**body, "no_repeat_ngram_size": size, "logprobs": 0}
        )
        tokens = response.json()["choices"][0]["logprobs"]["tokens"]
        pairs = list(pairwise(tokens))
        assert (len(pairs) > len(set(pairs))) == has_twice


@pytest.mark.parametrize("mode", [1, 2])
async def test_mirostat_learns(client: httpx.AsyncClient, mode) -> None:
    texts = [
        await complete(
            client,
            prompt=PROMPT,
            max_tokens=40,
            seed=1,
            mirostat_mode=mode,
            mirostat_tau=3.0,
            mirostat_eta=eta,
        )
        for eta in (0.0, 1.0)
    ]
    assert texts[0] != texts[1]


async def test_adaptive_decay_counts(client: httpx.AsyncClient) -> None:
    texts = [
        await complete(
            client, prompt=PROMPT, max_tokens=40, seed=1, adaptive_target=0.3, adaptive_decay=decay
        )
        for decay in (0.0, 0.95)
    ]
    assert texts[0] != texts[1]


async def test_seeds(client: httpx.AsyncClient) -> None:
    body = {"prompt": PROMPT, "max_tokens": 30, "ban_eos_token": True}
    same = [await complete(client, **body, seed=7) for _ in range(2)]
    assert same[0] == same[1]
    assert await complete(client, **body, seed=8) != same[0]
    assert await complete(client, **body) != await complete(client, **body)
    response = await client.post("/v1/completions", json={**body, "seed": 7, "n": 3})
    texts = [choice["text"] for choice in response.json()["choices"]]
    assert texts[0] == same[0]
    assert texts[1] == await complete(client, **body, seed=8)
    assert len(set(texts)) == 3
