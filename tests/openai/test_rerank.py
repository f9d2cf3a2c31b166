"""Reranking, scores and the older search over HTTP, by the bundled embedding model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from modules.context import Context
from tests.conftest import MakeApp, connect
from tests.modules.test_reranking import build_cross_encoder
from tests.openai.assertions import assert_error_shape
from tests.openai.embedding_app import NAME, app, client, context

__all__ = ["app", "client", "context"]  # fixtures

pytestmark = pytest.mark.anyio

QUERY = "How long do cats sleep?"
DOCUMENTS = ["Shares fell.", "Cats sleep for most of the day.", "The cat is outside."]


async def post(client: httpx.AsyncClient, path: str, **body: Any) -> Any:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def cosines(context: Context, query: str, texts: list[str]) -> list[float]:
    vectors = (await context.embeddings.embed([query, *texts])).vectors
    numbers: list[float] = (vectors[1:] @ vectors[0]).tolist()
    return numbers


# Reranking


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
async def test_the_best_comes_first(client: httpx.AsyncClient, context: Context, path: str) -> None:
    answer = await post(client, path, model="any", query=QUERY, documents=DOCUMENTS)
    assert list(answer) == ["id", "model", "results", "usage"]
    assert answer["model"] == NAME
    assert [result["index"] for result in answer["results"]] == [1, 2, 0]
    expected = await cosines(context, QUERY, DOCUMENTS)
    for result in answer["results"]:
        assert result["relevance_score"] == pytest.approx(expected[result["index"]], abs=1e-5)
        assert result["document"] == {"text": DOCUMENTS[result["index"]]}
    num_tokens = sum((await context.embeddings.embed([QUERY, *DOCUMENTS])).num_tokens)
    assert answer["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


async def test_top_n_and_no_documents(client: httpx.AsyncClient) -> None:
    documents = [{"text": text, "url": "x"} for text in DOCUMENTS]
    answer = await post(
        client, "/v1/rerank", query=QUERY, documents=documents, top_n=1, return_documents=False
    )
    (result,) = answer["results"]
    assert list(result) == ["index", "relevance_score"]
    assert result["index"] == 1
    answer = await post(client, "/v1/rerank", query=QUERY, documents=documents, top_n=99)
    assert len(answer["results"]) == 3


async def test_documents_that_are_alike_stay_in_order(client: httpx.AsyncClient) -> None:
    answer = await post(client, "/v1/rerank", query=QUERY, documents=["same"] * 5)
    assert [result["index"] for result in answer["results"]] == [0, 1, 2, 3, 4]


async def test_documents_that_are_cut_off_are_reported(client: httpx.AsyncClient) -> None:
    body = {"query": QUERY, "documents": ["word " * 300, "word"]}
    response = await client.post("/v1/rerank", json=body)
    assert response.json()["usage"]["truncated_inputs"] == 1
    assert response.headers["x-truncated-inputs"] == "1"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"documents": ["a"]}, "query"),
        ({"query": "", "documents": ["a"]}, "query"),
        ({"query": ["a"], "documents": ["a"]}, "query"),
        ({"query": "a"}, "documents"),
        ({"query": "a", "documents": []}, "documents"),
        ({"query": "a", "documents": "a"}, "documents"),
        ({"query": "a", "documents": ["a", ""]}, "documents"),
        ({"query": "a", "documents": [{"title": "a"}]}, "documents"),
        ({"query": "a", "documents": ["a", 1]}, "documents"),
        ({"query": "a", "documents": ["a"] * 2049}, "documents"),
        ({"query": "a", "documents": ["a"], "top_n": 0}, "top_n"),
        ({"query": "a", "documents": ["a"], "return_documents": "no"}, "return_documents"),
    ],
)
async def test_what_is_refused(client: httpx.AsyncClient, body: Any, param: str) -> None:
    assert_error_shape(await client.post("/v1/rerank", json=body), 400, param=param)


async def test_by_a_cross_encoder(make_app: MakeApp, tmp_path: Path) -> None:
    path = build_cross_encoder(tmp_path / "scorer")
    async with connect(make_app(rerank_model=str(path))) as client:
        ranked = await post(client, "/v1/rerank", query=QUERY, documents=DOCUMENTS)
        scored = await post(client, "/v1/score", text_1=QUERY, text_2=DOCUMENTS)
    assert ranked["model"] == scored["model"] == "scorer"
    scores = [item["score"] for item in scored["data"]]
    assert len(set(scores)) == 3
    ranking = sorted(range(3), key=lambda index: -scores[index])
    assert [result["index"] for result in ranked["results"]] == ranking
    assert ranked["results"][0]["relevance_score"] == pytest.approx(max(scores), abs=1e-5)


# Scores


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
async def test_one_text_with_several(
    client: httpx.AsyncClient, context: Context, path: str
) -> None:
    answer = await post(client, path, model="any", text_1=QUERY, text_2=DOCUMENTS)
    assert list(answer) == ["id", "object", "created", "model", "data", "usage"]
    assert answer["object"] == "list"
    assert [(item["index"], item["object"]) for item in answer["data"]] == [
        (0, "score"),
        (1, "score"),
        (2, "score"),
    ]
    scores = [item["score"] for item in answer["data"]]
    np.testing.assert_allclose(scores, await cosines(context, QUERY, DOCUMENTS), atol=1e-5)


async def test_pair_by_pair(client: httpx.AsyncClient, context: Context) -> None:
    answer = await post(client, "/v1/score", text_1=["a cat", "Shares fell."], text_2=DOCUMENTS[1:])
    scores = [item["score"] for item in answer["data"]]
    first = await cosines(context, "a cat", DOCUMENTS[1:2])
    second = await cosines(context, "Shares fell.", DOCUMENTS[2:])
    np.testing.assert_allclose(scores, first + second, atol=1e-5)
    answer = await post(client, "/v1/score", text_1="same", text_2="same")
    assert answer["data"][0]["score"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"text_2": "a"}, "text_1"),
        ({"text_1": "a"}, "text_2"),
        ({"text_1": "a", "text_2": []}, "text_2"),
        ({"text_1": "a", "text_2": ["b", ""]}, "text_2"),
        ({"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ({"text_1": ["a", "b"], "text_2": "a"}, "text_1"),
        ({"text_1": 1, "text_2": "a"}, "text_1"),
    ],
)
async def test_pairs_that_are_refused(client: httpx.AsyncClient, body: Any, param: str) -> None:
    assert_error_shape(await client.post("/v1/score", json=body), 400, param=param)


# Search


@pytest.mark.parametrize("path", ["/v1/search", "/v1/engines/davinci/search"])
async def test_search(client: httpx.AsyncClient, context: Context, path: str) -> None:
    answer = await post(client, path, query=QUERY, documents=DOCUMENTS, return_metadata=True)
    assert list(answer) == ["object", "data", "model"]
    assert [result["document"] for result in answer["data"]] == [1, 2, 0]
    assert {result["object"] for result in answer["data"]} == {"search_result"}
    expected = await cosines(context, QUERY, DOCUMENTS)
    scores = [result["score"] for result in answer["data"]]
    np.testing.assert_allclose(scores, sorted(expected, reverse=True), atol=1e-5)
    answer = await post(client, path, query=QUERY, documents=DOCUMENTS, max_rerank=2)
    assert [result["document"] for result in answer["data"]] == [1, 2]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"query": "a", "file": "file-1"}, "file"),
        ({"query": "a"}, "documents"),
        ({"documents": ["a"]}, "query"),
        ({"query": "a", "documents": ["a"], "max_rerank": 0}, "max_rerank"),
    ],
)
async def test_searches_that_are_refused(client: httpx.AsyncClient, body: Any, param: str) -> None:
    assert_error_shape(await client.post("/v1/search", json=body), 400, param=param)
