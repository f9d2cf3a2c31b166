"""The part of a model that reads texts: from its embeddings to what its head reads.

A model that only reads texts has little else; one that sees has the part that sees beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class TextPart:
    path: str
    """Of `module` in its model; empty if it is the model itself."""
    module: Any

    def to_path(self, name: str) -> str:
        """That of a module of the part, by its name there."""
        return f"{self.path}.{name}" if self.path else name


def find_text_part(model: PreTrainedModel) -> TextPart:
    """What transformers calls the model's decoder; some call a layer of their head so."""
    module = model.get_decoder()
    if not isinstance(module, PreTrainedModel):
        module = model.base_model
    return TextPart(next(path for path, each in model.named_modules() if each is module), module)
