"""The attention of CUDA cards: what the kernel is told, on the CPU; the kernel itself is in
test_on_card.py.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from modules.engine import cuda_attention
from modules.engine.attention import Segment
from modules.engine.cuda_attention import PlanLayout, VarlenAttention, find_kernel, load_kernel
from tests.engine.fake_card import fake_card, paged_attention
from tests.engine.test_torch_attention import (
    HEAD_DIM,
    NUM_BLOCKS,
    NUM_HEADS,
    NUM_KV_HEADS,
    OPTIONS,
    SIZE,
    Reader,
    Tokens,
    define,
)

__all__ = ["fake_card"]


class VarlenReader(Reader):
    """Values are as wide as keys, as the kernel wants them."""

    def __init__(self, lengths: list[int]) -> None:
        super().__init__(lengths)
        self.sequences = [
            Tokens(t.query, t.key, t.value[..., :HEAD_DIM].contiguous()) for t in self.sequences
        ]
        self.attention = VarlenAttention(NUM_BLOCKS, SIZE, paged_attention)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ragged_steps_equal_the_definition(options: dict, fake_card: object) -> None:
    lengths = [1, 7, 8, 9, 30, 45]
    reader = VarlenReader(lengths)
    draw = random.Random(1)
    done = [0] * len(lengths)
    parts: list[list[Tensor]] = [[] for _ in lengths]
    while done != lengths:
        spans = {n: (at, draw.randint(at, lengths[n])) for n, at in enumerate(done)}
        spans = {n: (start, end) for n, (start, end) in spans.items() if end > start}
        for number, part in (reader.read(spans, **options) if spans else {}).items():
            parts[number].append(part)
            done[number] = spans[number][1]
    for tokens, part in zip(reader.sequences, parts, strict=True):
        torch.testing.assert_close(torch.cat(part), define(tokens, **options), atol=1e-5, rtol=1e-4)
    is_for_kernel = not {"softcap", "sinks"} & options.keys()
    assert reader.attention.has_fallen_back is not is_for_kernel


@pytest.mark.parametrize(
    ("name", "value"),
    [("DTYPES", (torch.bfloat16,)), ("MAX_HEAD_DIM", HEAD_DIM - 1), ("DEVICE_TYPE", "cuda")],
)
def test_what_the_kernel_does_not_know_is_computed_otherwise(
    name: str, value: object, fake_card: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_attention, name, value)
    reader = VarlenReader([9])
    output = reader.read({0: (0, 9)})[0]
    torch.testing.assert_close(output, define(reader.sequences[0]), atol=1e-5, rtol=1e-4)
    assert reader.attention.has_fallen_back


def test_unused_rows_are_in_the_block_of_nobody() -> None:
    layout = PlanLayout(
        num_tokens=4, num_segments=4, num_blocks=3, max_num_queries=1, max_num_keys=24
    )
    segments = (Segment((5, 2), 0, 9, 10), Segment((7,), 1, 3, 4))
    numbers = layout.build(segments, block_size=8, scratch_block=99)
    plan = layout.split(torch.from_numpy(numbers))
    assert plan.slots.tolist() == [2 * 8 + 1, 7 * 8 + 3, 99 * 8, 99 * 8]
    assert plan.query_starts.tolist() == [0, 1, 2, 3, 4]
    assert plan.lengths.tolist() == [10, 4, 1, 1]
    assert plan.key_starts.tolist() == [0, 10, 14, 15, 16]
    assert plan.tables.tolist() == [[5, 2, 99], [7, 99, 99], [99, 99, 99], [99, 99, 99]]


def test_this_torch_takes_the_call() -> None:
    """Shapes and types, without a card: torch's own description of the kernel runs on "meta"."""
    assert load_kernel() is varlen_attn
    shapes = {"query": (3, NUM_HEADS, 64), "key": (3, NUM_KV_HEADS, 64), "value": (2,)}
    query, key, _ = (torch.empty(s, device="meta", dtype=torch.bfloat16) for s in shapes.values())
    attention = VarlenAttention(4, 256, load_kernel())
    layout = PlanLayout.of((Segment((0, 1), 0, 255, 258),))
    plan = layout.split(torch.empty(sum(layout.sizes), device="meta", dtype=torch.int32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_attention, "DEVICE_TYPE", "meta")
        output = attention.fixed_batch(plan).attend(0, query, key, key, window=100)
    assert output.shape == query.shape
    assert not attention.has_fallen_back


def test_a_torch_without_blocks_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=()):
        raise AssertionError

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", older)
    assert load_kernel() is None


@pytest.mark.parametrize(("fault", "expected"), [(0, True), (0.5, False), (RuntimeError, False)])
def test_a_kernel_is_tried_before_it_is_used(
    fault: object, expected: bool, fake_card: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel(*args: object, **kwargs: object) -> Tensor:
        if fault is RuntimeError:
            raise RuntimeError("no kernel image is available")
        output = paged_attention(*args, **kwargs)
        output[-1] += fault
        return output

    monkeypatch.setattr(cuda_attention, "DTYPES", (torch.bfloat16,))
    assert cuda_attention._try(kernel, torch.device("cpu")) is expected


def test_without_a_card_there_is_no_kernel() -> None:
    assert find_kernel(torch.device("cpu")) is None
