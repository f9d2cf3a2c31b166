"""What the loading of a model tells of itself while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class LoadStage(StrEnum):
    """In this order; those that a model does not need are left out."""

    FINDING = "finding"
    DOWNLOADING = "downloading"
    CONVERTING = "converting"
    LOADING_WEIGHTS = "loading weights"
    TRYING_OUT = "trying out"
    READY = "ready"


@dataclass(frozen=True, slots=True)
class LoadProgress:
    stage: LoadStage
    fraction: float | None = None
    """How much of this stage is done, where that is known."""


Report = Callable[[LoadProgress], None]
"""Called in the thread that loads."""


def report_nothing(progress: LoadProgress) -> None:
    """For those who only want the model."""
