"""Context: what an extension may touch. Built once in `server.py` and passed, never imported."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from modules.embeddings import Embedder
from modules.images import Images
from modules.moderation import Moderator
from modules.reranking import Reranker
from modules.settings import Settings
from modules.speech import SpeechSynthesizer
from modules.storage import Storage
from modules.transcription import Transcriber

if TYPE_CHECKING:  # names only: the web framework is not for this layer, and torch loads slowly
    from fastapi import FastAPI

    from modules.extensions import Extensions
    from modules.models import ModelManager


@dataclass(frozen=True, slots=True)
class Context:
    settings: Settings
    models: ModelManager
    app: FastAPI
    extensions: Extensions
    embeddings: Embedder
    reranker: Reranker
    moderation: Moderator
    images: Images
    storage: Storage
    transcriber: Transcriber
    speech: SpeechSynthesizer
    services: list[Callable[[], Awaitable[None]]] = field(default_factory=list)
    """Coroutine functions that run beside the requests, until they are cancelled: from when the
    server can be reached until it shuts down. An extension's `setup` may add some."""

    def close(self) -> None:
        """Let everything go; what is still at work fails with a typed error."""
        self.moderation.close()
        self.embeddings.close()
        self.reranker.close()
        self.images.close()
        self.transcriber.close()
        self.speech.close()
        self.models.close()
        self.storage.close()


def build_context(
    settings: Settings, models: ModelManager, app: FastAPI, extensions: Extensions
) -> Context:
    """With all capabilities, none of which has loaded anything yet."""
    embeddings = Embedder(settings)
    return Context(
        settings,
        models,
        app,
        extensions,
        embeddings=embeddings,
        reranker=Reranker(settings, embeddings),
        moderation=Moderator(settings, embeddings),
        images=Images(settings),
        storage=Storage(settings),
        transcriber=Transcriber(settings),
        speech=SpeechSynthesizer(settings),
        services=[models.unload_idle] if settings.idle_timeout else [],
    )
