"""POST /v1/search: documents by how near they are to a query, as OpenAI's first API had it."""

from enum import Enum

from fastapi import APIRouter, Request, Response
from pydantic_core import to_json

from extensions.openai.embeddings import truncation_header
from extensions.openai.streaming import JsonAnswer, send_json
from extensions.openai.typing import SearchRequest, SearchResultList
from modules.context import Context
from modules.reranking import compare

TAGS: list[str | Enum] = ["Older programs"]


def add_routes(router: APIRouter, context: Context) -> None:
    @router.post("/v1/search", tags=TAGS, responses={200: {"model": SearchResultList}})
    @router.post(
        "/v1/engines/{engine_id:path}/search",
        tags=TAGS,
        responses={200: {"model": SearchResultList}},
    )
    async def search(request: Request, body: SearchRequest) -> Response:
        """Documents in the order of their nearness to a query; the embedding model answers."""
        return await send_json(answer_search(context, body), request, context.settings)


async def answer_search(context: Context, body: SearchRequest) -> JsonAnswer:
    """Raises what `Embedder.embed` raises."""
    pairs = [(body.query, text) for text in body.documents]
    scored = await compare(context.embeddings, pairs)
    ranking = (-scored.scores).argsort(kind="stable").tolist()[: body.max_rerank]
    results = [
        {"object": "search_result", "document": index, "score": float(scored.scores[index])}
        for index in ranking
    ]
    answer = {"object": "list", "data": results, "model": scored.model}
    return JsonAnswer(to_json(answer), truncation_header(scored.num_truncated))
