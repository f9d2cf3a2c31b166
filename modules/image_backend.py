"""What makes pictures, as seen from outside: requests and pictures as plain data, one protocol.

Who makes them, and how, is behind the protocol; files and formats are `image_files.py`'s.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol

# Of what the models that are about can take: their pictures are eight times as wide as their own.
SIZE_STEP = 8


class Size(NamedTuple):
    """In pixels."""

    width: int
    height: int

    @property
    def num_pixels(self) -> int:
        return self.width * self.height

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class ImageFormat(StrEnum):
    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"


@dataclass(frozen=True, slots=True)
class OutputFormat:
    format: ImageFormat = ImageFormat.PNG
    quality: int = 100
    """Of JPEG and WebP, 0 to 100; PNG loses nothing."""


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """What every request for pictures may say. None leaves the choice to the backend."""

    prompt: str = ""
    negative_prompt: str = ""
    num_images: int = 1
    size: Size | None = None
    steps: int | None = None
    effort: float = 1.0
    """In times of the steps that the backend takes of its own accord."""
    seed: int | None = None
    """Of the first picture; the next one has the next seed."""
    sampler_name: str | None = None
    guidance_scale: float | None = None
    num_partial_images: int = 0
    """How many pictures that are not finished yet are wanted, at most, of all together."""
    output: OutputFormat = field(default_factory=OutputFormat)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    options: ImageOptions
    size: Size


@dataclass(frozen=True, slots=True)
class EditRequest:
    options: ImageOptions
    size: Size
    image: bytes
    """An RGB picture of that size, as PNG."""
    mask: bytes | None
    """Of that size too, a grey PNG: white where to edit, black elsewhere. None: everywhere."""
    strength: float
    """How far from the picture: 0 is the picture itself, 1 only keeps what is outside the mask."""


@dataclass(frozen=True, slots=True)
class VariationRequest:
    options: ImageOptions
    size: Size
    image: bytes
    """As in EditRequest."""
    strength: float


Request = GenerationRequest | EditRequest | VariationRequest


@dataclass(frozen=True, slots=True)
class PartialImage:
    """What the next picture is like so far; it may be smaller."""

    data: bytes
    size: Size


@dataclass(frozen=True, slots=True)
class FinishedImage:
    data: bytes
    size: Size
    revised_prompt: str | None = None
    """What it was made of, where that is not the prompt as it was sent."""


ImageEvent = PartialImage | FinishedImage


class ImageBackend(Protocol):
    """Closing one of its streams stops the work. They raise BackendError."""

    async def prepare(self) -> Size:
        """Find out, before anything is promised, whether it can work at all.

        Returns the size of its pictures where none is asked for. Raises CapabilityError.
        """
        ...

    async def check(self, request: Request) -> None:
        """Refuse, before anything is promised, what it knows that it cannot do. It has been
        prepared. Raises InvalidRequestError and CapabilityError.
        """
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[ImageEvent, None]: ...

    def edit(self, request: EditRequest) -> AsyncGenerator[ImageEvent, None]: ...

    def vary(self, request: VariationRequest) -> AsyncGenerator[ImageEvent, None]: ...

    def close(self) -> None: ...
