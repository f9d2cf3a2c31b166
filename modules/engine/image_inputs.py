"""ImageInputs: what a model is given of images, beside the tokens that stand for them.

Knows nothing of pictures, nor how they became tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ImageInputs:
    """Of all images of one prompt, by the names of the model's own arguments."""

    tensors: Mapping[str, Tensor]
    """In the order of the images' tokens, as the model wants them."""
    token_kinds: Mapping[str, Mapping[int, int]]
    """Of arguments that have a number for each token: those of the token ids that are no text."""

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
