"""ImageInputs: what a model is given of images, beside the tokens that stand for them.

Knows nothing of pictures, nor how they became tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ImageInputs:
    """Of images that were read together, in the order of their prompt. Of one, if those beside it
    change nothing.
    """

    token_ids: tuple[tuple[int, ...], ...]
    """Of each image, what stands for it in the prompt."""
    keys: tuple[int, ...]
    """Of each image a number, not negative, that no image has which looks another way."""
    separator_id: int
    """A token of text, to tell by it where an image ends."""
    tensors: Mapping[str, Tensor]
    """Of all images together, by the names of the model's own arguments."""
    token_kinds: Mapping[str, Mapping[int, int]]
    """Of arguments that have a number for each token: those of the token ids that are no text."""

    @property
    def separated_token_ids(self) -> tuple[int, ...]:
        """A prompt of nothing but the images, a separator after each."""
        return tuple(chain.from_iterable((*own, self.separator_id) for own in self.token_ids))

    def find_places(self, token_ids: Sequence[int], start: int) -> list[range]:
        """Where in a prompt each image is, from `start` on. Raises ValueError if it does not have
        them, in order, or if one has no tokens.
        """
        if not all(self.token_ids):
            raise ValueError("an image has no tokens")
        places = []
        for own in self.token_ids:
            start = token_ids.index(own[0], start)
            while tuple(token_ids[start : start + len(own)]) != own:
                start = token_ids.index(own[0], start + 1)
            places.append(range(start, start + len(own)))
            start += len(own)
        return places

    def to_arguments(
        self, token_ids: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """For a model that reads `token_ids` from their start."""
        arguments = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None)
            for name, tensor in self.tensors.items()
        }
        for name, kinds in self.token_kinds.items():
            numbers = [kinds.get(token_id, 0) for token_id in token_ids]
            arguments[name] = torch.tensor([numbers], device=device)
        return arguments
