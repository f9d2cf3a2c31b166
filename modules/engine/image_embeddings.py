"""Images as the text part of a model reads them: embeddings in the places of tokens, and their
positions.

The model's own code makes them. It runs as far as the door of its text part, and what it would hand
in there is kept. So nothing here knows how a model looks at a picture, and what comes after is read
in batches as any text is: in chunks, beside others, once for all prompts that begin alike.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from modules.engine.image_inputs import ImageInputs
from modules.engine.text_part import find_text_part

# Of images that may be asked about again, at most so many bytes of embeddings are kept.
MAX_KEPT_BYTES = 2**27


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedImage:
    embeddings: Tensor
    """[num_tokens, hidden_size]"""
    positions: Tensor
    """[num_axes, num_tokens], from that on which a text in its place would begin with. Some models
    have several for each token, such as a time, a row and a column; a text's are all the same."""
    num_positions: int
    """So many further does the text after it go on."""

    @property
    def num_tokens(self) -> int:
        return len(self.embeddings)


@dataclass(frozen=True, slots=True, eq=False)
class PlacedImage:
    """An image in a prompt."""

    image: EmbeddedImage
    place: range
    """Its tokens."""
    position: int
    """What its positions begin with."""

    @property
    def shift(self) -> int:
        """Of the positions after it, to what they would be if its tokens were a text."""
        return self.image.num_positions - len(self.place)


@dataclass(frozen=True, slots=True, eq=False)
class ImageRows:
    """Rows of a step, from `start` on, that read a part of an image."""

    start: int
    embeddings: Tensor
    """[num_rows, hidden_size]"""
    positions: Tensor
    """[num_axes, num_rows]"""

    @property
    def end(self) -> int:
        return self.start + len(self.embeddings)


def place_images(
    images: Sequence[EmbeddedImage], places: Sequence[range]
) -> tuple[PlacedImage, ...]:
    placed: list[PlacedImage] = []
    shift = 0
    for image, place in zip(images, places, strict=True):
        placed.append(PlacedImage(image, place, place.start + shift))
        shift += placed[-1].shift
    return tuple(placed)


def find_positions(placed: Sequence[PlacedImage], start: int, end: int) -> Sequence[int]:
    """Of the tokens [start, end) of a prompt, as if those of the images were a text."""
    if not placed:
        return range(start, end)
    places = np.arange(start, end)
    positions = places.copy()
    for image in placed:
        positions[places >= image.place.stop] += image.shift
    numbers: list[int] = positions.tolist()
    return numbers


def find_rows(
    placed: Sequence[PlacedImage], start: int, end: int, first_row: int
) -> Iterator[ImageRows]:
    """Of the tokens [start, end) of a prompt, of which the first is in `first_row`."""
    for image in placed:
        first, stop = max(start, image.place.start), min(end, image.place.stop)
        if first < stop:
            part = slice(first - image.place.start, stop - image.place.start)
            yield ImageRows(
                first_row + first - start,
                image.image.embeddings[part],
                image.image.positions[:, part] + image.position,
            )


def insert_rows(
    rows: Sequence[ImageRows], embeddings: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """The inputs of a step that reads images: `embeddings` [1, num_rows, hidden_size], which is
    changed, and `positions` [1, num_rows], or [num_axes, 1, num_rows] if there are several.
    """
    num_axes = max(len(part.positions) for part in rows)
    positions = positions.repeat(num_axes, 1)
    for part in rows:
        own = slice(part.start, part.end)
        embeddings[0, own] = part.embeddings
        positions[:, own] = part.positions.to(positions.device)
    return embeddings, positions if num_axes == 1 else positions[:, None]


class ImageEmbedder:
    """The images of a model's prompts. Those that were seen last are not looked at again."""

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`device`: where token ids are looked up; `transform`: what makes of an image's embeddings
        those that the layers read, if that is something else.
        """
        self._model = model
        self._device = device
        self._transform = transform or (lambda embeddings: embeddings)
        self._kept: OrderedDict[tuple[int, ...], tuple[EmbeddedImage, ...]] = OrderedDict()

    def embed(self, images: ImageInputs) -> tuple[EmbeddedImage, ...]:
        """Raises ValueError where the model counts positions in a way that is not known here."""
        embedded = self._kept.pop(images.keys, None)
        if embedded is None:
            embedded = self._look_at(images)
        self._kept[images.keys] = embedded
        while len(self._kept) > 1 and self._num_kept_bytes > MAX_KEPT_BYTES:
            self._kept.popitem(last=False)
        return embedded

    def _look_at(self, images: ImageInputs) -> tuple[EmbeddedImage, ...]:
        embedded = split_images(images, record_text_inputs(self._model, images, self._device))
        return tuple(
            replace(image, embeddings=self._transform(image.embeddings)) for image in embedded
        )

    @property
    def _num_kept_bytes(self) -> int:
        return sum(image.embeddings.nbytes for images in self._kept.values() for image in images)


class _DoorReached(Exception):
    pass


def record_text_inputs(
    model: PreTrainedModel, images: ImageInputs, device: torch.device
) -> dict[str, Any]:
    """The arguments that the text part of `model` is called with for `separated_token_ids`."""
    handed: dict[str, Any] = {}

    def keep(_: object, args: tuple[object, ...], arguments: dict[str, Any]) -> None:
        handed.update(arguments)
        raise _DoorReached

    ids = images.separated_token_ids
    arguments = images.to_arguments(ids, device, model.dtype)
    text_part = find_text_part(model).module
    handle = text_part.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        model(input_ids=torch.tensor([ids], device=device), use_cache=False, **arguments)
    except _DoorReached:
        pass
    finally:
        handle.remove()
    return handed


def split_images(images: ImageInputs, handed: dict[str, Any]) -> tuple[EmbeddedImage, ...]:
    """Each image by itself, of what has been recorded for all of them.

    Raises ValueError where the model counts positions in a way that is not known here.
    """
    embeddings: Tensor = handed["inputs_embeds"][0]
    positions: Tensor | None = handed.get("position_ids")
    if positions is None:
        positions = torch.arange(len(embeddings))
    axes = positions.reshape(-1, len(embeddings)).cpu()
    embedded = []
    start = first_position = 0
    for own in images.token_ids:
        end = start + len(own)
        (after,) = set(axes[:, end].tolist())  # of a text, all are the same
        embedded.append(
            EmbeddedImage(
                embeddings[start:end].clone(),
                axes[:, start:end] - first_position,
                num_positions=after - first_position,
            )
        )
        start, first_position = end + 1, after + 1
    return tuple(embedded)
