"""What a model's head reads: the last hidden state of each row whose logits are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


@contextmanager
def record_hidden_states(model: PreTrainedModel, is_wanted: bool) -> Iterator[list[Tensor]]:
    """Fills the list: a tensor [num_rows, hidden_size], float32, on the host, for each call of the
    head meanwhile. Else it stays empty.
    """
    if not is_wanted:
        yield []
        return
    head: Any = model.get_output_embeddings()
    restore = getattr(head, "restore", lambda states: states)
    recorded: list[Tensor] = []

    def record(_: object, inputs: tuple[Tensor, ...]) -> None:
        recorded.append(restore(inputs[0].flatten(0, -2).float()).cpu())

    handle = head.register_forward_pre_hook(record)
    try:
        yield recorded
    finally:
        handle.remove()
