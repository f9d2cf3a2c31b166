"""Moderator: texts → how likely each belongs to each of OpenAI's categories of harmful text.

A long text is judged window by window, and gets the highest score that any of them has: nothing
hides among harmless sentences, or behind what a model reads of a text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from modules.embeddings import Embedder
from modules.moderation_classifier import ClassifierJudge
from modules.moderation_examples import (
    CATEGORIES,
    Calibration,
    Regression,
    calibrate,
    fit,
    load_calibration,
    load_examples,
)
from modules.moderation_windows import Judged, Window, split_text
from modules.settings import PROJECT_ROOT, Settings
from modules.worker import Worker

THRESHOLD = 0.5


@dataclass(frozen=True, slots=True)
class Moderation:
    model: str
    scores: tuple[Mapping[str, float], ...]
    """Of each text, by category."""


class Judge(Protocol):
    window: Window

    @property
    def loaded_name(self) -> str | None: ...

    async def judge(self, texts: Sequence[str]) -> Judged: ...

    def close(self) -> None: ...


class Moderator:
    def __init__(self, settings: Settings, embedder: Embedder, root: Path = PROJECT_ROOT) -> None:
        self._judge: Judge = (
            ClassifierJudge(settings.moderation_model, settings)
            if settings.moderation_model
            else ExampleJudge(embedder, root)
        )

    @property
    def loaded_name(self) -> str | None:
        """Of the classifier, once it is in memory; None too where the embedding model judges."""
        return self._judge.loaded_name

    async def moderate(self, texts: Sequence[str]) -> Moderation:
        """One or more texts, none of them empty.

        Raises: MissingPackageError, NotConfiguredError, ModelLoadError if the model cannot be had,
        or moderation/*.yaml cannot be read; CapabilityError once closed.
        """
        window = self._judge.window
        windows = await asyncio.to_thread(lambda: [split_text(text, window) for text in texts])
        judged = await self._judge.judge([each for group in windows for each in group])
        starts = np.cumsum([0, *map(len, windows[:-1])])
        scores = _raise_parents(np.maximum.reduceat(judged.scores, starts, axis=0))
        return Moderation(
            judged.model,
            tuple(dict(zip(CATEGORIES, row, strict=True)) for row in scores.tolist()),
        )

    def close(self) -> None:
        self._judge.close()


class ExampleJudge:
    """Compares texts with the examples of `moderation/`, by the embedding model."""

    # The examples are single sentences; in a longer text, one sentence among others counts little.
    window = Window(max_words=20, max_bytes=240)

    def __init__(self, embedder: Embedder, root: Path) -> None:
        self._embedder = embedder
        self._root = root
        self._worker = Worker("moderations", lambda: None)
        self._loading = asyncio.Lock()
        self._loaded: tuple[Regression, Calibration] | None = None

    @property
    def loaded_name(self) -> None:
        return None

    async def judge(self, texts: Sequence[str]) -> Judged:
        regression, calibration = await self._get_loaded()
        embedded = await self._embedder.embed(texts)

        def score(_: None) -> NDArray[np.float64]:
            return calibration.to_probabilities(regression.compute(embedded.vectors))

        return Judged(embedded.model, await self._worker.run(score))

    def close(self) -> None:
        self._worker.close()

    async def _get_loaded(self) -> tuple[Regression, Calibration]:
        async with self._loading:
            if self._loaded is None:
                self._loaded = await self._load()
            return self._loaded

    async def _load(self) -> tuple[Regression, Calibration]:
        examples = await self._worker.run(lambda _: load_examples(self._root))
        embedded = await self._embedder.embed(examples.texts)

        def learn(_: None) -> tuple[Regression, Calibration]:
            regression, left_out = fit(embedded.vectors, examples.labels)
            known = load_calibration(self._root, embedded.model, examples)
            return regression, known or calibrate(left_out, examples.labels)

        return await self._worker.run(learn)


def _raise_parents(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """What is hate/threatening is hate."""
    raised = scores.copy()
    for child, name in enumerate(CATEGORIES):
        if "/" in name:
            parent = CATEGORIES.index(name.partition("/")[0])
            raised[:, parent] = np.maximum(raised[:, parent], raised[:, child])
    return raised
