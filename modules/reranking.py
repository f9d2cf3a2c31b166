"""Reranker: how well texts go together, by a cross-encoder or by the angle of their vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modules.batch_worker import BatchWorker
from modules.embeddings import Embedder
from modules.sentence_encoders import PairInput, SentenceEncoder, load_cross_encoder
from modules.settings import Settings


@dataclass(frozen=True, slots=True)
class Scored:
    scores: NDArray[np.float32]
    """[number of pairs], in their order; higher is nearer. Cosines are from -1 to 1."""
    num_tokens: int
    """That the model has read, special tokens included."""
    num_truncated: int
    """Pairs, or texts of pairs, that were longer than what the model reads."""
    model: str


class Reranker:
    def __init__(self, settings: Settings, embedder: Embedder) -> None:
        self._settings = settings
        self._embedder = embedder
        self._name = settings.rerank_model or ""
        self._worker: BatchWorker[PairInput] = BatchWorker("scores", self._load)

    @property
    def loaded_name(self) -> str | None:
        """Of the cross-encoder, once it is in memory."""
        return self._name if self._worker.is_loaded else None

    async def score(self, pairs: Sequence[PairInput]) -> Scored:
        """Raises what `Embedder.embed` raises."""
        if not self._name:
            return await compare(self._embedder, pairs)
        computed = await self._worker.run(pairs)
        num_tokens = sum(computed.num_tokens)
        return Scored(computed.rows, num_tokens, computed.num_truncated, self._name)

    def close(self) -> None:
        self._worker.close()

    def _load(self) -> SentenceEncoder:
        encoder = load_cross_encoder(self._name, self._settings)
        self._name = encoder.name
        return encoder


async def compare(embedder: Embedder, pairs: Sequence[PairInput]) -> Scored:
    """The cosines of the texts' vectors. A text that is in several pairs is read once."""
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    rows = {text: row for row, text in enumerate(texts)}
    embedded = await embedder.embed(texts)
    firsts, seconds = (embedded.vectors[[rows[pair[i]] for pair in pairs]] for i in (0, 1))
    scores = np.einsum("ij,ij->i", firsts, seconds)
    return Scored(scores, sum(embedded.num_tokens), embedded.num_truncated, embedded.model)
