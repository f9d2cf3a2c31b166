"""Adapters through HTTP: loaded by the admin, chosen by requests, answered by a real tiny model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from modules.adapters import Adapters
from modules.engine.engine import EngineConfig
from modules.loaded_model import LoadedModel
from tests.adapters import save_adapter
from tests.conftest import MakeApp, connect
from tests.fakes import FakeModelManager
from tests.openai.assertions import assert_error_shape
from tests.openai.test_tokens import CALLS
from tests.openai.tiny import start_tiny_engine

pytestmark = pytest.mark.anyio

LOAD, UNLOAD, LIST = (f"/v1/internal/lora/{verb}" for verb in ("load", "unload", "list"))
ADMIN = {"Authorization": "Bearer admin"}


@pytest.fixture
async def client(
    model: LoadedModel, manager: FakeModelManager, make_app: MakeApp, tmp_path: Path
) -> AsyncIterator[httpx.AsyncClient]:
    engine = start_tiny_engine(EngineConfig(max_model_len=256, num_cache_tokens=2048))
    inner: Any = engine._engine
    layers = inner.runner.layers
    for seed, name in enumerate(("pirate", "poet")):
        save_adapter(inner.runner._model, tmp_path / name, seed)
    manager.model = replace(model, engine=engine, adapters=Adapters("tiny", tmp_path, layers))
    aliases = {"corsair": "tiny:pirate"}
    manager._settings = replace(manager._settings, model_aliases=aliases)
    app = make_app(lora_dir=tmp_path, api_key="user", admin_key="admin", model_aliases=aliases)
    async with connect(app, headers={"Authorization": "Bearer user"}) as client:
        yield client
    engine.stop()


async def complete(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    wishes = {"prompt": [*range(65, 90)], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    return await client.post("/v1/completions", json={**wishes, **body})


async def read(client: httpx.AsyncClient, **body: Any) -> tuple[str, str]:
    """Which model has answered, and what."""
    answer = (await complete(client, **body)).json()
    return answer["model"], answer["choices"][0]["text"]


async def test_each_request_gets_its_own(client: httpx.AsyncClient) -> None:
    _, base = await read(client)
    assert (await client.post(LOAD, json={"lora_names": ["pirate"]}, headers=ADMIN)).json() == "OK"
    info = await client.get("/v1/internal/model/info")
    assert info.json()["lora_names"] == ["pirate"]
    pirate = await read(client, lora="pirate")
    assert pirate[0] == "tiny:pirate" and pirate[1] != base
    assert await read(client) == ("tiny", pirate[1])  # what is loaded answers
    assert await read(client, lora="none") == await read(client, lora="") == ("tiny", base)

    await client.post(LOAD, json={"lora_names": ["poet"]}, headers=ADMIN)
    poet = await read(client, model="tiny:poet")
    assert poet[0] == "tiny:poet" and poet[1] not in (base, pirate[1])
    both = await read(client)
    assert both[1] not in (base, pirate[1], poet[1])
    # All at once, in one batch.
    bodies = [{"lora": "none"}, {"lora": "pirate"}, {"model": "tiny:poet"}, {}] * 2
    answers = await asyncio.gather(*(read(client, **body) for body in bodies))
    assert answers == [("tiny", base), pirate, poet, both] * 2

    await client.post(UNLOAD, headers=ADMIN)
    assert await read(client) == ("tiny", base)
    assert (await client.get("/v1/internal/model/info")).json()["lora_names"] == []


async def test_some_are_unloaded(client: httpx.AsyncClient) -> None:
    await client.post(LOAD, json={"lora_names": ["pirate", "poet"]}, headers=ADMIN)
    poet = await read(client, lora="poet")

    async def unload(*names: str) -> httpx.Response:
        return await client.post(UNLOAD, json={"lora_names": names}, headers=ADMIN)

    answer = await unload("pirate", "nobody")
    message = assert_error_shape(answer, 404, param="lora_names", code="model_not_found")
    assert "'nobody'" in message
    assert (await read(client, model="tiny:pirate"))[0] == "tiny:pirate"
    assert (await unload("pirate", "pirate")).json() == "OK"
    assert await read(client) == ("tiny", poet[1])
    assert (await unload("pirate")).status_code == 404
    assert (await unload()).json() == "OK"  # of none, none
    assert (await client.get("/v1/internal/model/info")).json()["lora_names"] == ["poet"]
    assert (await client.post(UNLOAD, headers=ADMIN)).json() == "OK"
    assert (await client.get("/v1/internal/model/info")).json()["lora_names"] == []


async def test_models_with_adapters_are_listed_and_may_be_named_everywhere(
    client: httpx.AsyncClient, manager: FakeModelManager
) -> None:
    await client.post(LOAD, json={"lora_names": ["poet", "pirate"]}, headers=ADMIN)
    listed = (await client.get("/v1/models")).json()["data"]
    assert [each["id"] for each in listed[:3]] == ["tiny", "tiny:poet", "tiny:pirate"]
    assert listed[1] == {**listed[0], "id": "tiny:poet"}
    (alias,) = (each for each in listed if each["id"] == "corsair")
    assert alias == {**listed[0], "id": "corsair", "alias_of": "tiny:pirate"}
    engines = (await client.get("/v1/engines")).json()["data"]
    ready = {engine["id"] for engine in engines if engine["ready"]}
    assert ready == {"tiny", "tiny:poet", "tiny:pirate", "corsair"}
    for name in ("tiny", "tiny:poet", "corsair"):
        assert (await client.get(f"/v1/engines/{name}")).json()["ready"]
        for path, body in CALLS:
            answer = await client.post(path, json={"model": name, **body})
            assert answer.status_code == 200

    await client.post(UNLOAD, headers=ADMIN)
    assert (await client.get("/v1/models/corsair")).json() == {**alias, "loaded": False}
    for name in ("tiny:poet", "corsair"):
        answer = await client.get(f"/v1/engines/{name}", headers=ADMIN)
        assert answer.json()["ready"] is False
        for path, body in CALLS:
            answer = await client.post(path, json={"model": name, **body})
            assert_error_shape(answer, 404, param="model", code="model_not_found")
    assert manager.loading.names == []  # the model was there all the time


async def test_what_there_is(client: httpx.AsyncClient) -> None:
    assert (await client.get(LIST, headers=ADMIN)).json() == {"lora_names": ["pirate", "poet"]}


async def test_faults(client: httpx.AsyncClient, tmp_path: Path) -> None:
    for body, param in (({"lora": "poet"}, "lora"), ({"model": "tiny:poet"}, "model")):
        answer = await complete(client, **body)
        assert_error_shape(answer, 404, param=param, code="model_not_found")
        assert "'poet'" in answer.json()["error"]["message"]
    chat = {"messages": [{"role": "user", "content": "Hi"}], "lora": "poet"}
    answer = await client.post("/v1/internal/chat-prompt", json=chat)
    assert_error_shape(answer, 404, param="lora", code="model_not_found")
    # A model that there is not is answered for by the one that is loaded, whatever its name.
    assert (await complete(client, model="gpt-4:poet")).status_code == 200

    await client.post(LOAD, json={"lora_names": ["poet"]}, headers=ADMIN)
    missing = {"lora_names": ["pirate", "nobody"]}
    answer = await client.post(LOAD, json=missing, headers=ADMIN)
    assert_error_shape(answer, 404, code="model_not_found")
    (folder := tmp_path / "damaged").mkdir()
    (folder / "adapter_config.json").write_text("{")
    answer = await client.post(LOAD, json={"lora_names": ["damaged"]}, headers=ADMIN)
    assert_error_shape(answer, 400, param="lora_names")
    for path in (LOAD, UNLOAD):  # the default model stays as it is
        wish = {"model": "gpt-4", "lora_names": ["pirate"]}
        answer = await client.post(path, json=wish, headers=ADMIN)
        assert_error_shape(answer, 404, code="model_not_found")
    empty = await client.post(LOAD, json={"lora_names": []}, headers=ADMIN)
    assert_error_shape(empty, 400, param="lora_names")
    assert (await client.get("/v1/internal/model/info")).json()["lora_names"] == ["poet"]


@pytest.mark.parametrize(("verb", "path"), [("GET", LIST), ("POST", LOAD), ("POST", UNLOAD)])
async def test_the_admins_key_is_asked_for(verb: str, path: str, client: httpx.AsyncClient) -> None:
    answer = await client.request(verb, path, json={"lora_names": ["poet"]})
    assert_error_shape(answer, 401, code="invalid_api_key")
