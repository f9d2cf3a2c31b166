"""Paged attention on a CUDA card, by the FlashAttention that is in torch.

What it does not compute, such as soft caps, TorchAttention does, over the same keys and values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modules.engine.attention import AttentionBatch, Segment
from modules.engine.kv_cache import KVCache
from modules.engine.torch_attention import TorchAttention, TorchAttentionBatch
from modules.engine.transfer import upload

PAGE_SIZE = 256
"""Tokens of a block must be a multiple of it, says FlashAttention 2."""
MAX_HEAD_DIM = 256
DTYPES = (torch.bfloat16, torch.float16)
DEVICE_TYPE = "cuda"
# Of varlen_attn: those that torch 2.11 does not have yet are among them.
OPTIONS = {"scale", "window_size", "enable_gqa", "seqused_k", "block_table", "num_splits"}
TRIAL_TOLERANCE = 0.02

Kernel = Callable[..., Any]
Numbers = NDArray[np.int32]


@cache
def find_kernel(device: torch.device) -> Kernel | None:
    """`varlen_attn` of this torch; None if it knows no blocks, or is of no use on this card."""
    kernel = load_kernel()
    return kernel if kernel is not None and device.type == "cuda" and _try(kernel, device) else None


def load_kernel() -> Kernel | None:
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return None
    kernel: Kernel = varlen.varlen_attn
    known = inspect.signature(kernel).parameters.keys()
    return kernel if known >= OPTIONS else None


@torch.inference_mode()
def _try(kernel: Kernel, device: torch.device) -> bool:
    """Two sequences, one over the edge of a block: as TorchAttention has them?"""
    segments = (Segment((2, 0), 0, 0, PAGE_SIZE + 9), Segment((1,), PAGE_SIZE + 9, 0, 5))
    num_tokens = sum(segment.num_tokens for segment in segments)
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(num_tokens, heads, 64, device=device, dtype=DTYPES[0], generator=generator)
        for heads in (4, 2, 2)
    )
    backends = (VarlenAttention(3, PAGE_SIZE, kernel), TorchAttention(3, PAGE_SIZE))
    try:
        ours, expected = (b.batch(segments).attend(0, query, key, value) for b in backends)
    except RuntimeError:  # an old card, or a build without the kernel
        return False
    return bool(((ours - expected).float().norm() <= TRIAL_TOLERANCE * expected.norm()).item())


class VarlenAttention:
    """See `PagedAttention`. One block more than it is said to have is nobody's: what belongs to no
    sequence may be written there.
    """

    def __init__(self, num_blocks: int, block_size: int, kernel: Kernel) -> None:
        self.block_size = block_size
        self.scratch_block = num_blocks
        self.kernel = kernel
        self.kv_cache = KVCache(num_blocks + 1, block_size)
        self.has_fallen_back = False
        """Whether some layer had to be computed otherwise."""

    @property
    def num_bytes_per_token(self) -> int:
        return self.kv_cache.num_bytes_per_token

    def batch(self, segments: tuple[Segment, ...]) -> VarlenBatch:
        return VarlenBatch(segments, self)

    def fixed_batch(self, plan: Plan) -> AttentionBatch:
        """One whose plan is there already; only for what needs no falling back."""
        return VarlenBatch((), self, plan)


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a step's keys and values are, for the kernel. All but `slots` are int32."""

    slots: Tensor
    """[num_tokens], int64: places of the new keys and values, block × block size + offset."""
    query_starts: Tensor
    """[num_segments + 1]: first rows, and the end."""
    key_starts: Tensor
    """[num_segments + 1]: the same for all tokens that are seen, as if they were in a row."""
    lengths: Tensor
    """[num_segments]: tokens that are seen."""
    tables: Tensor
    """[num_segments, num_blocks]"""
    max_num_queries: int
    max_num_keys: int


@dataclass(frozen=True, slots=True)
class PlanLayout:
    """How a plan lies in one array, so that it takes one copy to the card.

    There may be more rows and segments than are used: those are of one token in the scratch block.
    """

    num_tokens: int
    num_segments: int
    num_blocks: int
    """Of each table."""
    max_num_queries: int
    max_num_keys: int

    @staticmethod
    def of(segments: tuple[Segment, ...]) -> PlanLayout:
        return PlanLayout(
            num_tokens=sum(segment.num_tokens for segment in segments),
            num_segments=len(segments),
            num_blocks=max(len(segment.block_table) for segment in segments),
            max_num_queries=max(segment.num_tokens for segment in segments),
            max_num_keys=max(segment.end for segment in segments),
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        segments = self.num_segments
        return (
            self.num_tokens,
            segments + 1,
            segments + 1,
            segments,
            segments * self.num_blocks,
        )

    def build(self, segments: tuple[Segment, ...], block_size: int, scratch_block: int) -> Numbers:
        """[sum(sizes)]"""
        num_unused = self.num_segments - len(segments)
        slots = np.full(self.num_tokens, scratch_block * block_size, np.int32)
        tables = np.full((self.num_segments, self.num_blocks), scratch_block, np.int32)
        for table, segment in zip(tables, segments, strict=False):
            own = segment.block_table[: self.num_blocks]
            table[: len(own)] = own
            positions = np.arange(segment.start, segment.end)
            places = table[positions // block_size] * block_size + positions % block_size
            slots[segment.offset : segment.offset + len(positions)] = places
        num_queries = [segment.num_tokens for segment in segments] + [1] * num_unused
        lengths = [segment.end for segment in segments] + [1] * num_unused
        starts = (list(accumulate(counts, initial=0)) for counts in (num_queries, lengths))
        parts = (slots, *starts, lengths, tables.ravel())
        return np.concatenate([np.asarray(part, np.int32) for part in parts])

    def split(self, numbers: Tensor) -> Plan:
        slots, query_starts, key_starts, lengths, tables = numbers.split(self.sizes)
        return Plan(
            slots=slots.long(),
            query_starts=query_starts,
            key_starts=key_starts,
            lengths=lengths,
            tables=tables.view(self.num_segments, self.num_blocks),
            max_num_queries=self.max_num_queries,
            max_num_keys=self.max_num_keys,
        )


class VarlenBatch:
    """See `AttentionBatch`. The plan is made once for each card that a layer is on."""

    def __init__(
        self, segments: tuple[Segment, ...], attention: VarlenAttention, plan: Plan | None = None
    ) -> None:
        self._segments = segments
        self._attention = attention
        self._plans = {} if plan is None else {plan.slots.device: plan}
        self._fallback: TorchAttentionBatch | None = None

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
        if softcap is not None or sinks is not None or not _is_for_kernel(query, value):
            return self._fall_back().attend(
                layer,
                query,
                key,
                value,
                scaling=scaling,
                window=window,
                softcap=softcap,
                sinks=sinks,
            )
        plan = self._plan_on(query.device)
        # No block has to be cleared before: the kernel looks at nothing beyond the lengths.
        keys, values = self._attention.kv_cache.write(layer, plan.slots, None, key, value)
        output: Tensor = self._attention.kernel(
            query,
            keys,
            values,
            plan.query_starts,
            plan.key_starts,
            plan.max_num_queries,
            plan.max_num_keys,
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=True,
            seqused_k=plan.lengths,
            block_table=plan.tables,
            # More is faster for a long context alone, but torch 2.13 leaves out rows then
            # (pytorch/pytorch#194167); and the company in a batch would change the rounding.
            num_splits=1,
        )
        return output

    def _fall_back(self) -> TorchAttentionBatch:
        self._attention.has_fallen_back = True
        if self._fallback is None:
            self._fallback = TorchAttentionBatch(
                self._segments, self._attention.kv_cache, self._attention.block_size
            )
        return self._fallback

    def _plan_on(self, device: torch.device) -> Plan:
        if device not in self._plans:
            layout = PlanLayout.of(self._segments)
            attention = self._attention
            numbers = layout.build(self._segments, attention.block_size, attention.scratch_block)
            self._plans[device] = layout.split(upload(numbers, device))
        return self._plans[device]


def _is_for_kernel(query: Tensor, value: Tensor) -> bool:
    head_dim = query.shape[-1]
    return (
        query.device.type == DEVICE_TYPE
        and query.dtype in DTYPES
        and value.shape[-1] == head_dim
        and head_dim % 8 == 0
        and head_dim <= MAX_HEAD_DIM
    )
