from __future__ import annotations

import json

import httpx
import pytest
from fastapi import FastAPI

from tests.conftest import AsgiCall, connect, wait_for
from tests.fakes import FakeEngine, FakeModelManager
from tests.openai.assertions import assert_error_shape

pytestmark = pytest.mark.anyio

PATH = "/v1/internal/health"


async def test_health(client: httpx.AsyncClient, manager: FakeModelManager) -> None:
    assert (await client.get(PATH)).json() == {"status": "ok", "model": "tiny"}
    manager.model = None
    assert (await client.get(PATH)).json() == {"status": "ok", "model": None}


async def test_health_of_a_dead_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.is_dead = True
    assert_error_shape(await client.get(PATH), 503, code="engine_dead")


async def test_model_info(client: httpx.AsyncClient, manager: FakeModelManager) -> None:
    path = "/v1/internal/model/info"
    template = {"name": "tiny", "source": "model", "reason": "it comes with the model"}
    assert (await client.get(path)).json() == {
        "model_name": "tiny",
        "lora_names": [],
        "chat_template": template,
        "models": [{"name": "tiny", "device": "cpu", "dtype": "float32", "max_model_len": 1024}],
        "asleep": [],
    }
    manager.model = None
    assert (await client.get(path)).json() == {
        "model_name": None,
        "lora_names": [],
        "chat_template": None,
        "models": [],
        "asleep": [],
    }


async def test_presets(client: httpx.AsyncClient) -> None:
    answer = (await client.get("/v1/internal/presets")).json()
    assert {"Big O", "simple-1", "Null preset"} <= set(answer["preset_names"])


async def test_stop_generation(app: FastAPI, engine: FakeEngine) -> None:
    """What was generated until then is the answer."""
    engine.enqueue("abc", blocks=True)
    call = AsgiCall(app, "/v1/completions", {"prompt": "a", "stop": "cd"})
    await wait_for(engine.blocked)
    async with connect(app) as client:
        assert (await client.post("/v1/internal/stop-generation")).json() == "OK"
    await call.next_message()
    answer = json.loads((await call.next_message())["body"])
    assert answer["choices"][0]["text"] == "abc"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 3
    assert len(engine.aborted) == 1
    call.disconnect()
    await call.wait()


async def test_stop_generation_without_any(
    client: httpx.AsyncClient, manager: FakeModelManager
) -> None:
    manager.model = None
    assert (await client.post("/v1/internal/stop-generation")).json() == "OK"
