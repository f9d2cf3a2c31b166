"""Paged attention against the definition of attention, however the tokens came to be there."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from modules.engine.attention import PagedAttention, Segment
from modules.engine.kv_cache import KVCache
from modules.engine.torch_attention import TorchAttention, TorchAttentionBatch

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, VALUE_DIM = 6, 2, 16, 24
SIZE = 8
NUM_BLOCKS = 40
OPTIONS = {
    "plain": {},
    "scaled": {"scaling": 0.3},
    "window": {"window": 5},
    "window of a block and more": {"window": 11},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.linspace(-2, 3, NUM_HEADS)},
    "all": {"scaling": 0.3, "window": 11, "softcap": 2.0, "sinks": torch.ones(NUM_HEADS)},
}


@dataclass(frozen=True)
class Tokens:
    """What a layer would hand over for a whole sequence."""

    query: Tensor
    key: Tensor
    value: Tensor

    @staticmethod
    def random(length: int, seed: int) -> Tokens:
        generator = torch.Generator().manual_seed(seed)
        shapes = ((NUM_HEADS, HEAD_DIM), (NUM_KV_HEADS, HEAD_DIM), (NUM_KV_HEADS, VALUE_DIM))
        return Tokens(*(torch.randn(length, *shape, generator=generator) for shape in shapes))


def define(tokens: Tokens, *, scaling=None, window=None, softcap=None, sinks=None) -> Tensor:
    """Attention of a sequence to itself, written down in float64."""
    num_shared = NUM_HEADS // NUM_KV_HEADS
    query = tokens.query.double().transpose(0, 1)
    key = tokens.key.double().transpose(0, 1).repeat_interleave(num_shared, 0)
    value = tokens.value.double().transpose(0, 1).repeat_interleave(num_shared, 0)
    scores = query @ key.transpose(1, 2) * (HEAD_DIM**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    positions = torch.arange(len(tokens.query))
    distance = positions[:, None] - positions
    visible = (distance >= 0) & (distance < (window or len(positions)))
    weights = scores.exp() * visible
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.double().exp()[:, None, None]
    return (weights / total @ value).transpose(0, 1).float()


class Reader:
    """Reads sequences in steps, each in blocks of its own, scattered over the memory."""

    def __init__(self, lengths: list[int], seed: int = 0) -> None:
        blocks = random.Random(seed).sample(range(NUM_BLOCKS), NUM_BLOCKS)
        self.sequences = [Tokens.random(length, seed + n) for n, length in enumerate(lengths)]
        self.tables = [tuple(blocks.pop() for _ in range(-(-length // SIZE))) for length in lengths]
        self.attention: PagedAttention = TorchAttention(NUM_BLOCKS, SIZE)

    def read(self, spans: dict[int, tuple[int, int]], **options: object) -> dict[int, Tensor]:
        """One step: positions of each sequence; the attention of each."""
        segments, parts, offset = [], [], 0
        for number, (start, end) in spans.items():
            segments.append(Segment(self.tables[number], offset, start, end))
            tokens = self.sequences[number]
            parts.append([t[start:end] for t in (tokens.query, tokens.key, tokens.value)])
            offset += end - start
        packed = [torch.cat(rows) for rows in zip(*parts, strict=True)]
        output = self.attention.batch(tuple(segments)).attend(0, *packed, **options)
        lengths = [end - start for start, end in spans.values()]
        return dict(zip(spans, output.split(lengths), strict=True))


@pytest.mark.parametrize("is_cpu", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ragged_steps_equal_the_definition(options: dict, is_cpu: bool, monkeypatch) -> None:
    """Also in the groups that other devices get."""
    sort = TorchAttentionBatch._sort
    monkeypatch.setattr(
        TorchAttentionBatch, "_sort", lambda self, window, _: sort(self, window, is_cpu)
    )
    lengths = [1, 7, 8, 9, 30, 45]
    reader = Reader(lengths)
    draw = random.Random(1)
    done = [0] * len(lengths)
    parts: list[list[Tensor]] = [[] for _ in lengths]
    while spans := {n: (at, draw.randint(at, lengths[n])) for n, at in enumerate(done)}:
        spans = {n: (start, end) for n, (start, end) in spans.items() if end > start}
        if not spans:
            if done == lengths:
                break
            continue
        for number, part in reader.read(spans, **options).items():
            parts[number].append(part)
            done[number] = spans[number][1]
    for tokens, part in zip(reader.sequences, parts, strict=True):
        torch.testing.assert_close(torch.cat(part), define(tokens, **options), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_where_a_prompt_is_cut_changes_no_bit(options: dict) -> None:
    length = 5 * SIZE + 3
    whole = Reader([length]).read({0: (0, length)}, **options)[0]
    reader = Reader([length])
    cuts = [0, SIZE, 4 * SIZE, length]
    parts = [reader.read({0: span}, **options)[0] for span in zip(cuts, cuts[1:], strict=False)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_company_changes_no_bit(options: dict) -> None:
    lengths = [1, 5, 6, 8, 9, 17, 33, 48, 64]
    together = Reader(lengths)
    before = {n: (0, length - 1) for n, length in enumerate(lengths) if length > 1}
    last = {n: (length - 1, length) for n, length in enumerate(lengths)}
    together.read(before, **options)
    outputs = together.read(last, **options)
    for number in last:
        alone = Reader(lengths)
        if number in before:
            alone.read({number: before[number]}, **options)
        assert torch.equal(alone.read({number: last[number]}, **options)[number], outputs[number])


def test_what_an_earlier_holder_left_is_not_even_looked_at() -> None:
    reader = Reader([SIZE + 3])
    for store in reader.attention._kv_cache.write(  # type: ignore[attr-defined]
        0,
        torch.tensor([0]),
        torch.tensor([], dtype=torch.long),
        reader.sequences[0].key[:1],
        reader.sequences[0].value[:1],
    ):
        store.fill_(torch.nan)
    spans = [(0, 2), (2, SIZE), (SIZE, SIZE + 1), (SIZE + 1, SIZE + 3)]
    parts = [reader.read({0: span})[0] for span in spans]
    expected = define(reader.sequences[0])
    torch.testing.assert_close(torch.cat(parts), expected, atol=1e-5, rtol=1e-4)


def test_memory_is_as_large_as_it_was_said() -> None:
    cache = KVCache(num_blocks=3, block_size=SIZE)
    tokens = Tokens.random(1, 0)
    none = torch.tensor([], dtype=torch.long)
    for layer in range(2):
        keys, values = cache.write(layer, torch.tensor([5]), none, tokens.key, tokens.value)
        assert keys.shape == (3, SIZE, NUM_KV_HEADS, HEAD_DIM)
        assert values.shape == (3, SIZE, NUM_KV_HEADS, VALUE_DIM)
    assert cache.num_bytes_per_token == 2 * NUM_KV_HEADS * (HEAD_DIM + VALUE_DIM) * 4
