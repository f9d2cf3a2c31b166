"""The attention function that runs inside transformers' models, over sequences packed into one row.

Registered with transformers' AttentionInterface: a model hands its queries, keys and values here
instead of to its own kernel, so any model that supports the interface is batched without a change
to its code. How it is computed, and where keys and values are kept, is a backend's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION_NAME = "packed_blocks"


@dataclass(frozen=True, slots=True)
class Segment:
    """Positions [start, end) of one sequence; its first token is at `offset` of the row.

    A sequence may have several in a batch, one after the other: each sees those before it.
    """

    block_table: tuple[int, ...]
    """Where its keys and values are, from position 0 on."""
    offset: int
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


class AttentionBatch(Protocol):
    """One step's segments and their cache; rides through the model as a keyword argument."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Store the new keys and values, and attend each sequence to its own, causally.

        Args:
            query: [num_tokens, num_heads, head_dim]; `key` and `value` with num_kv_heads.
            scaling: of the scores; None: 1 / sqrt(head_dim).
            window: tokens that a query sees, itself included; None: all.
            softcap: scores become softcap × tanh(score / softcap) (Gemma 2).
            sinks: [num_heads], one more logit in each softmax, of nothing (gpt-oss).

        Returns: [num_tokens, num_heads, head_dim].
        """
        ...


class PagedAttention(Protocol):
    """A backend: it has memory for a number of blocks of keys and values, and attends to them."""

    @property
    def num_bytes_per_token(self) -> int:
        """What the keys and values of a token take in all layers that have been written."""
        ...

    def batch(self, segments: tuple[Segment, ...]) -> AttentionBatch: ...


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attention_batch: AttentionBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """`AttentionBatch.attend` with the signature that transformers' models call.

    `query` [1, num_heads, num_tokens, head_dim]; `key` and `value` with num_kv_heads.

    Returns: [1, num_tokens, num_heads, head_dim], and None for the attention weights.
    """
    # A refusal, not a gap: the probe turns it into a ModelLoadError before anything is served.
    if attention_mask is not None or position_bias is not None:
        raise NotImplementedError(f"{type(module).__name__} needs more than causal attention")
    layer = module.layer_idx
    assert isinstance(layer, int)
    output = attention_batch.attend(
        layer,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scaling=scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return output[None], None


AttentionInterface.register(ATTENTION_NAME, packed_attention)
