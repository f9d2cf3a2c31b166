"""Images as the text part of a model reads them: embeddings in the places of tokens, and their
positions.

The model's own code makes them. It runs as far as the door of its text part, and what it would hand
in there is kept. So nothing here knows how a model looks at a picture, and what comes after is read
in batches as any text is: in chunks, beside others, once for all prompts that begin alike.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
    additions: Tensor
    """[num_layers, num_tokens, hidden_size], what is added to the results of the first layers; with
    most models, of none."""

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
    additions: Tensor
    """[num_layers, num_rows, hidden_size]"""

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
                image.image.additions[:, part],
            )


def build_inputs(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, rows: Sequence[ImageRows]
) -> dict[str, Tensor]:
    """`model`'s arguments for a step that reads `rows` too; `ids` and `positions` [1, num_rows]."""
    if not rows:
        return {"input_ids": ids, "position_ids": positions}
    embed: Any = model.get_input_embeddings()
    embeddings: Tensor = embed(ids)
    num_axes = max(len(part.positions) for part in rows)
    axes = positions.repeat(num_axes, 1)
    for part in rows:
        own = slice(part.start, part.end)
        embeddings[0, own] = part.embeddings
        axes[:, own] = part.positions.to(axes.device)
    # A model that has several wants them as [num_axes, 1, num_rows].
    return {"inputs_embeds": embeddings, "position_ids": axes if num_axes == 1 else axes[:, None]}


@contextmanager
def added(model: PreTrainedModel, rows: Sequence[ImageRows], num_rows: int) -> Iterator[None]:
    """Meanwhile the text part of `model` is called with what `rows` add, in a step of `num_rows`.

    The arguments are those of the DeepStack models of transformers (Meng et al. 2024), which make
    them of images only.
    """
    if not any(len(part.additions) for part in rows):
        yield
        return
    mask = torch.zeros(1, num_rows, dtype=torch.bool)
    for part in rows:
        mask[0, part.start : part.end] = True
    additions = torch.cat([part.additions for part in rows], dim=1)
    more = {"visual_pos_masks": mask.to(additions.device), "deepstack_visual_embeds": [*additions]}
    handle = find_text_part(model).module.register_forward_pre_hook(
        lambda _, args, arguments: (args, {**arguments, **more}), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


class ImageEmbedder:
    """The images of a model's prompts. Those that were seen lately are not looked at again."""

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`device`: where token ids are looked up; `transform`: what makes of what the model sees
        the embeddings that its layers read, if its own embeddings have been changed.
        """
        self._model = model
        self._device = device
        self._transform = transform
        self._kept: OrderedDict[tuple[int, ...], tuple[EmbeddedImage, ...]] = OrderedDict()

    def embed(self, images: ImageInputs) -> tuple[EmbeddedImage, ...]:
        """Each of `images`. Raises what `split_images` raises."""
        embedded = self._kept.pop(images.keys, None)
        if embedded is None:
            embedded = self._look_at(images)
        self._kept[images.keys] = embedded
        while len(self._kept) > 1 and self._num_kept_bytes > MAX_KEPT_BYTES:
            self._kept.popitem(last=False)
        return embedded

    def _look_at(self, images: ImageInputs) -> tuple[EmbeddedImage, ...]:
        handed = record_text_inputs(self._model, images, self._device)
        if self._transform is not None:
            embed: Any = self._model.get_input_embeddings()
            embeddings: Tensor = handed["inputs_embeds"]
            ids = torch.tensor([images.separated_token_ids], device=self._device)
            # An image's tokens may be words too, such as marks between its rows.
            seen = (embeddings != embed(ids)).any(-1)
            embeddings[seen] = self._transform(embeddings[seen])
        return split_images(images, handed)

    @property
    def _num_kept_bytes(self) -> int:
        kept = [image for images in self._kept.values() for image in images]
        return sum(image.embeddings.nbytes + image.additions.nbytes for image in kept)


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

    Raises ValueError unless a text has, after an image as well, the same number on all axes: then
    positions do not go on one by one.
    """
    embeddings: Tensor = handed["inputs_embeds"][0]
    positions: Tensor | None = handed.get("position_ids")
    if positions is None:
        positions = torch.arange(len(embeddings))
    axes = positions.reshape(-1, len(embeddings)).cpu()
    additions = _collect_additions(handed, embeddings)
    embedded = []
    start = first_position = 0
    for own in images.token_ids:
        end = start + len(own)
        after, *others = axes[:, end].tolist()
        if others != [after] * len(others):
            raise ValueError("the position of a text differs from axis to axis")
        embedded.append(
            EmbeddedImage(
                embeddings[start:end].clone(),
                axes[:, start:end] - first_position,
                num_positions=after - first_position,
                additions=additions[:, start:end].clone(),
            )
        )
        start, first_position = end + 1, after + 1
    return tuple(embedded)


def _collect_additions(handed: dict[str, Any], embeddings: Tensor) -> Tensor:
    """[num_layers, num_tokens, hidden_size], of all tokens; those of a text add nothing."""
    layers: Sequence[Tensor] = handed.get("deepstack_visual_embeds") or ()
    additions = embeddings.new_zeros(len(layers), *embeddings.shape)
    for addition, layer in zip(additions, layers, strict=True):
        addition[handed["visual_pos_masks"][0]] = layer
    return additions
