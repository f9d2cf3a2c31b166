"""Context: what an extension may touch. Built once in `server.py` and passed, never imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from modules.settings import Settings
from modules.speech import SpeechSynthesizer
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
    transcriber: Transcriber
    speech: SpeechSynthesizer

    def close(self) -> None:
        """Let everything go; what is still at work fails with a typed error."""
        self.transcriber.close()
        self.speech.close()
        self.models.unload()


def build_context(
    settings: Settings, models: ModelManager, app: FastAPI, extensions: Extensions
) -> Context:
    """With all capabilities, none of which has loaded anything yet."""
    return Context(
        settings,
        models,
        app,
        extensions,
        transcriber=Transcriber(settings),
        speech=SpeechSynthesizer(settings),
    )
