"""Clients that have to work unchanged: OpenAI's own, and the programs in the user's document."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import requests
import sseclient
from fastapi import FastAPI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from tests.conftest import MakeApp, Serve, connect
from tests.fakes import FakeEngine
from tests.openai.assertions import MESSAGES, read_events

pytestmark = pytest.mark.anyio


@pytest.fixture
async def api(make_app: MakeApp) -> AsyncIterator[openai.AsyncOpenAI]:
    async with connect(make_app(api_key="sk-1")) as http_client:
        yield openai.AsyncOpenAI(
            api_key="sk-1", base_url="http://test/v1", http_client=http_client, max_retries=0
        )


def assert_no_extra_fields(value: Any) -> None:
    """Every field is one that the client's types know."""
    if isinstance(value, BaseModel):
        assert not value.model_extra, value.model_extra
        for _, item in value:
            assert_no_extra_fields(item)
    elif isinstance(value, list):
        for item in value:
            assert_no_extra_fields(item)


async def test_openai_chat(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.enqueue("Hi 🙂")
    answer = await api.chat.completions.create(model="tiny", messages=MESSAGES, seed=1)
    assert answer.choices[0].message.content == "Hi 🙂"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None


async def test_openai_chat_stream(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.enqueue("Hi 🙂")
    chunks = [
        chunk
        async for chunk in await api.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
        )
    ]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "Hi 🙂"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


async def test_openai_stream_helper(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.enqueue("abc")
    async with api.chat.completions.stream(model="tiny", messages=MESSAGES) as stream:
        async for _ in stream:
            pass
        answer = await stream.get_final_completion()
    assert answer.choices[0].message.content == "abc"
    assert answer.choices[0].finish_reason == "stop"


async def test_openai_completions(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.enqueue("one")
    answer = await api.completions.create(model="tiny", prompt=[1, 2, 3])
    assert answer.choices[0].text == "one"
    engine.enqueue("two")
    stream = await api.completions.create(model="tiny", prompt="x", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "two"


async def test_openai_models(api: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in api.models.list()][0] == "tiny"
    assert (await api.models.retrieve("org/any")).id == "org/any"


async def test_openai_errors(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await api.completions.create(model="tiny", prompt="x", temperature=-1)
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as caught:
        await api.completions.create(model="tiny", prompt="x" * 2000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        await api.with_options(api_key="no").models.list()
    with pytest.raises(openai.NotFoundError):
        await api.containers.retrieve("x")
    engine.enqueue("ab", error=KeyError("x"))
    with pytest.raises(openai.APIError, match="had an error"):
        async for _ in await api.completions.create(model="tiny", prompt="x", stream=True):
            pass


async def test_answers_fit_the_types_strictly(app: FastAPI) -> None:
    chat_body = {"messages": MESSAGES, "n": 2}
    body = {"prompt": ["x", "y"]}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async with connect(app) as client:
        whole_chat = (await client.post("/v1/chat/completions", json=chat_body)).json()
        whole = (await client.post("/v1/completions", json=body)).json()
        chat = await client.post("/v1/chat/completions", json={**chat_body, **options})
        text = await client.post("/v1/completions", json={**body, **options})
    assert_no_extra_fields(ChatCompletion.model_validate(whole_chat, strict=True))
    assert_no_extra_fields(Completion.model_validate(whole, strict=True))
    for event in read_events(chat.text)[:-1]:
        assert_no_extra_fields(ChatCompletionChunk.model_validate(event, strict=True))
    for event in read_events(text.text)[:-1]:
        # The client has one type for whole and streamed completions, which wants a finish reason.
        for choice in event["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        assert_no_extra_fields(Completion.model_validate(event, strict=True))


# The programs of the user's document, without their input loop.


async def test_python_chat_example(app: FastAPI, engine: FakeEngine, serve: Serve) -> None:
    engine.enqueue(" I am fine.")
    data = {"mode": "chat", "character": "Example", "messages": MESSAGES}

    def run(url: str) -> str:
        headers = {"Content-Type": "application/json"}
        response = requests.post(url, headers=headers, json=data, verify=False, timeout=5)
        return str(response.json()["choices"][0]["message"]["content"])

    with serve(app) as url:
        assert await asyncio.to_thread(run, f"{url}/v1/chat/completions") == "I am fine."


async def test_python_chat_example_with_streaming(
    app: FastAPI, engine: FakeEngine, serve: Serve
) -> None:
    engine.enqueue("Grüße 🙂")
    data = {"mode": "instruct", "stream": True, "messages": MESSAGES}

    def run(url: str) -> str:
        headers = {"Content-Type": "application/json"}
        stream_response = requests.post(
            url, headers=headers, json=data, verify=False, stream=True, timeout=5
        )
        client = sseclient.SSEClient(stream_response)
        assistant_message = ""
        for event in client.events():
            payload = json.loads(event.data)
            assistant_message += payload["choices"][0]["message"]["content"]
        return assistant_message

    with serve(app) as url:
        assert await asyncio.to_thread(run, f"{url}/v1/chat/completions") == "Grüße 🙂"


async def test_python_completions_example_with_streaming(
    app: FastAPI, engine: FakeEngine, serve: Serve
) -> None:
    engine.enqueue(" Flour.\n2. Eggs.")
    data = {
        "prompt": "This is a cake recipe:\n\n1.",
        "max_tokens": 200,
        "temperature": 1,
        "top_p": 0.9,
        "seed": 10,
        "stream": True,
    }

    def run(url: str) -> str:
        headers = {"Content-Type": "application/json"}
        stream_response = requests.post(
            url, headers=headers, json=data, verify=False, stream=True, timeout=5
        )
        client = sseclient.SSEClient(stream_response)
        return "".join(json.loads(e.data)["choices"][0]["text"] for e in client.events())

    with serve(app) as url:
        assert await asyncio.to_thread(run, f"{url}/v1/completions") == " Flour.\n2. Eggs."
