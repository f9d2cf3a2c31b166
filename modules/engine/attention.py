"""The attention function that runs inside transformers' models, over sequences packed into one row.

Registered with transformers' AttentionInterface: a model hands its queries, keys and values here
instead of to its own kernel, so any model that supports the interface is batched without a change
to its code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

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
    _masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

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
    if attention_mask is not None or s_aux is not None or position_bias is not None:
        raise NotImplementedError(f"{type(module).__name__} needs more than causal attention")
    layer = module.layer_idx
    assert isinstance(layer, int)
    attend = partial(
        _attend, attention_batch, scaling=scaling, window=sliding_window, softcap=softcap
    )
    outputs = []
    for segment in attention_batch.segments:
        row = slice(segment.offset, segment.offset + segment.num_tokens)
        keys, values = attention_batch.kv_cache.write(
            layer, segment.slot, segment.start, segment.capacity, key[0, :, row], value[0, :, row]
        )
        outputs.append(attend(segment, query[0, :, row], keys, values))
    return torch.cat(outputs, dim=1).transpose(0, 1)[None], None


def _attend(
    batch: AttentionBatch,
    segment: Segment,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One sequence: `query` [num_heads, n, head_dim] over `keys` [num_kv_heads, end, head_dim]."""
    num_heads, num_tokens, _ = query.shape
    num_kv_heads = keys.shape[0]
    if window is not None and window >= segment.end:
        window = None
    if num_tokens == 1 and window is not None:
        keys, values, window = keys[:, -window:], values[:, -window:], None
    if num_tokens == 1 and softcap is None:
        # The heads that share keys become rows of one query: keys are read once for all of them.
        packed = query.reshape(num_kv_heads, 1, num_heads // num_kv_heads, -1)
        output = F.scaled_dot_product_attention(
            packed, keys[:, None], values[:, None], scale=scaling
        )
        return output.reshape(num_heads, 1, -1)

    grouped = query.unflatten(0, (num_kv_heads, num_heads // num_kv_heads))
    shape = (-1, grouped.shape[1], -1, -1)
    keys, values = keys[:, None].expand(shape), values[:, None].expand(shape)
    if softcap is not None:
        mask = None if num_tokens == 1 else batch.mask(segment, window, query.device)
        output = _softcapped_attention(grouped, keys, values, mask, scaling, softcap)
    elif segment.start == 0 and window is None:
        output = F.scaled_dot_product_attention(
            grouped, keys, values, is_causal=num_tokens > 1, scale=scaling
        )
    else:
        mask = batch.mask(segment, window, query.device)
        output = F.scaled_dot_product_attention(grouped, keys, values, mask, scale=scaling)
    return output.flatten(0, 1)


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
