from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from modules import model_files
from modules.loaded_model import LoadedModel
from tests.conftest import MakeApp, Serve, connect
from tests.fakes import FakeModelManager

pytestmark = pytest.mark.anyio

KEYS = [
    "id",
    "object",
    "created",
    "owned_by",
    "loaded",
    "kind",
    "context_length",
    "accepts_images",
    "alias_of",
]


@pytest.fixture
def model_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders as far as they tell what they are; and no bundled models."""
    monkeypatch.setattr(model_files, "BUNDLED_MODELS", {})
    write_config(tmp_path / "tiny", "LlamaForCausalLM", max_position_embeddings=2048)
    write_config(tmp_path / "eyes", "LlavaForConditionalGeneration", vision_config={})
    (tmp_path / "eyes" / "preprocessor_config.json").touch()
    write_config(tmp_path / "encoder", "BertModel", max_position_embeddings=512)
    write_config(tmp_path / "judge", "BertForSequenceClassification", id2label={"0": "LABEL_0"})
    write_config(tmp_path / "ears", "WhisperForConditionalGeneration", model_type="whisper")
    (tmp_path / "voices").mkdir()
    for name in ("anna.onnx", "anna.onnx.json"):
        (tmp_path / "voices" / name).touch()
    return tmp_path


def write_config(folder: Path, architecture: str, **more: Any) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture], **more}))


@pytest.fixture
def app(make_app: MakeApp, model_dir: Path, manager: FakeModelManager) -> FastAPI:
    assert manager.model is not None
    manager.model = replace(manager.model, path=model_dir / "tiny")
    return make_app(
        model_dir=model_dir,
        voice_dir=model_dir / "voices",
        embedding_model="encoder",
        transcription_model="/no/such/place",
        moderation_model="some/classifier",
    )


async def read_models(client: httpx.AsyncClient) -> dict[str, dict[str, Any]]:
    answer = (await client.get("/v1/models")).json()
    assert answer["object"] == "list"
    for entry in answer["data"]:
        assert list(entry) == KEYS
        assert (entry["object"], entry["owned_by"]) == ("model", "user")
    models = {entry["id"]: entry for entry in answer["data"]}
    assert len(models) == len(answer["data"])
    return models


async def test_each_model_is_what_it_is(client: httpx.AsyncClient) -> None:
    models = await read_models(client)
    told = {
        name: (model["kind"], model["loaded"], model["context_length"], model["alias_of"])
        for name, model in models.items()
    }
    assert list(told.items()) == [
        ("tiny", ("text", True, 1024, None)),  # of it, the length that it was loaded with
        ("eyes", ("text", False, None, None)),
        ("encoder", ("embedding", False, 512, None)),
        ("some/classifier", ("classification", False, None, None)),
        ("anna", ("voice", False, None, None)),
        ("ears", ("transcription", False, None, None)),
        ("judge", ("rerank", False, None, None)),
        ("gpt-3.5-turbo", ("text", True, 1024, "tiny")),
        ("text-embedding-ada-002", ("embedding", False, 512, "encoder")),
    ]
    assert [name for name, model in models.items() if model["accepts_images"]] == ["eyes"]


async def test_created_is_when_the_files_were_changed(
    client: httpx.AsyncClient, model_dir: Path
) -> None:
    models = await read_models(client)
    for name in ("tiny", "encoder"):
        changed = int((model_dir / name / "config.json").stat().st_mtime)
        assert models[name]["created"] == changed
    assert models["gpt-3.5-turbo"]["created"] == models["tiny"]["created"]
    assert models["some/classifier"]["created"] == 0


async def test_openais_client_reads_it(app: FastAPI) -> None:
    async with connect(app) as http_client:
        api = openai.AsyncOpenAI(
            api_key="sk-1", base_url="http://test/v1", http_client=http_client, max_retries=0
        )
        models = [model async for model in api.models.list()]
        assert models[0].id == "tiny"
        assert models[0].model_extra is not None
        assert models[0].model_extra["context_length"] == 1024
        assert await api.models.retrieve("tiny") == models[0]


async def test_without_a_model(
    client: httpx.AsyncClient, manager: FakeModelManager, model_dir: Path
) -> None:
    manager.model = None
    write_config(model_dir / "gpt-3.5-turbo", "LlamaForCausalLM")  # a folder may be called so
    models = await read_models(client)
    assert list(models)[:3] == ["eyes", "gpt-3.5-turbo", "tiny"]
    assert not any(model["loaded"] for model in models.values())
    assert models["gpt-3.5-turbo"]["alias_of"] is None
    assert models["tiny"]["context_length"] == 2048
    answer = (await client.get("/v1/models/gpt-9")).json()
    assert (answer["id"], answer["loaded"], answer["alias_of"]) == ("gpt-9", False, None)


async def test_a_loaded_model_from_elsewhere(
    client: httpx.AsyncClient, manager: FakeModelManager, model_dir: Path, tmp_path_factory: Any
) -> None:
    """It has the name of another one in the model folder."""
    folder = tmp_path_factory.mktemp("elsewhere") / "tiny"
    write_config(folder, "LlavaForConditionalGeneration", vision_config={})
    (folder / "preprocessor_config.json").touch()
    os.utime(folder / "preprocessor_config.json", (7, 7))
    os.utime(folder / "config.json", (7, 7))
    assert manager.model is not None
    manager.model = replace(manager.model, path=folder)
    models = await read_models(client)
    # Its files could have images read, but nothing that reads them has been loaded.
    assert (models["tiny"]["created"], models["tiny"]["accepts_images"]) == (7, False)


async def test_models_that_sleep_are_listed_as_they_were(
    client: httpx.AsyncClient, manager: FakeModelManager, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """After all that are loaded, also one from elsewhere."""
    folder = tmp_path_factory.mktemp("elsewhere") / "far"
    write_config(folder, "LlamaForCausalLM", max_position_embeddings=2048)
    assert manager.model is not None
    await put_to_sleep(manager, replace(manager.model, name="far", path=folder, max_model_len=64))
    told = {
        name: (model["kind"], model["loaded"], model["context_length"], model["alias_of"])
        for name, model in (await read_models(client)).items()
    }
    assert list(told.items())[:3] == [
        ("far", ("text", False, 64, None)),
        ("eyes", ("text", False, None, None)),
        ("tiny", ("text", False, 2048, None)),
    ]
    assert told["gpt-3.5-turbo"] == ("text", False, 64, "far")
    info = (await client.get("/v1/internal/model/info")).json()
    assert info == {
        "model_name": "far",
        "lora_names": [],
        "chat_template": None,
        "models": [],
        "asleep": ["far"],
    }
    names = (await client.get("/v1/internal/model/list")).json()["model_names"]
    assert names == ["far", "other", "tiny"]
    assert (await client.get("/v1/internal/health")).json() == {"status": "ok", "model": "far"}


async def test_the_engine_of_a_model_that_sleeps(
    client: httpx.AsyncClient, manager: FakeModelManager, tmp_path: Path
) -> None:
    """It is not ready, and the admin's question wakes it, wherever it is from."""
    assert manager.model is not None
    await put_to_sleep(manager, replace(manager.model, name="far", path=tmp_path / "far"))
    engines = (await client.get("/v1/engines")).json()["data"]
    assert engines[0]["id"] == "far"
    assert not any(engine["ready"] for engine in engines)
    assert (await client.get("/v1/engines/davinci")).json()["ready"] is False
    assert manager.loading.names == []
    assert (await client.get("/v1/engines/far")).json()["ready"] is True
    assert (await client.get("/v1/models/far")).json()["loaded"] is True
    assert manager.loading.names == ["far"]
    assert manager.asleep == ()


async def put_to_sleep(manager: FakeModelManager, model: LoadedModel) -> None:
    manager.model = model
    await manager._put_to_sleep(timeout=0)


@pytest.mark.parametrize("name", ["gpt-9", "org/model", "a/b/c", "größe", "x" * 5000])
async def test_a_model_is_whichever_is_asked_for(client: httpx.AsyncClient, name: str) -> None:
    answer = (await client.get(f"/v1/models/{name}")).json()
    assert list(answer) == KEYS
    own = (await client.get("/v1/models/tiny")).json()
    assert own["alias_of"] is None
    assert answer == own | {"id": name, "alias_of": "tiny"}


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/v1/internal/health"])
async def test_head(app: FastAPI, serve: Serve, path: str) -> None:
    with serve(app) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            head, get = await client.head(path), await client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == get.headers["content-length"]


async def test_head_of_what_only_takes_a_body(client: httpx.AsyncClient) -> None:
    response = await client.head("/v1/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")


async def test_an_escaped_slash_is_a_slash(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/models/org%2Fmodel")).json()["id"] == "org/model"
