"""POST /v1/rerank and /v1/score: how well texts go with each other, in Jina's and vLLM's shapes."""

from fastapi import APIRouter, Request, Response
from pydantic_core import to_json

from extensions.openai.embeddings import truncation_header
from extensions.openai.responses import build_embedding_usage, build_envelope
from extensions.openai.streaming import JsonAnswer, send_json
from extensions.openai.typing import Reranking, RerankRequest, ScoreList, ScoreRequest
from modules.context import Context


def add_routes(router: APIRouter, context: Context) -> None:
    @router.post("/v2/rerank", tags=["Embeddings"], responses={200: {"model": Reranking}})
    @router.post("/v1/rerank", tags=["Embeddings"], responses={200: {"model": Reranking}})
    @router.post("/rerank", tags=["Embeddings"], responses={200: {"model": Reranking}})
    async def rerank(request: Request, body: RerankRequest) -> Response:
        """Documents in the order of how well they answer a query, the best first."""
        return await send_json(answer_rerank(context, body), request, context.settings)

    @router.post("/v1/score", tags=["Embeddings"], responses={200: {"model": ScoreList}})
    @router.post("/score", tags=["Embeddings"], responses={200: {"model": ScoreList}})
    async def score(request: Request, body: ScoreRequest) -> Response:
        """How well pairs of texts go together: one text with each of several, or pair by pair."""
        return await send_json(answer_score(context, body), request, context.settings)


async def answer_rerank(context: Context, body: RerankRequest) -> JsonAnswer:
    """Raises what `Reranker.score` raises."""
    scored = await context.reranker.score([(body.query, text) for text in body.documents])
    ranking = (-scored.scores).argsort(kind="stable").tolist()[: body.top_n]
    results = [
        {
            "index": index,
            "relevance_score": float(scored.scores[index]),
            **({"document": {"text": body.documents[index]}} if body.return_documents else {}),
        }
        for index in ranking
    ]
    answer = {
        "id": build_envelope("rerank", scored.model).id,
        "model": scored.model,
        "results": results,
        "usage": build_embedding_usage(scored.num_tokens, scored.num_truncated),
    }
    return JsonAnswer(to_json(answer), truncation_header(scored.num_truncated))


async def answer_score(context: Context, body: ScoreRequest) -> JsonAnswer:
    """Raises what `Reranker.score` raises."""
    firsts = body.text_1 * (len(body.text_2) if len(body.text_1) == 1 else 1)
    scored = await context.reranker.score(list(zip(firsts, body.text_2, strict=True)))
    envelope = build_envelope("score", scored.model)
    answer = {
        "id": envelope.id,
        "object": "list",
        "created": envelope.created,
        "model": scored.model,
        "data": [
            {"index": index, "object": "score", "score": score}
            for index, score in enumerate(scored.scores.tolist())
        ],
        "usage": build_embedding_usage(scored.num_tokens, scored.num_truncated),
    }
    return JsonAnswer(to_json(answer), truncation_header(scored.num_truncated))
