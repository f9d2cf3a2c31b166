"""CUDA graphs: steps in which each sequence reads one token are recorded, and replayed.

Launching the kernels of such a step takes the host longer than running them takes the card. There
is a graph for each of a few sizes, recorded when it is first needed, so that starting up takes no
longer; what a batch lacks to a size is filled up with rows that nobody reads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from modules.engine.attention import AttentionBatch, Segment
from modules.engine.cuda_attention import PlanLayout, VarlenAttention
from modules.engine.transfer import upload

logger = logging.getLogger(__name__)

Forward = Callable[[Tensor, Tensor, AttentionBatch], Tensor]
"""Token ids and positions [num_rows] and their attention → logits [num_rows, vocab_size]."""


class Graph(Protocol):
    """What has been done once, to be done again with what then is in the same tensors."""

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        """Record `run`; the tensor that each replay writes its result to."""
        ...

    def replay(self) -> None: ...


class CudaGraph:
    """See `Graph`."""

    def __init__(self, device: torch.device, pool: Any) -> None:
        self._device = device
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()  # what is only done the first time must not be recorded
            torch.cuda.current_stream().wait_stream(stream)
            # Other threads, such as that of an embedding model, may go on with what they do.
            with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
                return run()

    def replay(self) -> None:
        self._graph.replay()


def make_cuda_graphs(device: torch.device) -> Callable[[], Graph]:
    """A factory of graphs that share the memory of what they compute between."""
    pool = torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(device, pool)


def choose_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Of graphs, in rows, ascending: 1, 2, 4, 8, 16, 24, ... and the largest."""
    sizes = (1, 2, 4, *range(8, max_num_seqs, 8))
    return (*(size for size in sizes if size < max_num_seqs), max_num_seqs)


@dataclass(frozen=True, slots=True)
class _Step:
    graph: Graph
    inputs: Tensor
    """Token ids, positions and the plan of the attention, in a row; int32."""
    logits: Tensor


class DecodeGraphs:
    def __init__(
        self,
        forward: Forward,
        attention: VarlenAttention,
        device: torch.device,
        max_num_seqs: int,
        max_model_len: int,
        make_graph: Callable[[], Graph],
    ) -> None:
        self._forward = forward
        self._attention = attention
        self._device = device
        self._sizes = choose_sizes(max_num_seqs)
        self._num_blocks = -(-max_model_len // attention.block_size)
        self._make_graph = make_graph
        self._steps: dict[int, _Step] = {}
        self._is_off = False

    def run(
        self, token_ids: list[int], positions: list[int], segments: tuple[Segment, ...]
    ) -> Tensor | None:
        """Logits of each row, [num_rows, vocab_size], valid until the next call; each segment is of
        one row. None if this model cannot be recorded, or the batch is too large.
        """
        num_rows = len(token_ids)
        size = next((size for size in self._sizes if size >= num_rows), None)
        if self._is_off or self._attention.has_fallen_back or size is None:
            return None
        layout = PlanLayout(size, size, self._num_blocks, 1, self._max_num_keys)
        inputs = upload(self._build(token_ids, positions, segments, layout), torch.device("cpu"))
        if self._device.type == "cuda":
            inputs = inputs.pin_memory()
        if size not in self._steps and not self._capture(layout, inputs):
            return None
        step = self._steps[size]
        step.inputs.copy_(inputs, non_blocking=True)
        step.graph.replay()
        return step.logits[:num_rows]

    @property
    def _max_num_keys(self) -> int:
        return self._num_blocks * self._attention.block_size

    def _build(
        self,
        token_ids: list[int],
        positions: list[int],
        segments: tuple[Segment, ...],
        layout: PlanLayout,
    ) -> Any:
        unused = [0] * (layout.num_tokens - len(token_ids))
        rows = list(chain(token_ids, unused, positions, unused))
        plan = layout.build(segments, self._attention.block_size, self._attention.scratch_block)
        return np.concatenate([np.array(rows, np.int32), plan])

    def _capture(self, layout: PlanLayout, inputs: Tensor) -> bool:
        static = inputs.to(self._device)
        size = layout.num_tokens

        def run() -> Tensor:
            token_ids, positions, plan = static.split((size, size, len(static) - 2 * size))
            attention = self._attention.fixed_batch(layout.split(plan))
            return self._forward(token_ids.long(), positions.long(), attention)

        graph = self._make_graph()
        try:
            logits = graph.capture(run)
        except RuntimeError as error:  # such as a model whose code waits for the card
            first_line = str(error).partition("\n")[0]
            logger.warning("Without CUDA graphs, as they cannot be recorded: %s", first_line)
            self._is_off = True
            self._steps.clear()
            return False
        self._steps[size] = _Step(graph, static, logits)
        return True
