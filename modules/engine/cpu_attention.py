"""Paged attention on the CPU: lays out keys and values for the compiled functions, and calls them.

A row's attention is rounded in the same way alone or in company, in one chunk or in many.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modules.engine import cpu_kernels
from modules.engine.attention import Segment

Stored = NDArray[Any]

ROWS_PER_TILE = 24
"""Queries × heads that share keys, which read a block of keys together."""


class CpuAttention:
    """See `PagedAttention`. Keys and values are float32, or bfloat16, as uint16."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if block_size != cpu_kernels.PANEL:
            raise ValueError(f"a block must have {cpu_kernels.PANEL} tokens")
        self._num_blocks = num_blocks
        self._caches: dict[tuple[int, int], tuple[Stored, Stored]] = {}

    @property
    def num_bytes_per_token(self) -> int:
        stores = [store for pair in self._caches.values() for store in pair]
        return sum(store.nbytes for store in stores) // (self._num_blocks * cpu_kernels.PANEL)

    def batch(self, segments: tuple[Segment, ...]) -> CpuAttentionBatch:
        return CpuAttentionBatch(segments, self)

    def caches(
        self,
        first: int,
        count: int,
        num_kv_heads: int,
        key_dim: int,
        value_dim: int,
        is_short: bool,
    ) -> tuple[Stored, Stored]:
        """Keys and values of `count` layers from `first` on, as `cpu_kernels.store` wants them."""
        if (first, count) not in self._caches:
            lanes = cpu_kernels.UNIT.lanes
            padded_dim = -(-value_dim // lanes) * lanes
            shape = (count, self._num_blocks, num_kv_heads)
            dtype = np.uint16 if is_short else np.float32
            # The operating system's zeros: memory is taken when a block is first written.
            self._caches[first, count] = (
                np.zeros((*shape, key_dim, cpu_kernels.PANEL), dtype),
                np.zeros((*shape, cpu_kernels.PANEL, padded_dim), dtype),
            )
        return self._caches[first, count]


class CpuAttentionBatch:
    """See `AttentionBatch`."""

    def __init__(self, segments: tuple[Segment, ...], attention: CpuAttention) -> None:
        self._attention = attention
        self._offsets = np.array([segment.offset for segment in segments])
        self._starts = np.array([segment.start for segment in segments])
        self._ends = np.array([segment.end for segment in segments])
        most_blocks = max(len(segment.block_table) for segment in segments)
        self._tables = np.zeros((len(segments), most_blocks), np.int64)
        for row, segment in zip(self._tables, segments, strict=True):
            row[: len(segment.block_table)] = segment.block_table
        self._segments: dict[int, cpu_kernels.Segments] = {}

    def caches(self, num_layers: int, num_kv_heads: int, head_dim: int) -> tuple[Stored, Stored]:
        """Of all layers at once, in bfloat16."""
        return self._attention.caches(0, num_layers, num_kv_heads, head_dim, head_dim, True)

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
        queries, keys, values = (_to_heads(tensor) for tensor in (query, key, value))
        caches = self._attention.caches(
            layer, 1, keys.num_heads, keys.head_dim, values.head_dim, key.dtype == torch.bfloat16
        )
        key_cache, value_cache = (cache[0] for cache in caches)
        segments = self.segments(queries.num_heads // keys.num_heads)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        masking = cpu_kernels.Masking(
            np.float32(scale),
            window or 0,
            np.float32(softcap or 0),
            cpu_kernels.NO_SINKS if sinks is None else sinks.detach().float().numpy(),
        )
        cpu_kernels.store(keys, values, segments, key_cache, value_cache)
        output = np.empty((len(query), queries.num_heads * values.head_dim), np.float32)
        cpu_kernels.attend(queries, segments, masking, key_cache, value_cache, output)
        result: Tensor = torch.from_numpy(output).view(len(query), queries.num_heads, -1)
        return result.to(query.dtype)

    def segments(self, group: int) -> cpu_kernels.Segments:
        """`group`: heads that share keys; they decide how many tokens make a tile."""
        if group not in self._segments:
            size = max(1, ROWS_PER_TILE // group)
            tiles = [
                (number, offset + position - start, position, min(size, end - position))
                for number, (offset, start, end) in enumerate(
                    zip(self._offsets, self._starts, self._ends, strict=True)
                )
                for position in range(start, end, size)
            ]
            self._segments[group] = cpu_kernels.Segments(
                self._offsets, self._starts, self._ends, self._tables, np.array(tiles, np.int64)
            )
        return self._segments[group]


def _to_heads(tensor: Tensor) -> cpu_kernels.Heads:
    """`tensor`: [num_tokens, num_heads, head_dim]."""
    _, num_heads, head_dim = tensor.shape
    rows = tensor.float().flatten(1).contiguous().numpy()
    return cpu_kernels.Heads(rows, 0, num_heads, head_dim)
