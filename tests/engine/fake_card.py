"""A CUDA card without one: its kernel by definition, and graphs that call what they saw."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from modules.engine import cuda_attention, model_runner
from modules.engine.cuda_attention import VarlenAttention

SIGNATURE = inspect.signature(varlen_attn)


def paged_attention(*args: Any, **kwargs: Any) -> Tensor:
    """What `varlen_attn` promises, called in the same way."""
    call = SIGNATURE.bind(*args, **kwargs)
    call.apply_defaults()
    a = call.arguments
    query, key, value = (a[name].double() for name in ("query", "key", "value"))
    assert a["num_splits"] == 1
    assert a["enable_gqa"]
    for name in ("cu_seq_q", "cu_seq_k", "seqused_k", "block_table"):
        assert a[name].dtype == torch.int32
    lengths = a["seqused_k"].tolist()
    assert a["cu_seq_k"].diff().tolist() == lengths
    assert a["max_k"] >= max(lengths)
    starts = a["cu_seq_q"].tolist()
    assert a["max_q"] >= max(end - start for start, end in zip(starts, starts[1:], strict=False))
    left, right = a["window_size"]
    assert right == 0, "causal"
    scale = query.shape[-1] ** -0.5 if a["scale"] is None else a["scale"]
    outputs = []
    for number, length in enumerate(lengths):
        rows = query[starts[number] : starts[number + 1]]
        table = a["block_table"][number].long()
        shared = query.shape[1] // key.shape[2]
        keys, values = (
            store[table].flatten(0, 1)[:length].repeat_interleave(shared, 1)
            for store in (key, value)
        )
        distance = (length - len(rows) + torch.arange(len(rows)))[:, None] - torch.arange(length)
        hidden = (distance < 0) | ((distance > left) & (left >= 0))
        scores = torch.einsum("qhd,khd->hqk", rows, keys) * scale
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
    assert starts[-1] == len(query)
    return torch.cat(outputs).to(a["query"].dtype)


class FakeGraph:
    """See `Graph`: it does what a card would, which knows nothing but the tensors it saw."""

    captured: list[FakeGraph] = []

    def __init__(self) -> None:
        self.num_replays = 0

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        self._run = run
        self._result = torch.full_like(run(), torch.nan)
        self.captured.append(self)
        return self._result

    def replay(self) -> None:
        self.num_replays += 1
        self._result.copy_(self._run())


@pytest.fixture
def fake_card(monkeypatch: pytest.MonkeyPatch) -> type[FakeGraph]:
    """Engines that are made now take the CPU for a card; the graphs they capture are listed."""
    monkeypatch.setattr(cuda_attention, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(cuda_attention, "DTYPES", (torch.float32,))
    monkeypatch.setattr(
        model_runner,
        "build_attention",
        lambda device, num_blocks, size: VarlenAttention(num_blocks, size, paged_attention),
    )
    monkeypatch.setattr(model_runner, "make_cuda_graphs", lambda device: FakeGraph)
    monkeypatch.setattr(FakeGraph, "captured", [])
    return FakeGraph
