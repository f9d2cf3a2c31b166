"""Loading, listing and unloading models over HTTP, and requests whose model comes first."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from modules.errors import ModelLoadError, ModelNotFoundError, SettingsError, UnfitSettingError
from modules.load_progress import LoadProgress, LoadStage
from tests.conftest import AsgiCall, MakeApp, connect
from tests.fakes import FakeEngine, FakeModelManager
from tests.openai.assertions import (
    MESSAGES,
    assert_error_object,
    assert_error_shape,
    read_events,
)

pytestmark = pytest.mark.anyio

PATH = "/v1/internal/model"
LOAD = f"{PATH}/load"
UNLOAD = f"{PATH}/unload"
ROUTES = [("GET", f"{PATH}/list"), ("POST", LOAD), ("POST", UNLOAD)]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_they_ask_for_the_admin_key(make_app: MakeApp, method: str, path: str) -> None:
    async with connect(make_app(api_key="user", admin_key="admin")) as client:
        for headers in ({}, bearer("user")):
            response = await client.request(method, path, headers=headers)
            assert_error_shape(response, 401, code="invalid_api_key")
        response = await client.request(
            method, path, headers=bearer("admin"), json={"model_name": "tiny"}
        )
        assert response.status_code == 200


async def test_what_can_be_loaded(client: httpx.AsyncClient) -> None:
    assert (await client.get(f"{PATH}/list")).json() == {"model_names": ["tiny", "other"]}


async def test_loading_and_unloading(client: httpx.AsyncClient, manager: FakeModelManager) -> None:
    assert (await client.post(LOAD, json={"model_name": "other"})).json() == "OK"
    assert (await client.get(f"{PATH}/info")).json()["model_name"] == "other"
    for body, names in (({"model_name": "other"}, []), (None, [])):
        response = await client.post(UNLOAD, json=body) if body else await client.post(UNLOAD)
        assert response.json() == "OK"
        assert [model.name for model in manager.loaded] == names
    response = await client.post("/v1/chat/completions", json={"messages": MESSAGES})
    message = assert_error_shape(response, 503, code="no_model_loaded")
    assert LOAD in message
    response = await client.post(UNLOAD, json={"model_name": "other"})
    assert_error_shape(response, 404, code="model_not_found")


@pytest.mark.parametrize(
    ("body", "changes"),
    [
        ({"args": {"cpu": True, "max_model_len": 64}}, {"cpu": True, "max_model_len": 64}),
        ({"args": {"kv_cache_memory": "0.5"}}, {"kv_cache_memory": 0.5}),
        ({"args": {"load_in_4bit": True}}, {"dtype": "int4"}),
        ({"args": {"load_in_8bit": False, "bf16": True}}, {"dtype": "bfloat16"}),
        ({"args": {"load_in_8bit": False}}, {"dtype": "auto"}),
        ({"args": {"dtype": None}}, {}),
        ({"settings": {"truncation_length": 64}}, {"max_model_len": 64}),
        ({"settings": {"instruction_template": "Alpaca"}}, {"instruction_template": "Alpaca"}),
        (
            {"settings": {"chat-instruct_command": "Go on: <|prompt|>", "name1": "Kim"}},
            {"chat_instruct_command": "Go on: <|prompt|>", "name1": "Kim"},
        ),
    ],
)
async def test_what_a_request_may_change(
    manager: FakeModelManager, make_app: MakeApp, body: dict[str, Any], changes: dict[str, Any]
) -> None:
    """Of what the server was started with, which is int8 here."""
    app = make_app(dtype="int8")
    manager._settings = manager.current.settings
    async with connect(app) as client:
        response = await client.post(LOAD, json={"model_name": "other", **body})
        assert response.json() == "OK"
    settings, start = manager.current.settings, manager._settings
    changed = {
        name: getattr(settings, name)
        for name in settings.__slots__
        if getattr(settings, name) != getattr(start, name)
    }
    assert changed == changes


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "model_name", "Missing"),
        ({"model_name": ""}, "model_name", "at least 1"),
        (
            {"args": {"n_gpu_layers": 12}},
            "args.n_gpu_layers",
            "n_gpu_layers belongs to the llama.cpp loader",
        ),
        ({"args": {"load_in_4bits": True}}, "args.load_in_4bits", "did you mean load_in_4bit?"),
        (
            {"args": {"trust_remote_code": True}},
            "args.trust_remote_code",
            "when the server is started",
        ),
        ({"args": {"model_dir": "/"}}, "args.model_dir", "when the server is started"),
        ({"args": {"api_key": "x"}}, "args.api_key", "when the server is started"),
        ({"args": {"dtype": "float64"}}, "args.dtype", "expected one of"),
        ({"args": {"max_model_len": 1}}, "args.max_model_len", "must be at least 2"),
        ({"args": {"max_num_seqs": {"a": []}}}, "args.max_num_seqs", "expected a whole number"),
        ({"args": {"load_in_4bit": "yes"}}, "args.load_in_4bit", "expected true or false"),
        ({"args": {"load_in_4bit": True, "load_in_8bit": True}}, "args.load_in_4bit", "another"),
        ({"args": {"load_in_4bit": True, "dtype": "int8"}}, "args.load_in_4bit", "another"),
        ({"args": [1]}, "args", "object"),
        ({"settings": {"preset": "x"}}, "settings.preset", "preset is not known"),
        (
            {"settings": {"instruction_tmplate": "x"}},
            "settings.instruction_tmplate",
            "mean instruction_template?",
        ),
        ({"settings": {"instruction_template": "No such"}}, "settings", "No such"),
        ({"settings": {"instruction_template_str": "{{"}}, "settings", "template"),
        ({"settings": {"chat_template_str": "{{"}}, "settings", "chat_template_str"),
        ({"settings": {"character": "Nobody"}}, "settings", "Nobody"),
        ({"settings": {"truncate": "never"}}, "settings.truncate", "expected one of"),
        (
            {"settings": {"truncation_length": 9}, "args": {"max_model_len": 9}},
            "settings.truncation_length",
            "it is max_model_len",
        ),
    ],
)
async def test_what_is_refused_by_name_before_anything_is_loaded(
    client: httpx.AsyncClient,
    manager: FakeModelManager,
    body: dict[str, Any],
    param: str,
    words: str,
) -> None:
    body = {"model_name": "other", **body} if body else body
    for stream in (False, True):
        response = await client.post(LOAD, json={**body, "stream": stream})
        assert words in assert_error_shape(response, 400, param=param)
    assert manager.loading.names == []


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ModelNotFoundError("There is no model."), 404, "model_not_found"),
        (ModelLoadError("It is damaged."), 500, "model_load_failed"),
        (SettingsError("config-user.yaml is no YAML."), 500, "invalid_settings"),
    ],
)
async def test_a_load_that_fails_says_why_and_the_old_model_serves_on(
    client: httpx.AsyncClient,
    manager: FakeModelManager,
    engine: FakeEngine,
    error: Exception,
    status: int,
    code: str,
) -> None:
    manager.loading.error = error
    for path, body in ((LOAD, {"model_name": "other"}), ("/v1/engines/other", None)):
        method = "POST" if body else "GET"
        response = await client.request(method, path, json=body)
        assert assert_error_shape(response, status, code=code) == str(error)
    response = await client.post(LOAD, json={"model_name": "other", "stream": True})
    assert_error_object(read_events(response.text)[-1], status, code=code)
    engine.enqueue("yes")
    response = await client.post("/v1/completions", json={"prompt": "a"})
    assert response.json()["choices"][0]["text"] == "yes"


@pytest.mark.parametrize(
    ("body", "settings", "field"),
    [
        (
            {"args": {"max_model_len": 99}},
            ("max_model_len", "kv_cache_memory"),
            "args.max_model_len",
        ),
        (
            {"args": {"kv_cache_memory": 1}},
            ("max_model_len", "kv_cache_memory"),
            "args.kv_cache_memory",
        ),
        ({"settings": {"truncation_length": 99}}, ("max_model_len",), "settings.truncation_length"),
        ({"args": {"dtype": None, "load_in_4bit": True}}, ("dtype",), "args.load_in_4bit"),
        ({"args": {"cpu": True}}, ("max_model_len",), None),
    ],
)
async def test_what_cannot_be_had_as_the_request_wants_it(
    client: httpx.AsyncClient,
    manager: FakeModelManager,
    body: dict[str, Any],
    settings: tuple[str, ...],
    field: str | None,
) -> None:
    """It is the request that is at fault, unless it says nothing of that setting."""
    manager.loading.error = UnfitSettingError("That does not fit.", *settings)
    response = await client.post(LOAD, json={"model_name": "other", **body})
    if field is None:
        assert_error_shape(response, 500, code="model_load_failed")
    else:
        message = assert_error_shape(response, 400, param=field)
        assert message == f"Invalid value for '{field}': That does not fit."
        response = await client.post(LOAD, json={"model_name": "other", **body, "stream": True})
        assert_error_object(read_events(response.text)[-1], 400, param=field)
    assert manager.current.name == "tiny"


async def test_progress_is_streamed(app: FastAPI, manager: FakeModelManager) -> None:
    manager.loading.waits = True
    async with connect(app) as client:
        task = asyncio.create_task(client.post(LOAD, json={"model_name": "other", "stream": True}))
        begun = await manager.loading.next()

        def load() -> None:
            begun.report(LoadProgress(LoadStage.DOWNLOADING, 0.5))
            begun.report(LoadProgress(LoadStage.TRYING_OUT))
            begun.finish()

        thread = threading.Thread(target=load)
        thread.start()
        response = await task
        thread.join()
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done = read_events(response.text)
    assert done == "[DONE]"
    told = [("finding", None), ("downloading", 0.5), ("trying out", None), ("ready", None)]
    assert events == [
        {"object": "model.load", "stage": stage, "fraction": fraction} for stage, fraction in told
    ]
    assert manager.current.name == "other"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_does_not_end_the_loading(
    app: FastAPI, manager: FakeModelManager, stream: bool
) -> None:
    manager.loading.waits = True
    call = AsgiCall(app, LOAD, {"model_name": "other", "stream": stream})
    begun = await manager.loading.next()
    call.disconnect()
    await call.wait()
    begun.finish()
    await until(lambda: manager.current.name == "other")


# Requests whose model has to be loaded first


@pytest.fixture
def autoload(manager: FakeModelManager, make_app: MakeApp) -> FastAPI:
    app = make_app(model_autoload=True)
    manager._settings = manager.current.settings
    manager.loading.waits = True
    return app


REQUESTS = pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a", "model": "other"}),
        ("/v1/chat/completions", {"messages": MESSAGES, "model": "other"}),
        ("/v1/engines/other/completions", {"prompt": "a"}),
        ("/v1/engines/other/generate", {"prompt": "a"}),
        ("/v1/engines/other/chat/completions", {"messages": MESSAGES}),
    ],
)


@REQUESTS
async def test_a_stream_begins_before_its_model_is_loaded(
    autoload: FastAPI, manager: FakeModelManager, path: str, body: dict[str, Any]
) -> None:
    call = AsgiCall(autoload, path, {**body, "stream": True})
    begun = await manager.loading.next()
    assert (await call.next_message())["status"] == 200
    begun.finish()
    text = ""
    while (message := await call.next_message())["more_body"]:
        text += message["body"].decode()
    *chunks, done = read_events(text)
    assert done == "[DONE]"
    assert {chunk["model"] for chunk in chunks} == {"other"}
    await call.wait()


@REQUESTS
async def test_others_wait(
    autoload: FastAPI, manager: FakeModelManager, path: str, body: dict[str, Any]
) -> None:
    async with connect(autoload) as client:
        task = asyncio.create_task(client.post(path, json=body))
        (await manager.loading.next()).finish()
        assert (await task).json()["model"] == "other"


@pytest.mark.parametrize(
    ("admin_key", "headers", "is_told"),
    [("admin", {}, False), ("admin", {"x-api-key": "admin"}, True), ("user", {}, True)],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_only_the_admin_is_told_why_a_model_cannot_be_loaded_for_a_request(
    make_app: MakeApp,
    manager: FakeModelManager,
    caplog: pytest.LogCaptureFixture,
    admin_key: str,
    headers: dict[str, str],
    is_told: bool,
    stream: bool,
) -> None:
    """The reason has paths of this machine in it."""
    app = make_app(model_autoload=True, api_key="user", admin_key=admin_key)
    manager._settings = manager.current.settings
    reason = "/home/kim/models/other is damaged."
    manager.loading.error = ModelLoadError(reason)
    body = {"prompt": "a", "model": "other", "stream": stream}
    async with connect(app, headers=bearer("user") | headers) as client:
        response = await client.post("/v1/completions", json=body)
    if stream:
        assert response.status_code == 200
        (event,) = read_events(response.text)
        message = assert_error_object(event, 500, code="model_load_failed")
    else:
        message = assert_error_shape(response, 500, code="model_load_failed")
    own = "The model other cannot be loaded. The server's log says why."
    assert message == (reason if is_told else own)
    assert reason in caplog.text
    assert manager.current.name == "tiny"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_before_its_model_is_there(
    autoload: FastAPI, manager: FakeModelManager, stream: bool
) -> None:
    body = {"prompt": "a", "model": "other", "stream": stream}
    call = AsgiCall(autoload, "/v1/completions", body)
    begun = await manager.loading.next()
    call.disconnect()
    await call.wait()
    engine = begun.finish()
    await until(lambda: manager.current.name == "other")
    assert engine.requests == []
    await manager.unload()
    assert engine.is_stopped


# The engines of the first API


@pytest.mark.parametrize(
    ("keys", "headers", "ready"),
    [
        ({}, {}, True),
        ({"api_key": "user", "admin_key": "admin"}, bearer("user"), False),
        ({"api_key": "user", "admin_key": "admin"}, bearer("admin"), True),
        ({"admin_key": "admin"}, {}, False),
        ({"admin_key": "admin"}, bearer("admin"), True),
    ],
)
async def test_asking_for_an_engine_loads_it_with_the_admin_key(
    make_app: MakeApp,
    manager: FakeModelManager,
    keys: dict[str, str],
    headers: dict[str, str],
    ready: bool,
) -> None:
    async with connect(make_app(**keys)) as client:
        answer = (await client.get("/v1/engines/other", headers=headers)).json()
    assert answer == {"id": "other", "object": "engine", "owner": "user", "ready": ready}
    assert manager.loading.names == (["other"] if ready else [])


async def test_an_engine_that_is_not_there_is_not_looked_for(
    client: httpx.AsyncClient, manager: FakeModelManager
) -> None:
    for name, ready in (("davinci", False), ("org/name", False), ("tiny", True)):
        assert (await client.get(f"/v1/engines/{name}")).json()["ready"] is ready
    assert manager.loading.names == []


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_so():
            await asyncio.sleep(0.005)
