"""Conversations that grow, with a tiny, real model: what was computed for them is used again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import httpx
import pytest

from modules.engine.engine import EngineConfig
from modules.loaded_model import LoadedModel
from tests.fakes import (
    IM_END,
    FakeEngine,
    FakeModelManager,
    build_model,
    build_tokenizer,
)
from tests.openai.tiny import start_tiny_engine

pytestmark = pytest.mark.anyio

MAX_MODEL_LEN = 1024


@pytest.fixture
def loaded() -> Iterator[LoadedModel]:
    eos = frozenset({IM_END})
    config = EngineConfig(max_model_len=MAX_MODEL_LEN, num_cache_tokens=8192, eos_token_ids=eos)
    engine = start_tiny_engine(config)
    model = build_model(FakeEngine(), build_tokenizer())
    yield replace(model, engine=engine, max_model_len=MAX_MODEL_LEN)
    engine.stop()


@pytest.fixture
def manager(loaded: LoadedModel) -> FakeModelManager:
    return FakeModelManager(loaded)


async def grow(client: httpx.AsyncClient, num_turns: int) -> list[dict[str, int]]:
    """What each turn read, and found computed."""
    messages = [{"role": "system", "content": "Be brief."}]
    turns = []
    for turn in range(num_turns):
        messages.append({"role": "user", "content": f"Question {turn}".ljust(20, "?")})
        body = {"messages": messages, "max_tokens": 8, "temperature": 0}
        response = await client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        usage = response.json()["usage"]
        turns.append(
            {
                "read": usage["prompt_tokens"],
                "cached": usage["prompt_tokens_details"]["cached_tokens"],
                "dropped": usage.get("dropped_messages", 0),
            }
        )
        messages.append({"role": "assistant", "content": f"Answer {turn}".ljust(10, "!")})
    return turns


async def test_each_turn_finds_the_one_before_it(client: httpx.AsyncClient) -> None:
    turns = await grow(client, 10)
    assert not any(turn["dropped"] for turn in turns)
    assert turns[-1]["cached"] > turns[-3]["cached"] > turns[-6]["cached"] > 0
    for before, after in pairwise(turns):
        # All but the tokens of a block that is not full, and what is new.
        assert after["cached"] >= before["read"] - 64


async def test_it_does_so_when_turns_are_dropped(client: httpx.AsyncClient) -> None:
    turns = await grow(client, 40)
    pairs = [(before, after) for before, after in pairwise(turns) if after["dropped"]]
    assert len(pairs) > 12
    stays = [after for before, after in pairs if after["dropped"] == before["dropped"]]
    moves = [after for before, after in pairs if after["dropped"] != before["dropped"]]
    # A block holds four turns: when some have gone, nothing goes for a while.
    assert len(stays) >= 2 * len(moves)
    assert all(after["cached"] > after["read"] - 2 * 64 for after in stays)
