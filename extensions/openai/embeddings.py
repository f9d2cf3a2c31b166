"""POST /v1/embeddings: texts, or token ids, as vectors."""

import asyncio
from base64 import b64encode
from collections.abc import Sequence

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray
from pydantic_core import to_json

from extensions.openai.responses import Json, build_embedding_usage
from extensions.openai.streaming import JsonAnswer, send_json
from extensions.openai.typing import EmbeddingList, EmbeddingRequest
from modules import openai_tokens
from modules.context import Context
from modules.embeddings import Embedded
from modules.errors import InvalidRequestError
from modules.sentence_encoders import TextInput

# A header with the number of texts that were longer than what the model reads.
TRUNCATED_INPUTS = "x-truncated-inputs"
# Writing more numbers than these takes a while, in which the event loop does something else.
MANY_NUMBERS = 20_000
# Significant digits that tell every 32-bit float from its neighbours.
DIGITS = 9


def add_routes(router: APIRouter, context: Context) -> None:
    @router.post("/v1/embeddings", tags=["Embeddings"], responses={200: {"model": EmbeddingList}})
    async def create_embeddings(request: Request, body: EmbeddingRequest) -> Response:
        """The vectors of texts; the nearer their meanings, the smaller the angle between them."""
        return await send_json(answer_embeddings(context, body), request, context.settings)

    @router.post(
        "/v1/engines/{engine_id:path}/embeddings",
        tags=["Older programs"],
        responses={200: {"model": EmbeddingList}},
    )
    async def create_engine_embeddings(
        request: Request, engine_id: str, body: EmbeddingRequest
    ) -> Response:
        """The same as /v1/embeddings; the embedding model answers."""
        body = body.model_copy(update={"model": engine_id})
        return await send_json(answer_embeddings(context, body), request, context.settings)


async def answer_embeddings(
    context: Context, body: EmbeddingRequest, *, is_background: bool = False
) -> JsonAnswer:
    """Raises what `Embedder.embed` raises; MissingPackageError for token ids of OpenAI's."""
    texts = await read_inputs(context, body.input, body.model)
    embedded = await context.embeddings.embed(texts, is_background=is_background)
    vectors = embedded.vectors
    if body.dimensions is not None:
        vectors = _shorten(vectors, body.dimensions, embedded.model)
    write = write_base64 if body.encoding_format == "base64" else write_numbers
    if vectors.size <= MANY_NUMBERS:
        items = write(vectors)
    else:
        items = await asyncio.to_thread(write, vectors)
    usage = build_embedding_usage(sum(embedded.num_tokens), embedded.num_truncated)
    return JsonAnswer(_join(items, embedded, usage), truncation_header(embedded.num_truncated))


def truncation_header(num_truncated: int) -> dict[str, str]:
    return {TRUNCATED_INPUTS: str(num_truncated)} if num_truncated else {}


async def read_inputs(
    context: Context, inputs: Sequence[TextInput], model: str | None
) -> Sequence[TextInput]:
    """Texts as they are, and token ids as text if they are of another than the embedding model."""
    ids = [item for item in inputs if not isinstance(item, str)]
    if not ids or model is None or context.embeddings.is_called(model):
        return inputs
    texts = await _decode(context, ids, model)
    if texts is None:
        return inputs
    empty = next((index for index, text in enumerate(texts) if not text), None)
    if empty is not None:
        raise InvalidRequestError(
            f"Invalid value for 'input[{empty}]': There is no text in its token ids.", "input"
        )
    return texts


async def _decode(
    context: Context, ids: Sequence[tuple[int, ...]], model: str
) -> Sequence[str] | None:
    """None if they are of neither the loaded model nor one of OpenAI's."""
    loaded = context.models.find(model)
    if loaded is not None:
        for item in ids:
            loaded.check_token_ids(item, "input")
        return await asyncio.to_thread(lambda: [loaded.decode(item, True) for item in ids])
    encoding = await asyncio.to_thread(openai_tokens.find_encoding, model)
    if encoding is None:
        return None
    return await asyncio.to_thread(openai_tokens.decode, ids, encoding, "input")


def _shorten(vectors: NDArray[np.float32], num_dimensions: int, model: str) -> NDArray[np.float32]:
    """The first dimensions, of length 1 again: Matryoshka embeddings (arXiv 2205.13147)."""
    most = vectors.shape[1]
    if num_dimensions > most:
        raise InvalidRequestError(
            f"Invalid value for 'dimensions': Input should be at most {most}, as {model} has no "
            "more.",
            "dimensions",
        )
    shorter = vectors[:, :num_dimensions]
    lengths = np.linalg.norm(shorter, axis=1, keepdims=True)
    shortened: NDArray[np.float32] = shorter / np.maximum(lengths, np.float32(1e-12))
    return shortened


# Vectors as JSON: most of an answer, so they are written without a detour


def write_base64(vectors: NDArray[np.float32]) -> list[bytes]:
    return [b'"%b"' % b64encode(row) for row in vectors.astype("<f4")]


def write_numbers(vectors: NDArray[np.float32]) -> list[bytes]:
    return [to_json(row) for row in _round(vectors).tolist()]


def _round(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """To the digits that a 32-bit float has: as 64-bit ones, half of those written are noise."""
    numbers = vectors.astype(np.float64)
    sizes = np.abs(numbers, where=numbers != 0, out=np.ones_like(numbers))
    # Powers of ten up to 22 are exact, and so is the division's last digit.
    decimals = np.clip(DIGITS - 1 - np.floor(np.log10(sizes)), 0, 22)
    scales = 10.0**decimals
    rounded: NDArray[np.float64] = np.rint(numbers * scales) / scales
    return rounded


def _join(items: Sequence[bytes], embedded: Embedded, usage: Json) -> bytes:
    data = b",".join(
        b'{"object":"embedding","index":%d,"embedding":%b}' % entry for entry in enumerate(items)
    )
    return b'{"object":"list","data":[%b],"model":%b,"usage":%b}' % (
        data,
        to_json(embedded.model),
        to_json(usage),
    )
