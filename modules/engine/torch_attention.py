"""Paged attention with torch's own operations, for any device.

The rows are cut into pieces at the edges of blocks, and pieces of the same shape, such as those of
decoding sequences, go together. None is padded to another's length: how results are rounded must
not depend on how a prompt came to be read, or on who else is there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.engine.attention import Segment
from modules.engine.kv_cache import KVCache
from modules.engine.transfer import upload


class TorchAttention:
    """See `PagedAttention`."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._kv_cache = KVCache(num_blocks, block_size)
        self._block_size = block_size

    @property
    def num_bytes_per_token(self) -> int:
        return self._kv_cache.num_bytes_per_token

    def batch(self, segments: tuple[Segment, ...]) -> TorchAttentionBatch:
        return TorchAttentionBatch(segments, self._kv_cache, self._block_size)


@dataclass(frozen=True, slots=True)
class _Group:
    """Pieces of segments of the same number of rows, whose attention is computed at once.

    A piece's queries lie within one block of positions; it sees the blocks up to that one.
    """

    rows: Tensor
    """[num_pieces × num_queries], of the packed row."""
    blocks: Tensor
    """[num_pieces, num_blocks]"""
    bias: Tensor
    """[num_pieces, 1, num_queries, num_blocks × block_size]: 0 where a query may look, else -inf"""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Positions [start, end) of one sequence, within one block; `offset` is that of `start`."""

    block_table: tuple[int, ...]
    offset: int
    start: int
    end: int


class TorchAttentionBatch:
    """See `AttentionBatch`. What a device's layers have in common is made by the first of them."""

    def __init__(self, segments: tuple[Segment, ...], kv_cache: KVCache, block_size: int) -> None:
        self._kv_cache = kv_cache
        self._block_size = block_size
        self._pieces = [piece for segment in segments for piece in _cut(segment, block_size)]
        self._places: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._groups: dict[tuple[torch.device, int | None], list[_Group]] = {}

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
        device = query.device
        if device not in self._places:
            self._places[device] = self._find_places(device)
        if (device, window) not in self._groups:
            self._groups[device, window] = [
                self._build_group(pieces, window, query)
                for pieces in self._sort(window, device.type == "cpu")
            ]
        keys, values = self._kv_cache.write(layer, *self._places[device], key, value)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        groups = self._groups[device, window]
        if len(groups) == 1:
            return _attend_group(groups[0], query, keys, values, scale, softcap, sinks)
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        for group in groups:
            output[group.rows] = _attend_group(
                group, query[group.rows], keys, values, scale, softcap, sinks
            )
        return output

    def _find_places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where the new keys and values go, and the blocks that begin with one of them."""
        size = self._block_size
        blocks = [(piece, piece.block_table[piece.start // size]) for piece in self._pieces]
        slots = [
            block * size + position % size
            for piece, block in blocks
            for position in range(piece.start, piece.end)
        ]
        begun = [block for piece, block in blocks if piece.start % size == 0]
        return (
            upload(slots, device, torch.long),
            upload(begun, device, torch.long),
        )

    def _sort(self, window: int | None, is_cpu: bool) -> Iterable[list[_Piece]]:
        """Pieces that go together: as many queries, as many blocks."""
        groups: dict[tuple[int, int, int], list[_Piece]] = defaultdict(list)
        for number, piece in enumerate(self._pieces):
            shape = (piece.end - piece.start, len(self._visible_blocks(piece, window)))
            # A CPU's threads share the work otherwise, and round otherwise, if there is more of it.
            groups[*shape, number if is_cpu else 0].append(piece)
        return groups.values()

    def _visible_blocks(self, piece: _Piece, window: int | None) -> range:
        """Indices into the table; the first ones may all be outside the window."""
        size = self._block_size
        last = piece.start // size
        first = 0 if window is None else max(0, last * size + 1 - window) // size
        return range(first, last + 1)

    def _build_group(self, pieces: list[_Piece], window: int | None, query: Tensor) -> _Group:
        device = query.device
        visible = [self._visible_blocks(piece, window) for piece in pieces]
        tables = [
            [piece.block_table[index] for index in indices]
            for piece, indices in zip(pieces, visible, strict=True)
        ]
        ranges = [range(p.offset, p.offset + p.end - p.start) for p in pieces]
        starts = upload([[[piece.start]] for piece in pieces], device)
        first_keys = upload([[[i[0] * self._block_size]] for i in visible], device)
        queries = starts + torch.arange(len(ranges[0]), device=device)[:, None]
        keys = first_keys + torch.arange(len(visible[0]) * self._block_size, device=device)
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        bias = query.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        return _Group(
            rows=upload([row for rows in ranges for row in rows], device),
            blocks=upload(tables, device),
            bias=bias[:, None],
        )


def _cut(segment: Segment, block_size: int) -> Iterable[_Piece]:
    start = segment.start
    while start < segment.end:
        end = min(segment.end, (start // block_size + 1) * block_size)
        yield _Piece(segment.block_table, segment.offset + start - segment.start, start, end)
        start = end


def _attend_group(
    group: _Group,
    query: Tensor,
    key_store: Tensor,
    value_store: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`query` [num_pieces × num_queries, num_heads, head_dim]; the result likewise.

    The heads that share keys become rows of one query, so their keys are read once.
    """
    num_pieces, _, num_queries, _ = group.bias.shape
    num_heads, num_kv_heads = query.shape[1], key_store.shape[2]
    # [num_pieces, num_kv_heads, heads that share × num_queries, head_dim]
    packed = query.view(num_pieces, num_queries, num_kv_heads, -1, query.shape[-1])
    packed = packed.permute(0, 2, 3, 1, 4).flatten(2, 3)
    # [num_pieces, num_kv_heads, num_keys, head_dim]
    keys = key_store[group.blocks].flatten(1, 2).transpose(1, 2)
    values = value_store[group.blocks].flatten(1, 2).transpose(1, 2)
    num_shared = num_heads // num_kv_heads
    bias = group.bias if num_queries == 1 else group.bias.repeat(1, 1, num_shared, 1)
    if softcap is None and sinks is None:
        output = F.scaled_dot_product_attention(packed, keys, values, bias, scale=scale)
    else:
        if sinks is not None:
            sinks = sinks.view(1, num_kv_heads, -1, 1).repeat_interleave(num_queries, 2)
        output = _attend_eagerly(packed, keys, values, bias, scale, softcap, sinks)
    by_query: Tensor = output.unflatten(2, (num_shared, num_queries)).permute(0, 3, 1, 2, 4)
    return by_query.reshape(-1, num_heads, output.shape[-1])


def _attend_eagerly(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`sinks` [1, num_kv_heads, num_rows, 1]."""
    scores = (query @ keys.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + bias
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
    probs = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
    return probs[..., : keys.shape[-2]] @ values
