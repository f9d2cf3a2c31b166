"""The attention function that runs inside transformers' models, over sequences packed into one row.

Registered with transformers' AttentionInterface: a model hands its queries, keys and values here
instead of to its own kernel, so any model that supports the interface is batched without a change
to its code.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from modules.engine.kv_cache import KVCache

ATTENTION_NAME = "packed_slots"


@dataclass(frozen=True, slots=True)
class Segment:
    """Positions [start, end) of one sequence; its first token is at `offset` of the row."""

    slot: int
    capacity: int
    offset: int
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """One step's segments and their cache; rides through the model as a keyword argument."""

    segments: tuple[Segment, ...]
    kv_cache: KVCache
    _masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict, init=False)

    def mask(self, segment: Segment, window: int | None, device: torch.device) -> Tensor:
        """[num_tokens, end], True where a query may look; made once a step, not once a layer."""
        key = (segment.start, segment.end, window)
        if key not in self._masks:
            queries = torch.arange(segment.start, segment.end, device=device)[:, None]
            keys = torch.arange(segment.end, device=device)[None, :]
            mask = keys <= queries
            if window is not None:
                mask &= keys > queries - window
            self._masks[key] = mask
        return self._masks[key]


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
    """Store the new keys and values, and attend each sequence to its own.

    Args:
        query: [1, num_heads, num_tokens, head_dim]; `key` and `value` with num_kv_heads.
        sliding_window: tokens that a query sees, itself included; None: all.
        softcap: scores become softcap × tanh(score / softcap) (Gemma 2).

    Returns: [1, num_tokens, num_heads, head_dim], and None for the attention weights.
    """
    # A refusal, not a gap: the probe turns it into a ModelLoadError before anything is served.
    if attention_mask is not None or s_aux is not None or position_bias is not None:
        raise NotImplementedError(f"{type(module).__name__} needs more than causal attention")
    layer = module.layer_idx
    assert isinstance(layer, int)
    output = attend_packed(
        attention_batch,
        layer,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scaling=scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return output[None], None


def attend_packed(
    batch: AttentionBatch,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`packed_attention` for `query` [num_tokens, num_heads, head_dim]; returns the same shape."""
    outputs = []
    for segment in batch.segments:
        rows = slice(segment.offset, segment.offset + segment.num_tokens)
        keys, values = batch.kv_cache.write(
            layer,
            segment.slot,
            segment.start,
            segment.capacity,
            key[rows].transpose(0, 1),
            value[rows].transpose(0, 1),
        )
        own = window if window is not None and window < segment.end else None
        if segment.num_tokens == 1 and softcap is None:
            outputs.append(_attend_one(query[rows], keys, values, scaling, own))
        else:
            is_plain = segment.start == 0 and own is None and softcap is None
            mask = None if is_plain else batch.mask(segment, own, query.device)
            attended = _attend_many(query[rows], keys, values, mask, scaling, softcap)
            outputs.append(attended)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend_one(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """One new token: `query` [1, num_heads, head_dim] over `keys` [num_kv_heads, end, head_dim].

    The heads that share keys become rows of one query, so their keys are read once.
    """
    if window is not None:
        keys, values = keys[:, -window:], values[:, -window:]
    packed = query.reshape(keys.shape[0], 1, -1, keys.shape[-1])
    output = F.scaled_dot_product_attention(packed, keys[:, None], values[:, None], scale=scaling)
    return output.reshape(1, query.shape[1], -1)


def _attend_many(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """`query` [n, num_heads, head_dim] over `keys` [num_kv_heads, end, head_dim].

    `mask` [n, end]; None: causal, from the first token on.
    """
    num_tokens, num_heads, _ = query.shape
    grouped = query.transpose(0, 1).unflatten(0, (keys.shape[0], -1))
    shape = (-1, grouped.shape[1], -1, -1)
    keys, values = keys[:, None].expand(shape), values[:, None].expand(shape)
    if softcap is not None:
        output = _softcapped_attention(grouped, keys, values, mask, scaling, softcap)
    else:
        output = F.scaled_dot_product_attention(
            grouped, keys, values, mask, is_causal=mask is None, scale=scaling
        )
    return output.flatten(0, 1).transpose(0, 1)


def _softcapped_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh((query @ keys.transpose(-1, -2)) * scale / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values


AttentionInterface.register(ATTENTION_NAME, packed_attention)
