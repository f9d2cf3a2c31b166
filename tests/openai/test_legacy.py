"""Calls of older programs: they are the present ones under other names."""

from __future__ import annotations

import httpx
import pytest

from tests.fakes import FakeEngine, FakeModelManager
from tests.openai.assertions import MESSAGES, assert_error_shape, read_events

pytestmark = pytest.mark.anyio

PROMPT = tuple(b"Hi")


async def test_engines_are_the_models(client: httpx.AsyncClient) -> None:
    models = (await client.get("/v1/models")).json()
    answer = (await client.get("/v1/engines")).json()
    assert answer["object"] == "list"
    assert [engine["id"] for engine in answer["data"]] == [model["id"] for model in models["data"]]
    assert answer["data"][0] == {"id": "tiny", "object": "engine", "owner": "user", "ready": True}
    assert not any(engine["ready"] for engine in answer["data"][1:])


async def test_without_a_model_no_engine_is_ready(
    client: httpx.AsyncClient, manager: FakeModelManager
) -> None:
    manager.model = None
    answer = (await client.get("/v1/engines")).json()
    assert answer["data"] and not any(engine["ready"] for engine in answer["data"])


@pytest.mark.parametrize(("name", "ready"), [("tiny", True), ("davinci", False), ("org/x", False)])
async def test_one_engine(client: httpx.AsyncClient, name: str, ready: bool) -> None:
    answer = (await client.get(f"/v1/engines/{name}")).json()
    assert answer == {"id": name, "object": "engine", "owner": "user", "ready": ready}


@pytest.mark.parametrize(
    "path",
    ["/v1/text_completion", "/v1/engines/tiny/completions", "/v1/engines/org/name/completions"],
)
async def test_completions_by_other_names(
    client: httpx.AsyncClient, engine: FakeEngine, path: str
) -> None:
    engine.enqueue(" there")
    answer = (await client.post(path, json={"prompt": "Hi"})).json()
    assert (answer["object"], answer["choices"][0]["text"]) == ("text_completion", " there")
    engine.enqueue(" there")
    response = await client.post(path, json={"prompt": "Hi", "stream": True})
    *chunks, done = read_events(response.text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == " there"
    assert done == "[DONE]"
    assert [request.prompt_token_ids for request in engine.requests] == [PROMPT, PROMPT]


@pytest.mark.parametrize("name", ["tiny", "org/name"])
async def test_chats_by_another_name(
    client: httpx.AsyncClient, engine: FakeEngine, name: str
) -> None:
    engine.enqueue("there")
    response = await client.post(
        f"/v1/engines/{name}/chat/completions", json={"messages": MESSAGES}
    )
    assert response.json()["object"] == "chat.completion"
    assert response.json()["choices"][0]["message"]["content"] == "there"


async def test_generate_speaks_of_context_and_length(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.enqueue("x" * 40)
    body = {"context": "Hi", "length": 3}
    answer = (await client.post("/v1/engines/tiny/generate", json=body)).json()
    assert answer["data"] == answer["choices"]
    assert answer["data"][0]["text"] == "xxx"
    assert engine.requests[0].prompt_token_ids == PROMPT
    assert engine.requests[0].params.max_tokens == 3


async def test_generate_takes_the_present_names_before_the_old_ones(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    body = {"context": "no", "prompt": "Hi", "length": 9, "max_tokens": 2}
    await client.post("/v1/engines/tiny/generate", json=body)
    assert engine.requests[0].prompt_token_ids == PROMPT
    assert engine.requests[0].params.max_tokens == 2


async def test_a_stream_of_generate_has_data_in_each_chunk(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.enqueue("abc")
    response = await client.post(
        "/v1/engines/tiny/generate", json={"context": "Hi", "stream": True}
    )
    *chunks, done = read_events(response.text)
    assert "".join(chunk["data"][0]["text"] for chunk in chunks) == "abc"
    assert all(chunk["data"] == chunk["choices"] for chunk in chunks)
    assert done == "[DONE]"


@pytest.mark.parametrize("body", [{}, {"context": "Hi", "length": -1}])
async def test_generate_refuses_what_completions_refuse(
    client: httpx.AsyncClient, body: dict[str, object]
) -> None:
    response = await client.post("/v1/engines/tiny/generate", json=body)
    assert_error_shape(response, 400, param="max_tokens" if body else "prompt")


@pytest.mark.parametrize("path", ["/v1/edits", "/v1/engines/tiny/edits"])
async def test_edits_are_gone_and_the_error_says_what_to_use(
    client: httpx.AsyncClient, path: str
) -> None:
    for content in (b'{"instruction": "Fix it", "input": "teh"}', b"", b"{"):
        response = await client.post(path, content=content)
        message = assert_error_shape(response, 410, code="endpoint_removed")
        assert "/v1/chat/completions" in message


async def test_it_costs_nothing(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/billing/usage")).json() == {"total_usage": 0}
