"""ImageReader: pictures → what an image-text model reads in their places, by its own processor.

How large a picture may be, and where it comes from, is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from threading import Lock
from typing import TYPE_CHECKING, Any

from torch import Tensor

from modules.engine.image_inputs import ImageInputs
from modules.errors import InvalidRequestError, TemplateError

if TYPE_CHECKING:
    from PIL import Image

TokenIds = tuple[int, ...]

# What processors raise about pictures that they cannot read, or not together.
_FAULTS = (LookupError, RuntimeError, TypeError, ValueError)


class ImageReader:
    def __init__(self, processor: Any) -> None:
        """`processor` is transformers', with a tokenizer of its own: it may change that.

        It reads a picture at once. Raises ValueError if it does not mark images by one token, and
        what else comes out of a processor that cannot do it.
        """
        tokenizer = processor.tokenizer
        self._processor = processor
        self._lock = Lock()
        self._separator: str = tokenizer.eos_token
        self._separator_id: int = tokenizer.eos_token_id
        self.placeholder: str | None = getattr(processor, "image_token", None)
        """What the chat template writes where an image belongs."""
        if self.placeholder not in tokenizer.get_added_vocab() or self._separator is None:
            raise ValueError("it has no token for images")
        self.placeholder_id: int = tokenizer.get_added_vocab()[self.placeholder]
        self.chat_template: str | dict[str, str] | None = processor.chat_template
        self.sample = self.read([_draw_sample(64, 48)])
        """Of one small picture, to try a model with."""
        self.reads_apart = False
        """Whether the pictures of a prompt are read one by one, whatever is beside them."""

    def try_apart(self) -> None:
        """Do that from now on, if the same tokens come of it, as of most processors."""
        pictures = [_draw_sample(64, 48), _draw_sample(200, 80)]
        try:
            alone = [self.read([picture]).token_ids[0] for picture in pictures]
            self.reads_apart = self.read(pictures).token_ids == tuple(alone)
        except _FAULTS:  # then only a prompt that has such pictures must fail
            self.reads_apart = False

    def read(self, pictures: Sequence[Image.Image]) -> ImageInputs:
        """At least one, together. How many tokens one has may depend on the others."""
        text = f"{self.placeholder}{self._separator}" * len(pictures)
        with self._lock:
            features = self._processor(
                text=[text], images=[list(pictures)], add_special_tokens=False, return_tensors="pt"
            )
        ids = features.pop("input_ids")
        features.pop("attention_mask", None)
        kinds = [name for name, value in features.items() if _is_per_token(name, value, ids)]
        whole = ids[0].tolist()
        token_kinds = {name: _to_kinds(whole, features.pop(name)[0].tolist()) for name in kinds}
        token_ids = _split(whole, self._separator_id)
        if len(token_ids) != len(pictures):
            raise ValueError("it does not write one place for each image")
        keys = tuple(map(_to_key, pictures, token_ids))
        return ImageInputs(token_ids, keys, self._separator_id, dict(features), token_kinds)


def _draw_sample(width: int, height: int) -> Image.Image:
    from PIL import Image

    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


@dataclass(frozen=True, slots=True)
class ShownImage:
    picture: Image.Image
    """In RGB."""
    param: str
    """Wire name of the part that it came in, for errors."""


class RequestImages:
    """The images of one request. Those that stay in its prompt are read once."""

    def __init__(self, reader: ImageReader, images: Sequence[ShownImage]) -> None:
        self._reader = reader
        self._images = tuple(images)
        self._known: dict[tuple[int, ...], ImageInputs] = {}

    def place(
        self, numbers: tuple[int, ...], token_ids: TokenIds
    ) -> tuple[TokenIds, tuple[ImageInputs, ...]]:
        """A prompt with the tokens of the images of these numbers, and what else the model needs.

        Raises TemplateError where the prompt has not as many places, and InvalidRequestError where
        the model cannot read an image.
        """
        place = self._reader.placeholder_id
        if token_ids.count(place) != len(numbers):
            raise TemplateError("The chat template does not write one place per image.", "messages")
        images = self._read(numbers)
        rest = chain.from_iterable(group.token_ids for group in images)
        expanded = (next(rest) if token_id == place else (token_id,) for token_id in token_ids)
        return tuple(chain.from_iterable(expanded)), images

    def count_tokens(self) -> list[int]:
        """Of each image, where all of them are in the prompt. Raises InvalidRequestError."""
        groups = self._read(tuple(range(len(self._images))))
        return [len(token_ids) for group in groups for token_ids in group.token_ids]

    def _read(self, numbers: tuple[int, ...]) -> tuple[ImageInputs, ...]:
        groups = [(number,) for number in numbers] if self._reader.reads_apart else [numbers]
        return tuple(map(self._read_together, groups))

    def _read_together(self, numbers: tuple[int, ...]) -> ImageInputs:
        if numbers not in self._known:
            shown = [self._images[number] for number in numbers]
            try:
                self._known[numbers] = self._reader.read([image.picture for image in shown])
            except ValueError:
                raise self._blame(shown) from None
        return self._known[numbers]

    def _blame(self, shown: Sequence[ShownImage]) -> InvalidRequestError:
        """The error that names the first one that the processor refuses by itself."""
        for image in shown:
            try:
                self._reader.read([image.picture])
            except ValueError as error:
                return InvalidRequestError(
                    f"This model cannot read the image: {error}.", image.param
                )
        return InvalidRequestError("This model cannot read these images together.", "messages")


def _to_key(picture: Image.Image, token_ids: TokenIds) -> int:
    """As many tokens of the same picture, from the same processor, look the same."""
    digest = blake2b(repr((picture.mode, picture.size, token_ids)).encode(), digest_size=16)
    digest.update(picture.tobytes())
    return int.from_bytes(digest.digest())


def _is_per_token(name: str, value: Any, ids: Tensor) -> bool:
    return name.endswith("token_type_ids") and value.shape == ids.shape


def _to_kinds(token_ids: list[int], numbers: list[int]) -> dict[int, int]:
    """Raises ValueError if they are no matter of the token alone."""
    kinds = dict(zip(token_ids, numbers, strict=True))
    if [kinds[token_id] for token_id in token_ids] != numbers:
        raise ValueError("its kinds of tokens depend on more than the token")
    return {token_id: number for token_id, number in kinds.items() if number}


def _split(token_ids: list[int], separator_id: int) -> tuple[TokenIds, ...]:
    """After each part there is a separator."""
    ends = [index for index, token_id in enumerate(token_ids) if token_id == separator_id]
    starts = [0, *(end + 1 for end in ends)]
    return tuple(tuple(token_ids[start:end]) for start, end in zip(starts, ends, strict=False))
