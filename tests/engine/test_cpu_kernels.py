"""The compiled functions against the same mathematics in numpy and torch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numba import njit

from modules.engine import cpu_kernels
from modules.engine.attention import Segment
from modules.engine.cpu_attention import CpuAttention
from modules.engine.cpu_kernels import GROUP, PANEL, QUAD, UNIT, Levels, VectorUnit
from modules.engine.quantization import Int4Weights, Int8Weights, Rotation, Weights, hadamard

random = np.random.default_rng(0)


def floats(*shape: int) -> Any:
    return random.standard_normal(shape).astype(np.float32)


def make_levels(num_rows: int, num_inputs: int, num_groups: int = 1) -> Levels:
    return Levels(
        np.zeros((num_rows, num_inputs), np.int8),
        np.zeros((num_rows, num_groups), np.float32),
        np.zeros((num_rows, num_groups), np.int32),
    )


def restore(levels: Levels) -> Any:
    """The numbers that they stand for, float64."""
    num_rows, num_groups = levels.scales.shape
    groups = levels.levels.reshape(num_rows, num_groups, -1).astype(np.float64)
    np.testing.assert_array_equal(groups.sum(-1), levels.sums)
    return (groups * levels.scales[..., None]).reshape(num_rows, -1)


def as_floats(bits: Any) -> Any:
    """Of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


# Products of integers


@pytest.mark.parametrize("num_rows", [*range(1, 9), 13, 64])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(64, 8), (100, 36), (960, 576)])
def test_product_with_an_int8_weight(num_rows: int, num_outputs: int, num_inputs: int) -> None:
    """Exact but for the rounding of both factors to 127 levels."""
    weight, x = floats(num_outputs, num_inputs), floats(num_rows, num_inputs)
    weights = Int8Weights(2, num_outputs, num_inputs)
    weights.set(1, torch.from_numpy(weight))
    rounded_weight, rounded_x = (
        np.rint(v / step) * step
        for v in (weight, x)
        for step in [np.abs(v).max(1, keepdims=True) / 127]
    )
    expected = rounded_x.astype(np.float64) @ rounded_weight.astype(np.float64).T
    np.testing.assert_allclose(weights.multiply(1, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_rows", [*range(1, 9), 13, 64])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(64, 32), (100, 40), (960, 576)])
def test_product_with_an_int4_weight(num_rows: int, num_outputs: int, num_inputs: int) -> None:
    """Exact for a weight that has 16 levels per group, but for the rounding of activations."""
    num_groups = -(-num_inputs // GROUP)
    levels = random.integers(0, 16, (num_outputs, num_groups, GROUP))
    levels[..., :2] = 0, 15
    levels[:, -1, num_inputs % GROUP :] *= num_inputs % GROUP == 0
    scales = random.integers(1, 9, (num_outputs, num_groups, 1)) / 16
    least = -random.integers(0, 16, (num_outputs, num_groups, 1)) * scales
    least[:, -1] *= num_inputs % GROUP == 0
    whole = (levels * scales + least).astype(np.float32).reshape(num_outputs, -1)
    weight, x = whole[:, :num_inputs], floats(num_rows, num_inputs)
    weights = Int4Weights(2, num_outputs, num_inputs)
    weights.set(1, torch.from_numpy(weight))
    rounded = make_levels(num_rows, num_groups * GROUP, num_groups)
    cpu_kernels.quantize(x, rounded)
    expected = restore(rounded) @ whole.astype(np.float64).T
    np.testing.assert_allclose(weights.multiply(1, x), expected, rtol=1e-4, atol=1e-3)


def test_int4_weights_are_as_near_as_16_levels_allow() -> None:
    weight = torch.from_numpy(floats(64, 96)) * torch.tensor([1e-20, 1.0, 1e6]).repeat_interleave(
        GROUP
    )
    weight[3, :GROUP] = 0
    weights = Int4Weights(1, 64, 96)
    weights.set(0, weight)
    (packed,), (scales,), (minimums,), _ = weights.matrices
    levels = np.stack([packed[0] & 15, packed[0] >> 4], 1).reshape(3, -1, PANEL, QUAD)
    groups = levels.transpose(2, 0, 1, 3).reshape(PANEL, 3, GROUP)
    scales, minimums = (as_floats(bits[0]).T[..., None] for bits in (scales, minimums))
    expected = weight.numpy().reshape(64, 3, GROUP)
    step = np.ptp(expected, -1, keepdims=True) / 15
    assert (np.abs(groups * scales + minimums - expected) <= 0.6 * step + 1e-28).all()


@pytest.mark.parametrize("num_levels", [16, 13, 9])
def test_int4_weights_stay_on_a_files_own_levels(num_levels: int) -> None:
    """Even where a group uses some of them only."""
    levels = random.integers(0, num_levels, (64, 3, GROUP))
    levels[..., :2] = 0, num_levels - 1
    scales = np.abs(floats(64, 3, 1)).astype(np.float16).astype(np.float32) + 1
    weight = ((levels - 8) * scales).reshape(64, -1).astype(np.float32)
    weights = Int4Weights(1, 64, 96)
    weights.set(0, torch.from_numpy(weight))
    low, high = weights.matrices.packed[0, 0] & 15, weights.matrices.packed[0, 0] >> 4
    packed = np.stack([low, high], 1).reshape(3, -1, PANEL, QUAD).transpose(2, 0, 1, 3)
    np.testing.assert_array_equal(packed.reshape(levels.shape), levels)


@pytest.mark.parametrize("kind", [Int8Weights, Int4Weights])
def test_a_row_of_the_product_is_its_own(kind: type[Weights]) -> None:
    weights = kind(1, 192, 576)
    weights.set(0, torch.from_numpy(floats(192, 576)))
    x = floats(64, 576)
    whole = weights.multiply(0, x)
    for rows in (slice(0, 1), slice(3, 5), slice(10, 47)):
        np.testing.assert_array_equal(weights.multiply(0, x[rows]), whole[rows])


UNITS = (UNIT, replace(UNIT, dot=None), VectorUnit(8, 5, 2, None), VectorUnit(4, 3, 4, None))


@pytest.mark.parametrize("unit", UNITS)
def test_int8_tile_of_every_vector_unit(unit: VectorUnit) -> None:
    """Those of other processors too: without their instruction the same sums are taken."""
    tile = cpu_kernels.make_int8_tile(unit)
    num_columns = unit.lanes * unit.vectors

    @njit
    def run(levels, scales, packed, sums, weight_scales, out):  # type: ignore[no-untyped-def]
        tile(
            levels.shape[0],
            levels.ctypes.data,
            levels.shape[1],
            packed.ctypes.data,
            packed.shape[0],
            sums.ctypes.data,
            scales.ctypes.data,
            weight_scales.ctypes.data,
            out.ctypes.data,
            out.shape[1],
        )

    packed = random.integers(0, 256, (12, PANEL, QUAD), dtype=np.uint8)
    weight_scales = floats(PANEL)
    for num_rows in range(1, unit.rows + 1):
        levels = random.integers(-127, 128, (num_rows, 48), dtype=np.int8)
        scales, sums = floats(num_rows), levels.sum(1, dtype=np.int32)
        out = np.zeros((num_rows, num_columns), np.float32)
        run(levels, scales, packed, sums, weight_scales, out)
        weight = packed.transpose(0, 2, 1).reshape(48, PANEL).astype(np.int64)
        products = levels.astype(np.int64) @ (weight - cpu_kernels.ZERO_POINT)
        expected = (products * scales[:, None] * weight_scales)[:, :num_columns]
        np.testing.assert_allclose(out, expected, rtol=1e-5)


@pytest.mark.parametrize("unit", UNITS)
def test_int4_tile_of_every_vector_unit(unit: VectorUnit) -> None:
    """Of each height; and a row is the same to the last bit in all of them."""
    tile = cpu_kernels.make_int4_tile(unit)
    num_columns = unit.lanes * cpu_kernels.int4_vectors(unit)

    @njit
    def run(levels, sums, scales, packed, weight_scales, minimums, out):  # type: ignore[no-untyped-def]
        tile(
            levels.shape[0],
            levels.ctypes.data,
            scales.shape[1],
            sums.ctypes.data,
            scales.ctypes.data,
            packed.ctypes.data,
            weight_scales.ctypes.data,
            minimums.ctypes.data,
            out.ctypes.data,
            out.shape[1],
        )

    weight = random.integers(0, 16, (3 * GROUP, PANEL), dtype=np.uint8)
    pairs = weight.reshape(-1, 2, QUAD, PANEL).transpose(1, 0, 3, 2)
    packed = np.ascontiguousarray(pairs[0] | pairs[1] << 4)
    weight_scales, minimums = (
        (floats(3, PANEL).view(np.uint32) >> 16).astype(np.uint16) for _ in "12"
    )
    factors, least = (
        as_floats(bits).astype(np.float64).repeat(GROUP, 0) for bits in (weight_scales, minimums)
    )
    rows = make_levels(unit.rows, 3 * GROUP, 3)
    cpu_kernels.quantize(floats(unit.rows, 3 * GROUP), rows)
    expected = (restore(rows) @ (weight * factors + least))[:, :num_columns]
    whole = np.zeros((unit.rows, num_columns), np.float32)
    run(rows.levels, rows.sums, rows.scales, packed, weight_scales, minimums, whole)
    np.testing.assert_allclose(whole, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    for num_rows in range(1, unit.rows):
        some = np.zeros((num_rows, num_columns), np.float32)
        run(
            rows.levels[:num_rows],
            rows.sums[:num_rows],
            rows.scales[:num_rows],
            packed,
            weight_scales,
            minimums,
            some,
        )
        np.testing.assert_array_equal(some, whole[:num_rows])


def test_a_row_of_zeros_stays_zero() -> None:
    levels = make_levels(2, 8)
    cpu_kernels.quantize(np.zeros((2, 8), np.float32), levels)
    assert not levels.levels.any() and np.isfinite(levels.scales).all()


@pytest.mark.parametrize("num_groups", [1, 3])
def test_normed_rows(num_groups: int) -> None:
    x = floats(3, 96) * np.array([[1e-3], [1], [1e4]], np.float32)
    weight, levels = floats(96), make_levels(3, 96, num_groups)
    weighted, factors = np.empty_like(x), np.empty(3, np.float32)
    cpu_kernels.quantize_normed(x, weight, np.float32(1e-6), weighted, factors, levels)
    expected = F.rms_norm(torch.from_numpy(x), (96,), torch.from_numpy(weight), 1e-6).numpy()
    largest = np.abs(expected).reshape(3, num_groups, -1).max(-1).repeat(96 // num_groups, 1)
    assert (np.abs(restore(levels) - expected) <= largest * 0.5 / 127 * 1.001).all()
    np.testing.assert_allclose(weighted * factors[:, None], expected, rtol=1e-5)


@pytest.mark.parametrize("size", [0, 16, 32, 64])
def test_gated_and_mixed_rows(size: int) -> None:
    gate_up = floats(3, 2 * 64) * np.array([[1], [30], [200]], np.float32)
    gated, levels = np.zeros((3, 64), np.float32), make_levels(3, 64)
    cpu_kernels.quantize_gated(gate_up, size, gated, levels)
    gate, up = torch.from_numpy(gate_up).double().chunk(2, -1)
    mixer = hadamard(max(1, size // 16)).double()
    parts = (F.silu(gate) * up).unflatten(-1, (-1, len(mixer), 16))
    expected = (mixer @ parts).flatten(1).numpy()
    np.testing.assert_allclose(gated, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert (
        np.abs(restore(levels) - gated) <= np.abs(gated).max(1, keepdims=True) * 0.51 / 127
    ).all()


def test_rotary_positions() -> None:
    rows, cos, sin = floats(5, 3 * 8 + 4), floats(5, 8), floats(5, 8)
    heads = torch.from_numpy(rows[:, :16].copy()).view(5, 2, 8)
    turned = torch.cat((-heads[..., 4:], heads[..., :4]), dim=-1)
    expected = heads * torch.from_numpy(cos)[:, None] + turned * torch.from_numpy(sin)[:, None]
    others = rows[:, 16:].copy()
    cpu_kernels.rotate(rows, 8, 2, cos, sin)
    np.testing.assert_allclose(rows[:, :16], expected.flatten(1), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(rows[:, 16:], others)


@pytest.mark.parametrize("size", [576, 64, 96, 7, 1])
def test_rotation_keeps_products_and_spreads_outliers(size: int) -> None:
    rotation = Rotation(size)
    x, weight = torch.randn(5, size), torch.randn(9, size)
    torch.testing.assert_close(
        rotation.apply(x) @ rotation.apply(weight).t(), x @ weight.t(), rtol=1e-4, atol=1e-3
    )
    if size >= 64:
        outlier = F.one_hot(torch.tensor(3), size).float()
        assert rotation.apply(outlier).abs().max() < 0.35


# Attention


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "window", "softcap", "has_sinks"),
    [
        (9, 3, 64, None, None, False),
        (8, 2, 80, 50, None, False),
        (4, 4, 16, None, 20.0, False),
        (4, 1, 128, 30, None, True),
        (4, 2, 8, 1, None, False),
        (2, 2, 40, 64, 5.0, True),
    ],
)
def test_attention(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int | None,
    softcap: float | None,
    has_sinks: bool,
) -> None:
    """Sequences of several lengths, read in several chunks beside each other."""
    attention = CpuAttention(num_blocks=12, block_size=PANEL)
    tables = ((3, 1, 2), (4, 9, 6, 7), (8, 10), (11,))
    ends = ((100, 150), (199, 200), (64, 65), (1, 2))
    sinks = torch.randn(num_heads) if has_sinks else None
    sequences = [
        [torch.randn(end[-1], heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads)]
        for end in ends
    ]
    for step in range(2):
        starts = [0 if step == 0 else end[0] for end in ends]
        segments, rows = [], []
        for table, start, end, sequence in zip(tables, starts, ends, sequences, strict=True):
            offset = sum(len(row[0]) for row in rows)
            segments.append(Segment(table, offset, start, end[step]))
            rows.append([part[start : end[step]] for part in sequence])
        result = attention.batch(tuple(segments)).attend(
            0,
            *(torch.cat(parts) for parts in zip(*rows, strict=True)),
            window=window,
            softcap=softcap,
            sinks=sinks,
        )
        expected = [
            attend(*sequence, start, end[step], window, softcap, sinks)
            for start, end, sequence in zip(starts, ends, sequences, strict=True)
        ]
        torch.testing.assert_close(result, torch.cat(expected), rtol=1e-4, atol=1e-5)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    start: int,
    end: int,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """By the definition, in float64."""
    group = query.shape[1] // key.shape[1]
    query, key, value = query[start:end].double(), key[:end].double(), value[:end].double()
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    positions, keys = torch.arange(start, end)[:, None], torch.arange(end)
    seen = keys <= positions
    if window:
        seen &= keys > positions - window
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks.double()[:, None, None].expand(-1, end - start, 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1)[..., :end]
    return torch.einsum("hqk,khd->qhd", weights, value).float()


def test_memory_is_taken_as_blocks_are_written() -> None:
    attention = CpuAttention(num_blocks=100_000, block_size=PANEL)
    rows = torch.randn(1, 2, 64)
    attention.batch((Segment((5,), 0, 0, 1),)).attend(0, rows, rows, rows)
    assert attention.num_bytes_per_token == 2 * 2 * 64 * 4
