"""Guidance, beam search and contrastive search through HTTP, with a tiny model that is real."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import anyio
import httpx
import pytest
from transformers import PreTrainedModel

from modules.engine.async_engine import AsyncEngine
from modules.engine.contrastive_search import ContrastiveOptions
from modules.engine.engine import Engine, EngineConfig
from modules.loaded_model import LoadedModel
from tests.engine.conftest import CONFIGS, build_model
from tests.engine.test_contrastive_search import search_by_definition
from tests.engine.test_engine import generate
from tests.engine.test_guidance import generate_guided
from tests.fakes import VOCAB_SIZE, FakeEngine, FakeModelManager, build_tokenizer
from tests.fakes import build_model as build_loaded_model
from tests.openai.assertions import assert_error_shape, read_events

PROMPT = "Once upon a time"
NUM_TOKENS = 10


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    config = copy.deepcopy(CONFIGS["llama"])
    config.vocab_size = VOCAB_SIZE
    return build_model("tiny", {"tiny": config})


@pytest.fixture(scope="module")
def loaded(reference: PreTrainedModel) -> Iterator[LoadedModel]:
    config = EngineConfig(max_model_len=256, num_cache_tokens=512)
    engine = Engine(copy.deepcopy(reference), config)
    model = build_loaded_model(FakeEngine(), build_tokenizer())
    bridge = AsyncEngine(engine)
    yield replace(model, engine=bridge, max_model_len=256, max_guided_len=engine.max_guided_len)
    bridge.stop()


@pytest.fixture
def manager(loaded: LoadedModel) -> FakeModelManager:
    return FakeModelManager(loaded)


pytestmark = pytest.mark.anyio


async def complete(client: httpx.AsyncClient, **fields: Any) -> list[str]:
    body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "do_sample": False, **fields}
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return [choice["text"] for choice in response.json()["choices"]]


async def test_guidance(
    client: httpx.AsyncClient, loaded: LoadedModel, reference: PreTrainedModel
) -> None:
    prompt, negative = list(PROMPT.encode()), list(b"Never")
    for scale in (1.5, 0.5):
        expected = generate_guided(reference, prompt, negative, scale, max_new_tokens=NUM_TOKENS)
        fields = {"guidance_scale": scale, "negative_prompt": "Never"}
        assert await complete(client, **fields) == [loaded.decode(expected, True)]
    last = generate_guided(reference, prompt, prompt[-1:], 1.5, max_new_tokens=NUM_TOKENS)
    assert await complete(client, guidance_scale=1.5) == [loaded.decode(last, True)]
    plain = generate(reference, prompt, max_new_tokens=NUM_TOKENS)
    assert await complete(client, negative_prompt="Never") == [loaded.decode(plain, True)]
    assert plain != expected != last


async def test_guidance_in_logits(client: httpx.AsyncClient) -> None:
    async def look(**fields: Any) -> dict[str, float]:
        body = {"prompt": PROMPT, "guidance_scale": 3.0, "negative_prompt": "Never", **fields}
        response = await client.post("/v1/internal/logits", json=body)
        assert response.status_code == 200, response.text
        found: dict[str, float] = response.json()
        return found

    plain = await look(use_samplers=True, guidance_scale=1.0)
    assert await look(use_samplers=False) == plain != await look(use_samplers=True)


async def test_guidance_in_chat(client: httpx.AsyncClient) -> None:
    texts = set()
    for negative in ("Never", "Always", ""):
        body = {
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": NUM_TOKENS,
            "temperature": 0,
            "guidance_scale": 3.0,
            "negative_prompt": negative,
        }
        response = await client.post("/v1/chat/completions", json=body)
        texts.add(response.json()["choices"][0]["message"]["content"])
    assert len(texts) == 3


async def test_beams(
    client: httpx.AsyncClient, loaded: LoadedModel, reference: PreTrainedModel
) -> None:
    prompt = list(PROMPT.encode())
    ends = (generate(reference, prompt)[3], 7)
    texts = set()
    for penalty in (-2.0, 2.0):
        for stops_early in (False, True):
            expected = generate(
                reference,
                prompt,
                max_new_tokens=NUM_TOKENS,
                num_beams=4,
                length_penalty=penalty,
                early_stopping=stops_early,
                eos_token_id=list(ends),
            )
            text = loaded.decode([i for i in expected if i not in (*ends, 0)], True)
            fields = {"length_penalty": penalty, "early_stopping": stops_early}
            found = await complete(client, num_beams=4, stop_token_ids=ends, **fields)
            assert found == [text]
            texts.add(text)
    assert len(texts) > 1


async def test_choices_are_the_best_beams_of_each_prompt(client: httpx.AsyncClient) -> None:
    both = await complete(client, prompt=[PROMPT, "Never"], num_beams=3, n=2)
    assert len({*both}) == 4
    one = await complete(client, prompt="Never", num_beams=3, n=3)
    assert one[:2] == both[2:]


async def test_contrastive_search(
    client: httpx.AsyncClient, loaded: LoadedModel, reference: PreTrainedModel
) -> None:
    prompt = list(PROMPT.encode())
    options = ContrastiveOptions(penalty_alpha=0.6, top_k=4)
    expected = loaded.decode(search_by_definition(reference, prompt, NUM_TOKENS, options), True)
    fields = {"penalty_alpha": 0.6, "top_k": 4}
    assert await complete(client, n=2, **fields) == [expected] * 2
    assert await complete(client) != [expected]
    by_preset = await complete(client, preset="Contrastive Search", penalty_alpha=0.6)
    assert by_preset == [expected]


async def test_a_stop_string_ends_a_search(client: httpx.AsyncClient) -> None:
    for fields in ({"penalty_alpha": 0.6, "top_k": 4}, {"num_beams": 3}):
        (text,) = await complete(client, **fields)
        (stopped,) = await complete(client, stop=text[3], **fields)
        assert stopped == text[: text.index(text[3])]


@pytest.mark.parametrize("fields", [{"num_beams": 3}, {"penalty_alpha": 0.6, "top_k": 4}])
async def test_streams_say_the_same(client: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    (whole,) = await complete(client, **fields)
    body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "do_sample": False, "stream": True}
    response = await client.post("/v1/completions", json={**body, **fields})
    *events, done = read_events(response.text)
    assert done == "[DONE]"
    choices = [choice for event in events for choice in event["choices"]]
    assert "".join(choice["text"] for choice in choices) == whole
    assert choices[-1]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 1000}, "num_beams"),
        ({"num_beams": 2, "n": 3}, "n"),
        ({"num_beams": 2, "echo": True, "logprobs": 1}, "echo"),
        ({"num_beams": 2, "best_of": 3}, "best_of"),
        ({"num_beams": 2, "penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
        ({"penalty_alpha": 0.6, "top_k": 1}, "penalty_alpha"),
        ({"penalty_alpha": 0.6, "top_k": 4, "do_sample": True}, "penalty_alpha"),
        ({"penalty_alpha": 0.6, "top_k": 65}, "top_k"),
        ({"penalty_alpha": 1.5}, "penalty_alpha"),
        ({"early_stopping": "never"}, "early_stopping"),
        ({"length_penalty": "long"}, "length_penalty"),
        ({"guidance_scale": "much"}, "guidance_scale"),
        ({"guidance_scale": 2, "negative_prompt": 5}, "negative_prompt"),
        ({"guidance_scale": 2, "negative_prompt": "n" * 300}, "negative_prompt"),
    ],
)
async def test_what_makes_no_sense_is_refused(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    body = {"prompt": PROMPT, "do_sample": False, **fields}
    response = await client.post("/v1/completions", json=body)
    code = "context_length_exceeded" if len(str(fields)) > 300 else None
    assert_error_shape(response, 400, param=param, code=code)


async def test_a_guided_search_ends_where_its_pair_fills_the_context(
    client, manager, reference
) -> None:
    """Its own engine: each of two has half of the cache."""
    config = EngineConfig(max_model_len=256, num_cache_tokens=256)
    engine = Engine(copy.deepcopy(reference), config)
    bridge = AsyncEngine(engine)
    manager.model = replace(
        manager.model, engine=bridge, max_model_len=256, max_guided_len=engine.max_guided_len
    )
    fields = {"guidance_scale": 2.0, "num_beams": 2, "max_tokens": 250}
    try:
        for negative in ("bad", "bad " * 30):
            body = {"prompt": PROMPT, "do_sample": False, "negative_prompt": negative, **fields}
            with anyio.fail_after(60):
                response = await client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            num_longest = max(len(PROMPT), len(negative))
            assert response.json()["usage"]["completion_tokens"] == 128 - num_longest
    finally:
        bridge.stop()
