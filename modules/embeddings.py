"""Embedder: texts → vectors whose angles say how near their meanings are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modules.batch_worker import BatchWorker
from modules.sentence_encoders import SentenceEncoder, TextInput, load_sentence_transformer
from modules.settings import Settings


@dataclass(frozen=True, slots=True)
class Embedded:
    vectors: NDArray[np.float32]
    """[number of texts, dimensions], of length 1, in the order of the texts."""
    num_tokens: tuple[int, ...]
    """Of each text, as the model has read it, special tokens included."""
    num_truncated: int
    """Texts that were longer than what the model reads."""
    model: str


class Embedder:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._name = settings.embedding_model
        self._worker: BatchWorker[TextInput] = BatchWorker("embeddings", self._load)

    async def embed(self, texts: Sequence[TextInput], *, is_background: bool = False) -> Embedded:
        """Texts, or token ids of the model's own. What is in the background waits for all others.

        Raises: MissingPackageError, NotConfiguredError, ModelLoadError if the model cannot be had;
        InvalidRequestError for token ids that it does not know; CapabilityError once closed.
        """
        computed = await self._worker.run(texts, is_background=is_background)
        return Embedded(computed.rows, computed.num_tokens, computed.num_truncated, self._name)

    @property
    def loaded_name(self) -> str | None:
        """Of the model, once it is in memory."""
        return self._name if self._worker.is_loaded else None

    def is_called(self, name: str) -> bool:
        """Whether a client who says so means this model; its owner's name may be left out."""
        wished = self._settings.embedding_model
        names = {each.lower() for each in (wished, Path(wished).name, self._name)}
        return name.lower().removeprefix("sentence-transformers/") in names or name.lower() in names

    def close(self) -> None:
        self._worker.close()

    def _load(self) -> SentenceEncoder:
        encoder = load_sentence_transformer(self._settings.embedding_model, self._settings)
        self._name = encoder.name
        return encoder
