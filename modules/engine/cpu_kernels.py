"""The compiled functions of the CPU path, over numpy arrays: int8 and int4 matrix products, norms,
rotary positions, activations, attention over paged keys and values; and what torch is slow at when
a token is chosen.

Numba compiles them to this processor's vector instructions at first use and keeps the result on
disk, so no C++ compiler is needed. They are in one file because that cache notices the changes of
one file only. Whatever a row's company, its results are the same to the last bit: sums of integers
are exact, and sums of floats are taken row by row, in an order that positions alone decide.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic, overload

PANEL = 64
"""Columns of a packed weight that lie together; a block of keys has as many positions."""
QUAD = 4
"""Neighbouring inputs that one instruction multiplies and adds up."""
UNROLL = 2
"""Quads per turn of the inner loop; the number of inputs is padded to a multiple."""
MIXED_TOGETHER = 16
"""Neighbouring entries that `quantize_gated` mixes with others, but not with each other."""
GROUP = 32
"""Neighbouring inputs that share a scale where the weight has 4 bits."""
ZERO_POINT = 128
"""Int8 weights are stored unsigned, as the instruction wants one factor: 128 means 0."""

_LOG2_E = np.float32(1.4426950408889634)
_MASKED = np.float32(-1e30)  # not infinite: differences of two stay numbers
_MINUS_INFINITY = np.float32(-np.inf)
_SMALLEST_EXPONENT = np.float32(-126.0)
_TINY = np.float32(1e-30)
_INT8_MAX = np.float32(127)
_LARGEST = np.float32(127)
_LN_2 = np.float32(math.log(2))
_SERIES = tuple(np.float32(1 / math.factorial(term)) for term in range(8))

_BYTE, _SHORT, _INT, _LONG = (ir.IntType(width) for width in (8, 16, 32, 64))
_FLOAT = ir.FloatType()


@dataclass(frozen=True, slots=True)
class VectorUnit:
    """What the compiled functions may count on, and the register tile that suits it."""

    lanes: int
    """Of 32 bits."""
    rows: int
    """Most rows of a tile: their sums, one panel's columns and a broadcast fill the registers."""
    vectors: int
    """Per row of a tile."""
    dot: str | None
    """LLVM's name of the instruction that adds up products of four bytes; None: there is none."""


def find_vector_unit() -> VectorUnit:
    features = llvm.get_host_cpu_features()
    if features.get("avx512vnni"):
        return VectorUnit(16, 6, 4, "llvm.x86.avx512.vpdpbusd.512")
    if features.get("avxvnni"):
        return VectorUnit(8, 5, 2, "llvm.x86.avx512.vpdpbusd.256")
    return VectorUnit(8, 5, 2, None)


UNIT = find_vector_unit()


class _Emitter:
    """Writes one tile: `rows` × `vectors` sums that stay in registers over the inner loop."""

    def __init__(self, builder: Any, unit: VectorUnit, rows: int, vectors: int) -> None:
        self.builder = builder
        self.lanes, self.rows, self.vectors = unit.lanes, rows, vectors
        self.ints = ir.VectorType(_INT, unit.lanes)
        self.bytes = ir.VectorType(_BYTE, unit.lanes * QUAD)
        self.floats = ir.VectorType(_FLOAT, unit.lanes)
        self.dot = unit.dot

    def load(self, base: Any, num_bytes: Any, kind: Any) -> Any:
        return self.builder.load(self._address(base, num_bytes, kind), align=1)

    def load_floats(self, base: Any, first: int, is_short: bool) -> Any:
        """A vector of float32, or of bfloat16, which is the upper half of it."""
        if not is_short:
            return self.load(base, _LONG(first * 4), self.floats)
        shorts = ir.VectorType(_SHORT, self.lanes)
        bits = self.builder.zext(self.load(base, _LONG(first * 2), shorts), self.ints)
        sixteen = ir.Constant(self.ints, [16] * self.lanes)
        return self.builder.bitcast(self.builder.shl(bits, sixteen), self.floats)

    def store(self, value: Any, base: Any, num_bytes: Any) -> None:
        self.builder.store(value, self._address(base, num_bytes, value.type), align=1)

    def offset(self, count: Any, num_bytes: int) -> Any:
        return self.builder.mul(count, _LONG(num_bytes))

    def splat(self, value: Any, kind: Any) -> Any:
        undefined = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(undefined, value, _INT(0))
        zeros = ir.Constant(ir.VectorType(_INT, self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(first, undefined, zeros)

    def loop(
        self, count: Any, step: int, initial: list[Any], body: Callable[[Any, list[Any]], None]
    ) -> list[Any]:
        """`body(index, sums)` replaces the sums; what they are in the end."""
        builder = self.builder
        before = builder.block
        inside, after = (builder.append_basic_block(name) for name in ("turn", "end"))
        builder.branch(inside)
        builder.position_at_end(inside)
        index = builder.phi(_LONG)
        index.add_incoming(_LONG(0), before)
        phis = [builder.phi(value.type) for value in initial]
        for phi, value in zip(phis, initial, strict=True):
            phi.add_incoming(value, before)
        sums = list(phis)
        body(index, sums)
        for phi, value in zip(phis, sums, strict=True):
            phi.add_incoming(value, inside)
        following = builder.add(index, _LONG(step))
        index.add_incoming(following, inside)
        builder.cbranch(builder.icmp_signed("<", following, count), inside, after)
        builder.position_at_end(after)
        return sums

    def add_products(self, sums: Any, unsigned: Any, signed: Any) -> Any:
        """sums + the four products of bytes that each lane of `unsigned` and `signed` holds."""
        if self.dot is not None:
            kind = ir.FunctionType(self.ints, [self.ints, self.bytes, self.bytes])
            return self.builder.call(
                self.builder.module.declare_intrinsic(self.dot, (), kind), [sums, unsigned, signed]
            )
        shorts = ir.VectorType(_SHORT, self.lanes * QUAD)
        # 255 × 127 still fits into 16 bits.
        products = self.builder.mul(
            self.builder.zext(unsigned, shorts), self.builder.sext(signed, shorts)
        )
        for part in range(QUAD):
            lanes = [QUAD * lane + part for lane in range(self.lanes)]
            mask = ir.Constant(ir.VectorType(_INT, self.lanes), lanes)
            some = self.builder.shuffle_vector(products, ir.Constant(shorts, ir.Undefined), mask)
            sums = self.builder.add(sums, self.builder.sext(some, self.ints))
        return sums

    def _address(self, base: Any, num_bytes: Any, kind: Any) -> Any:
        return self.builder.inttoptr(self.builder.add(base, num_bytes), kind.as_pointer())


def make_int8_tile(unit: VectorUnit) -> Callable[..., None]:
    """A function for compiled code: a tile of a product with a packed weight.

    Its arguments are numbers and addresses: how many rows; the activations (int8) and their bytes
    per row; the weight's first column in its panel (uint8) and its number of quads; the rows' sums
    (int32); the rows' and the columns' scales (float32); the result (float32) and its floats per
    row.
    """

    def emit_rows(builder: Any, rows: int, args: Any) -> None:
        a, a_stride, b, num_quads, a_sums, a_scales, b_scales, out, out_stride = args
        emit = _Emitter(builder, unit, rows, unit.vectors)
        size = unit.lanes * 4
        row_starts = [builder.add(a, emit.offset(a_stride, row)) for row in range(rows)]
        initial = []
        for row in range(rows):
            offset = builder.mul(emit.load(a_sums, _LONG(row * 4), _INT), _INT(-ZERO_POINT))
            initial += [emit.splat(offset, emit.ints)] * unit.vectors

        def turn(index: Any, sums: list[Any]) -> None:
            for part in range(UNROLL):
                quad = builder.add(index, _LONG(part))
                columns = builder.add(b, emit.offset(quad, PANEL * QUAD))
                weights = [
                    emit.load(columns, _LONG(vector * size), emit.bytes)
                    for vector in range(unit.vectors)
                ]
                for row, start in enumerate(row_starts):
                    four = emit.load(start, emit.offset(quad, QUAD), _INT)
                    levels = builder.bitcast(emit.splat(four, emit.ints), emit.bytes)
                    for vector, weight in enumerate(weights):
                        number = row * unit.vectors + vector
                        sums[number] = emit.add_products(sums[number], weight, levels)

        sums = emit.loop(num_quads, UNROLL, initial, turn)
        for row in range(rows):
            a_scale = emit.splat(emit.load(a_scales, _LONG(row * 4), _FLOAT), emit.floats)
            start = builder.add(out, emit.offset(out_stride, row * 4))
            for vector in range(unit.vectors):
                b_scale = emit.load(b_scales, _LONG(vector * size), emit.floats)
                value = builder.sitofp(sums[row * unit.vectors + vector], emit.floats)
                value = builder.fmul(builder.fmul(value, a_scale), b_scale)
                emit.store(value, start, _LONG(vector * size))

    @intrinsic
    def tile(
        typing: Any,
        num_rows: Any,
        a: Any,
        a_stride: Any,
        b: Any,
        num_quads: Any,
        a_sums: Any,
        a_scales: Any,
        b_scales: Any,
        out: Any,
        out_stride: Any,
    ) -> Any:
        return types.void(
            num_rows, a, a_stride, b, num_quads, a_sums, a_scales, b_scales, out, out_stride
        ), _switch(unit.rows, emit_rows)

    return tile


def int4_vectors(unit: VectorUnit) -> int:
    """Per row of a tile of `make_int4_tile`: the sums of one group need as many registers."""
    return unit.vectors // 2


def make_int4_tile(unit: VectorUnit) -> Callable[..., None]:
    """A function for compiled code: a tile of a product with a packed weight of 4 bits.

    Its arguments are numbers and addresses: how many rows; the activations (int8) and their groups
    per row; their sums (int32) and scales (float32); the weight's first column in its panel, of
    its levels (two to a byte), scales and minimums (bfloat16); the result (float32) and its floats
    per row.
    """
    vectors = int4_vectors(unit)
    pairs = GROUP // (2 * QUAD)

    def emit_rows(builder: Any, rows: int, args: Any) -> None:
        a, num_groups, a_sums, a_scales, b, b_scales, b_minimums, out, out_stride = args
        emit = _Emitter(builder, unit, rows, vectors)
        size = unit.lanes * 4
        multiply_add = builder.module.declare_intrinsic(
            f"llvm.fma.v{unit.lanes}f32", (), ir.FunctionType(emit.floats, [emit.floats] * 3)
        )
        row_starts = [builder.add(a, emit.offset(num_groups, row * GROUP)) for row in range(rows)]
        low, four_bits = (
            ir.Constant(emit.bytes, [number] * (unit.lanes * QUAD)) for number in (15, 4)
        )
        zero_ints, zero_floats = (ir.Constant(kind, None) for kind in (emit.ints, emit.floats))

        def add_quad(index: Any, quad: int, weights: list[Any], dots: list[Any]) -> None:
            at = builder.add(emit.offset(index, GROUP), _LONG(quad * QUAD))
            for row, start in enumerate(row_starts):
                levels = builder.bitcast(
                    emit.splat(emit.load(start, at, _INT), emit.ints), emit.bytes
                )
                for vector, weight in enumerate(weights):
                    number = row * vectors + vector
                    dots[number] = emit.add_products(dots[number], weight, levels)

        def turn(index: Any, sums: list[Any]) -> None:
            dots = [zero_ints] * len(sums)
            columns = builder.add(b, emit.offset(index, PANEL * GROUP // 2))
            for pair in range(pairs):
                both = [
                    emit.load(columns, _LONG(pair * PANEL * QUAD + vector * size), emit.bytes)
                    for vector in range(vectors)
                ]
                add_quad(index, 2 * pair, [builder.and_(two, low) for two in both], dots)
                add_quad(index, 2 * pair + 1, [builder.lshr(two, four_bits) for two in both], dots)
            scales, minimums = (
                [
                    emit.load_floats(
                        builder.add(base, emit.offset(index, PANEL * 2)), vector * unit.lanes, True
                    )
                    for vector in range(vectors)
                ]
                for base in (b_scales, b_minimums)
            )
            for row in range(rows):
                at = emit.offset(builder.add(emit.offset(num_groups, row), index), 4)
                a_sum = builder.sitofp(
                    emit.splat(emit.load(a_sums, at, _INT), emit.ints), emit.floats
                )
                a_scale = emit.splat(emit.load(a_scales, at, _FLOAT), emit.floats)
                for vector in range(vectors):
                    number = row * vectors + vector
                    dot = builder.sitofp(dots[number], emit.floats)
                    rest = builder.fmul(a_sum, minimums[vector])
                    value = builder.call(multiply_add, [dot, scales[vector], rest])
                    sums[number] = builder.call(multiply_add, [value, a_scale, sums[number]])

        sums = emit.loop(num_groups, 1, [zero_floats] * (rows * vectors), turn)
        for row in range(rows):
            start = builder.add(out, emit.offset(out_stride, row * 4))
            for vector in range(vectors):
                emit.store(sums[row * vectors + vector], start, _LONG(vector * size))

    @intrinsic
    def tile(
        typing: Any,
        num_rows: Any,
        a: Any,
        num_groups: Any,
        a_sums: Any,
        a_scales: Any,
        b: Any,
        b_scales: Any,
        b_minimums: Any,
        out: Any,
        out_stride: Any,
    ) -> Any:
        return types.void(
            num_rows, a, num_groups, a_sums, a_scales, b, b_scales, b_minimums, out, out_stride
        ), _switch(unit.rows, emit_rows)

    return tile


def make_float_tile(unit: VectorUnit, vectors: int) -> Callable[..., None]:
    """A function for compiled code: out = out × factors[row] + a @ b, over `vectors` columns.

    Its arguments are numbers and addresses: how many rows; a and its floats per row; b, its numbers
    per row, and an array of their type, which is float32 or bfloat16 (uint16); the number of
    columns of a; the factors; out and its floats per row.
    """

    def emit_rows(builder: Any, rows: int, args: Any, is_short: bool) -> None:
        a, a_stride, b, b_stride, _, num_steps, factors, out, out_stride = args
        emit = _Emitter(builder, unit, rows, vectors)
        size = unit.lanes * 4
        multiply_add = builder.module.declare_intrinsic(
            f"llvm.fma.v{unit.lanes}f32", (), ir.FunctionType(emit.floats, [emit.floats] * 3)
        )
        row_starts = [builder.add(a, emit.offset(a_stride, row * 4)) for row in range(rows)]
        out_starts = [builder.add(out, emit.offset(out_stride, row * 4)) for row in range(rows)]
        initial = []
        for row, start in enumerate(out_starts):
            factor = emit.splat(emit.load(factors, _LONG(row * 4), _FLOAT), emit.floats)
            for vector in range(vectors):
                old = emit.load(start, _LONG(vector * size), emit.floats)
                initial.append(builder.fmul(old, factor))

        def turn(index: Any, sums: list[Any]) -> None:
            columns = builder.add(
                b, builder.mul(index, emit.offset(b_stride, 2 if is_short else 4))
            )
            values = [
                emit.load_floats(columns, unit.lanes * vector, is_short)
                for vector in range(vectors)
            ]
            for row, start in enumerate(row_starts):
                one = emit.splat(emit.load(start, emit.offset(index, 4), _FLOAT), emit.floats)
                for vector, value in enumerate(values):
                    number = row * vectors + vector
                    sums[number] = builder.call(multiply_add, [one, value, sums[number]])

        sums = emit.loop(num_steps, 1, initial, turn)
        for row, start in enumerate(out_starts):
            for vector in range(vectors):
                emit.store(sums[row * vectors + vector], start, _LONG(vector * size))

    @intrinsic
    def tile(
        typing: Any,
        num_rows: Any,
        a: Any,
        a_stride: Any,
        b: Any,
        b_stride: Any,
        like_b: Any,
        num_steps: Any,
        factors: Any,
        out: Any,
        out_stride: Any,
    ) -> Any:
        emit = partial(emit_rows, is_short=like_b.dtype == types.uint16)
        return types.void(
            num_rows, a, a_stride, b, b_stride, like_b, num_steps, factors, out, out_stride
        ), _switch(unit.rows, emit)

    return tile


def _switch(most_rows: int, emit_rows: Callable[[Any, int, Any], None]) -> Callable[..., Any]:
    """Code for each number of rows; the first argument says which of it runs."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        num_rows, *others = args
        for rows in range(1, most_rows + 1):
            with builder.if_then(builder.icmp_signed("==", num_rows, _LONG(rows))):
                emit_rows(builder, rows, others)
        return context.get_dummy_value()

    return generate


@intrinsic
def _as_float(typing: Any, bits: Any) -> Any:
    """The float32 with these 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _FLOAT)

    return types.float32(types.int32), generate


@intrinsic
def _to_type_of(typing: Any, array: Any, value: Any) -> Any:
    """`value`, float32, as an array of float32 or bfloat16 (uint16) holds it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if array.dtype == types.float32:
            return args[1]
        bits = builder.bitcast(args[1], _INT)
        odd = builder.and_(builder.lshr(bits, _INT(16)), _INT(1))
        rounded = builder.add(bits, builder.add(odd, _INT(0x7FFF)))  # to nearest, ties to even
        return builder.trunc(builder.lshr(rounded, _INT(16)), _SHORT)

    return array.dtype(array, types.float32), generate


_int8_tile = make_int8_tile(UNIT)
_int4_tile = make_int4_tile(UNIT)
_float_tile = make_float_tile(UNIT, UNIT.vectors)
_narrow_float_tile = make_float_tile(UNIT, 1)
_TILE_ROWS = UNIT.rows
_LANES = UNIT.lanes
_TILE_COLUMNS = UNIT.lanes * UNIT.vectors
_INT4_TILE_COLUMNS = UNIT.lanes * int4_vectors(UNIT)


@njit(fastmath=True)
def _exp2(x: Any) -> Any:
    """2**x for x from -126 to 127: 2**round(x) by the exponent's bits, the rest by its series."""
    x = max(x, _SMALLEST_EXPONENT)
    whole = np.float32(np.rint(x))
    rest = (x - whole) * _LN_2
    power = _SERIES[7]
    for term in (6, 5, 4, 3, 2, 1, 0):
        power = power * rest + _SERIES[term]
    bits = (np.int32(whole) + np.int32(127)) << np.int32(23)
    return power * _as_float(bits)  # type: ignore[call-arg]


NO_SINKS = np.zeros(0, np.float32)


# Products of integers


class Levels(NamedTuple):
    """Rows of activations ≈ levels × scales."""

    levels: Any
    """int8 [num_rows, num_inputs, padded with zeros]"""
    scales: Any
    """float32 [num_rows, num_groups]: of the inputs, in equal parts."""
    sums: Any
    """int32 [num_rows, num_groups]: of the levels."""


class Int8Matrices(NamedTuple):
    """A weight of every layer ≈ (packed − 128) × scales."""

    packed: Any
    """uint8 [num_layers, num_panels, num_inputs / 4, 64, 4]"""
    scales: Any
    """float32 [num_layers, num_panels, 1, 64]"""
    num_inputs: int
    """Padded."""


class Int4Matrices(NamedTuple):
    """A weight of every layer ≈ levels × scales + minimums, these for each group of inputs."""

    packed: Any
    """uint8 [num_layers, num_panels, num_inputs / 8, 64, 4]: four levels in the lower bits, and the
    four after them in the upper bits."""
    scales: Any
    """bfloat16 (uint16) [num_layers, num_panels, num_groups, 64]"""
    minimums: Any
    num_inputs: int


@njit(cache=True)
def make_levels(num_rows: Any, weight: Any) -> Any:
    """Room for activations that are multiplied with `weight`."""
    num_groups = weight.scales.shape[2]
    return Levels(
        np.zeros((num_rows, weight.num_inputs), np.int8),
        np.zeros((num_rows, num_groups), np.float32),
        np.zeros((num_rows, num_groups), np.int32),
    )


@njit(parallel=True, cache=True)  # no fastmath: it would round tiles of other heights otherwise
def multiply(rows: Any, weight: Any, layer: Any, out: Any) -> None:
    """out = rows @ the layer's weight, float32 [num_rows, num_panels × 64].

    rows: Levels. weight: Int8Matrices or Int4Matrices.
    """
    num_rows, num_columns = out.shape
    tile_columns = _tile_columns(weight)
    for tile in prange(num_columns // tile_columns):
        panel, column = divmod(np.int64(tile) * tile_columns, PANEL)  # it is unsigned
        for row in range(0, num_rows, _TILE_ROWS):
            count = min(num_rows - row, _TILE_ROWS)
            _multiply_tile(count, rows, row, weight, layer, panel, column, out)


def _tile_columns(weight: Any) -> int:
    raise NotImplementedError  # compiled code gets the overload below; nothing else calls this


def _multiply_tile(
    count: Any, rows: Any, row: Any, weight: Any, layer: Any, panel: Any, column: Any, out: Any
) -> None:
    raise NotImplementedError  # likewise


@overload(_tile_columns, strict=False)
def _choose_tile_columns(weight: Any) -> Any:
    columns = _INT4_TILE_COLUMNS if weight.instance_class is Int4Matrices else _TILE_COLUMNS
    return lambda weight: columns


@overload(_multiply_tile, strict=False)
def _choose_tile(
    count: Any, rows: Any, row: Any, weight: Any, layer: Any, panel: Any, column: Any, out: Any
) -> Any:
    def int8(
        count: Any, rows: Any, row: Any, weight: Any, layer: Any, panel: Any, column: Any, out: Any
    ) -> None:
        _int8_tile(
            count,
            _at(rows.levels, row),
            weight.num_inputs,
            _at(weight.packed, layer, panel) + column * QUAD,
            weight.packed.shape[2],
            _at(rows.sums, row),
            _at(rows.scales, row),
            _at(weight.scales, layer, panel) + column * 4,
            _at(out, row) + (panel * PANEL + column) * 4,
            out.shape[1],
        )

    def int4(
        count: Any, rows: Any, row: Any, weight: Any, layer: Any, panel: Any, column: Any, out: Any
    ) -> None:
        _int4_tile(
            count,
            _at(rows.levels, row),
            weight.scales.shape[2],
            _at(rows.sums, row),
            _at(rows.scales, row),
            _at(weight.packed, layer, panel) + column * QUAD,
            _at(weight.scales, layer, panel) + column * 2,
            _at(weight.minimums, layer, panel) + column * 2,
            _at(out, row) + (panel * PANEL + column) * 4,
            out.shape[1],
        )

    return int4 if weight.instance_class is Int4Matrices else int8


@njit
def _at(array: Any, first: Any, second: Any = 0) -> Any:
    """The address of array[first, second]."""
    return array.ctypes.data + first * array.strides[0] + second * array.strides[1]


@njit(fastmath=True)
def _quantize_row(x: Any, factor: Any, row: Any, out: Any) -> None:
    """out ≈ x × factor, as row `row`: levels are rounded, −127 to 127 at most."""
    levels, scales, sums = out
    size = levels.shape[1] // scales.shape[1]
    for group in range(scales.shape[1]):
        start = group * size
        end = min(start + size, x.shape[0])
        largest = _TINY
        for i in range(start, end):
            largest = max(largest, abs(x[i]))
        steps = _INT8_MAX / largest
        total = np.int32(0)
        for i in range(start, end):
            level = np.int32(np.rint(x[i] * steps))
            levels[row, i] = np.int8(level)
            total += level
        scales[row, group] = largest * factor / _INT8_MAX
        sums[row, group] = total


@njit(parallel=True, fastmath=True, cache=True)
def quantize(x: Any, out: Any) -> None:
    """x [num_rows, num_inputs] as `out`, which are Levels."""
    for row in prange(x.shape[0]):
        _quantize_row(x[row], np.float32(1), row, out)


@njit(parallel=True, fastmath=True, cache=True)
def quantize_normed(
    x: Any, weight: Any, epsilon: Any, weighted: Any, factors: Any, out: Any
) -> None:
    """`quantize` of x with each row divided by its root mean square, times `weight`.

    The same without rounding is weighted × factors, which are left to the caller: like x, and
    [num_rows].
    """
    for row in prange(x.shape[0]):
        total = np.float32(0)
        for i in range(x.shape[1]):
            total += x[row, i] * x[row, i]
            weighted[row, i] = x[row, i] * weight[i]
        mean = total / np.float32(x.shape[1])
        factors[row] = np.float32(1) / np.sqrt(mean + epsilon)
        _quantize_row(weighted[row], factors[row], row, out)


@njit(parallel=True, fastmath=True, cache=True)
def quantize_gated(gate_up: Any, mixed_size: Any, gated: Any, out: Any) -> None:
    """`quantize` of silu(gate) × up, mixed.

    gate_up: [num_rows, 2 × num_inputs or more]; gated: [num_rows, num_inputs], to work in.
    """
    num_inputs = gated.shape[1]
    for row in prange(gated.shape[0]):
        for i in range(num_inputs):
            gate = gate_up[row, i]
            sigmoid = np.float32(1) / (np.float32(1) + _exp2(min(-gate * _LOG2_E, _LARGEST)))
            gated[row, i] = gate * sigmoid * gate_up[row, num_inputs + i]
        _mix(gated[row], mixed_size)
        _quantize_row(gated[row], np.float32(1), row, out)


@njit(fastmath=True)
def _mix(x: Any, size: Any) -> None:
    """Multiply by blocks Hadamard(size / 16) ⊗ I(16): sums and differences, vector by vector."""
    width = MIXED_TOGETHER
    while width < size:
        for start in range(0, x.shape[0], 2 * width):
            for i in range(start, start + width):
                one, other = x[i], x[i + width]
                x[i] = one + other
                x[i + width] = one - other
        width *= 2


@njit(parallel=True, fastmath=True, cache=True)
def add(x: Any, y: Any) -> None:
    """x += y; y may have more columns."""
    for row in prange(x.shape[0]):
        for i in range(x.shape[1]):
            x[row, i] += y[row, i]


@njit(parallel=True, fastmath=True, cache=True)
def rotate(rows: Any, head_dim: Any, num_heads: Any, cos: Any, sin: Any) -> None:
    """Rotary positions (Su et al. 2021) for the first heads of each row, in place.

    rows: [num_tokens, num_heads × head_dim or more]; cos and sin: [num_tokens, head_dim].
    """
    half = head_dim // 2
    for token in prange(rows.shape[0]):
        for head in range(num_heads):
            first = head * head_dim
            for i in range(half):
                one, other = rows[token, first + i], rows[token, first + half + i]
                rows[token, first + i] = one * cos[token, i] - other * sin[token, i]
                rows[token, first + half + i] = (
                    other * cos[token, half + i] + one * sin[token, half + i]
                )


# Attention


class Heads(NamedTuple):
    """Vectors of some heads, side by side in the rows of an array that may hold others too."""

    rows: Any
    """float32 [num_tokens, ...]"""
    first_column: int
    num_heads: int
    head_dim: int


class Segments(NamedTuple):
    """Positions `starts` to `ends` of sequences, int64 [num_segments] each."""

    offsets: Any
    """Row of each segment's first token."""
    starts: Any
    ends: Any
    tables: Any
    """int64 [num_segments, most blocks]: where a sequence's keys and values are."""
    tiles: Any
    """int64 [num_tiles, 4], neighbouring tokens that are computed together: the segment, the first
    one's row and position, how many."""


class Masking(NamedTuple):
    scale: Any
    """Of the scores, float32."""
    window: int
    """Tokens that a query sees, itself included; 0: all."""
    softcap: Any
    """Scores become softcap × tanh(score / softcap), float32; 0: they stay."""
    sinks: Any
    """float32 [num_heads], or empty: one more logit in each softmax, of nothing."""


@njit(parallel=True, cache=True)
def store(keys: Any, values: Any, segments: Any, key_cache: Any, value_cache: Any) -> None:
    """Put new keys and values (Heads) where they belong.

    key_cache: [num_blocks, num_kv_heads, head_dim, 64]; value_cache: [num_blocks, num_kv_heads, 64,
    head_dim padded to whole vectors]; both float32 or bfloat16 (uint16).
    """
    for item in prange(segments.offsets.shape[0] * keys.num_heads):
        segment, head = divmod(np.int64(item), keys.num_heads)  # it is unsigned
        token = segments.offsets[segment]
        key_column = keys.first_column + head * keys.head_dim
        value_column = values.first_column + head * values.head_dim
        for position in range(segments.starts[segment], segments.ends[segment]):
            block = segments.tables[segment, position // PANEL]
            slot = position % PANEL
            for i in range(keys.head_dim):
                number = keys.rows[token, key_column + i]
                key_cache[block, head, i, slot] = _to_type_of(key_cache, number)  # type: ignore[call-arg]
            for i in range(values.head_dim):
                number = values.rows[token, value_column + i]
                value_cache[block, head, slot, i] = _to_type_of(value_cache, number)  # type: ignore[call-arg]
            token += 1


@njit(parallel=True, fastmath=True, cache=True)
def attend(
    queries: Any, segments: Any, masking: Any, key_cache: Any, value_cache: Any, out: Any
) -> None:
    """Attention with a running maximum, block after block (FlashAttention, Dao et al. 2022).

    queries: Heads. out: [num_tokens, num_heads × the values' head_dim].
    """
    head_dim, num_kv_heads = queries.head_dim, value_cache.shape[1]
    group = queries.num_heads // num_kv_heads
    value_dim = out.shape[1] // queries.num_heads
    num_tiles = segments.tiles.shape[0]
    for item in prange(num_tiles * num_kv_heads):
        kv_head, tile = divmod(np.int64(item), num_tiles)
        segment, token, position, num_tokens = segments.tiles[tile]
        num_rows = num_tokens * group
        rows = np.empty((num_rows, head_dim), np.float32)
        for row in range(num_rows):
            column = queries.first_column + (kv_head * group + row % group) * head_dim
            for i in range(head_dim):
                rows[row, i] = queries.rows[token + row // group, column + i] * masking.scale
        scores = np.zeros((num_rows, PANEL), np.float32)
        sums = np.zeros((num_rows, value_cache.shape[3]), np.float32)
        nothing = np.zeros(num_rows, np.float32)
        factors = np.empty(num_rows, np.float32)
        largest = np.full(num_rows, _MASKED, np.float32)
        totals = np.zeros(num_rows, np.float32)
        if masking.sinks.shape[0]:
            for row in range(num_rows):
                largest[row] = masking.sinks[kv_head * group + row % group] * _LOG2_E
                totals[row] = np.float32(1)
        end, window = position + num_tokens, masking.window
        first = max(0, position - window + 1) if window else 0
        for number in range(first // PANEL, (end - 1) // PANEL + 1):
            block, start = segments.tables[segment, number], number * PANEL
            count = min(PANEL, end - start)  # what comes after was another sequence's
            _multiply_floats(rows, key_cache[block, kv_head], head_dim, count, nothing, scores)
            for row in range(num_rows):
                last = position + row // group - start
                earliest = last - window + 1 if window else 0
                factors[row] = _soften(
                    scores[row], earliest, last, masking.softcap, largest, totals, row
                )
            values = value_cache[block, kv_head]
            _multiply_floats(scores, values, count, values.shape[1], factors, sums)
        for row in range(num_rows):
            column = (kv_head * group + row % group) * value_dim
            share = np.float32(1) / totals[row]
            for i in range(value_dim):
                out[token + row // group, column + i] = sums[row, i] * share


@njit(fastmath=True)
def _soften(
    scores: Any, earliest: Any, last: Any, softcap: Any, largest: Any, totals: Any, row: Any
) -> Any:
    """Scores of one row and block become weights; returns what earlier weights are worth now.

    Keys `earliest` to `last` of the block are seen.
    """
    if softcap:
        for i in range(PANEL):
            scores[i] = softcap * np.float32(np.tanh(scores[i] / softcap))
    maximum = largest[row]
    for i in range(PANEL):
        score = scores[i] * _LOG2_E if earliest <= i <= last else _MASKED
        scores[i] = score
        maximum = max(maximum, score)
    total = np.float32(0)
    for i in range(PANEL):
        weight = _exp2(scores[i] - maximum)
        weight = weight if earliest <= i <= last else np.float32(0)
        scores[i] = weight
        total += weight
    factor = _exp2(largest[row] - maximum)
    largest[row] = maximum
    totals[row] = totals[row] * factor + total
    return factor


@njit
def _multiply_floats(
    a: Any, b: Any, num_steps: Any, num_columns: Any, factors: Any, out: Any
) -> None:
    """out = out × factors + a[:, :num_steps] @ b[:num_steps], for whole vectors of columns."""
    num_rows = out.shape[0]
    for row in range(0, num_rows, _TILE_ROWS):
        count = min(num_rows - row, _TILE_ROWS)
        _multiply_float_rows(
            count,
            a,
            row,
            b.ctypes.data,
            b,
            b.shape[1],
            num_steps,
            num_columns,
            factors,
            out,
            row,
            0,
        )


@njit
def _multiply_float_rows(
    count: Any,
    a: Any,
    a_row: Any,
    b: Any,
    like_b: Any,
    b_stride: Any,
    num_steps: Any,
    num_columns: Any,
    factors: Any,
    out: Any,
    out_row: Any,
    out_column: Any,
) -> None:
    """The same for so many rows as a tile has at most; `b` is an address.

    Their results are written from `out_row` and `out_column` on; `factors` are as many as rows of
    `out`.
    """
    a_at = a.ctypes.data + a_row * a.shape[1] * 4
    factors_at = factors.ctypes.data + out_row * 4
    column = 0
    while column < num_columns:
        b_at = b + column * like_b.itemsize
        out_at = out.ctypes.data + (out_row * out.shape[1] + out_column + column) * 4
        if column + _TILE_COLUMNS <= num_columns:
            _float_tile(
                count,
                a_at,
                a.shape[1],
                b_at,
                b_stride,
                like_b,
                num_steps,
                factors_at,
                out_at,
                out.shape[1],
            )
            column += _TILE_COLUMNS
        else:
            _narrow_float_tile(
                count,
                a_at,
                a.shape[1],
                b_at,
                b_stride,
                like_b,
                num_steps,
                factors_at,
                out_at,
                out.shape[1],
            )
            column += _LANES


# Low-rank updates


class LowRankUpdates(NamedTuple):
    """What is added to the projections' results for some rows of a step; without tiles, nothing.

    Projections are numbered: queries, keys, values; output; gate, up; down. An entry is one
    adapter. Addresses, as the number of adapters in a step shall not be a part of a type.
    """

    tiles: Any
    """int64 [num_tiles, 4], neighbouring rows that get the same: the first one, how many (as many
    as a tile has at most); their first entry, and the one after their last."""
    ranks: Any
    """int64 [num_entries, 7]: padded to whole vectors; 0: that projection is not changed."""
    downs: Any
    """int64 [num_entries, 7]: addresses of float32 [num_layers, num_inputs, rank]."""
    ups: Any
    """int64 [num_entries, 7]: addresses of float32 [num_layers, rank, columns]."""
    columns: Any
    """int64 [7, 2]: the first one of a projection's results in their rows, and how many, padded to
    whole vectors."""


@njit(parallel=True, cache=True)
def add_low_rank(
    x: Any, factors: Any, updates: Any, layer: Any, first: Any, end: Any, out: Any
) -> None:
    """out += what the updates of the projections from `first` to before `end` make of x × factors.

    x: [num_rows, num_inputs]; factors: [num_rows]; out: as of `multiply`.
    """
    num_inputs = x.shape[1]
    for tile in prange(updates.tiles.shape[0]):
        row, count, first_entry, end_entry = updates.tiles[tile]
        nothing = np.zeros(count, np.float32)
        everything = np.ones(out.shape[0], np.float32)
        for entry in range(first_entry, end_entry):
            for projection in range(first, end):
                rank = updates.ranks[entry, projection]
                if rank == 0:
                    continue
                column, num_columns = updates.columns[projection]
                down = updates.downs[entry, projection] + layer * num_inputs * rank * 4
                up = updates.ups[entry, projection] + layer * rank * num_columns * 4
                reduced = np.zeros((count, rank), np.float32)
                _multiply_float_rows(
                    count, x, row, down, x, rank, num_inputs, rank, nothing, reduced, 0, 0
                )
                for i in range(count):
                    for j in range(rank):
                        reduced[i, j] *= factors[row + i]
                _multiply_float_rows(
                    count,
                    reduced,
                    0,
                    up,
                    x,
                    num_columns,
                    rank,
                    num_columns,
                    everything,
                    out,
                    row,
                    column,
                )


# Layers


class LayerWeights(NamedTuple):
    """Of layers of the Llama kind; the matrices are all Int8Matrices or all Int4Matrices."""

    qkv: Any
    output: Any
    gate_up: Any
    down: Any
    biases: Any
    """Of queries, keys and values: float32 [num_layers, padded outputs], or [num_layers, 0]."""
    norms: Any
    """float32 [num_layers, 2, hidden_size]: before the attention and before the MLP."""
    epsilons: Any
    """float32 [num_layers, 2]: of the norms."""
    windows: Any
    """int64 [num_layers]; 0: none."""


@njit(cache=True)
def run_layers(
    hidden: Any,
    weights: Any,
    num_heads: Any,
    num_kv_heads: Any,
    head_dim: Any,
    num_gated: Any,
    mixed_size: Any,
    scale: Any,
    cos: Any,
    sin: Any,
    segments: Any,
    key_caches: Any,
    value_caches: Any,
    no_sinks: Any,
    updates: Any,
) -> None:
    """What the layers make of `hidden` [num_tokens, hidden_size], in place.

    `num_gated`: inputs of the down projection. The caches are those of `store`, [num_layers, ...].
    `updates`: LowRankUpdates.
    """
    num_tokens = hidden.shape[0]
    normed = make_levels(num_tokens, weights.qkv)
    attended_levels = make_levels(num_tokens, weights.output)
    gated_levels = make_levels(num_tokens, weights.down)
    weighted = np.empty(hidden.shape, np.float32)
    factors = np.empty(num_tokens, np.float32)
    unchanged = np.ones(num_tokens, np.float32)
    is_updated = updates.tiles.shape[0] > 0
    qkv = np.empty((num_tokens, weights.qkv.packed.shape[1] * PANEL), np.float32)
    attended = np.empty((num_tokens, num_heads * head_dim), np.float32)
    added = np.empty((num_tokens, weights.output.packed.shape[1] * PANEL), np.float32)
    gate_up = np.empty((num_tokens, weights.gate_up.packed.shape[1] * PANEL), np.float32)
    gated = np.empty((num_tokens, num_gated), np.float32)
    queries = Heads(qkv, 0, num_heads, head_dim)
    keys = Heads(qkv, num_heads * head_dim, num_kv_heads, head_dim)
    values = Heads(qkv, (num_heads + num_kv_heads) * head_dim, num_kv_heads, head_dim)
    for layer in range(weights.windows.shape[0]):
        masking = Masking(scale, weights.windows[layer], np.float32(0), no_sinks)
        norms, epsilons = weights.norms[layer], weights.epsilons[layer]
        quantize_normed(hidden, norms[0], epsilons[0], weighted, factors, normed)
        multiply(normed, weights.qkv, layer, qkv)
        if is_updated:
            add_low_rank(weighted, factors, updates, layer, 0, 3, qkv)
        if weights.biases.shape[1]:
            qkv += weights.biases[layer]
        rotate(qkv, head_dim, num_heads + num_kv_heads, cos, sin)
        store(keys, values, segments, key_caches[layer], value_caches[layer])
        attend(queries, segments, masking, key_caches[layer], value_caches[layer], attended)
        quantize(attended, attended_levels)
        multiply(attended_levels, weights.output, layer, added)
        if is_updated:
            add_low_rank(attended, unchanged, updates, layer, 3, 4, added)
        add(hidden, added)
        quantize_normed(hidden, norms[1], epsilons[1], weighted, factors, normed)
        multiply(normed, weights.gate_up, layer, gate_up)
        if is_updated:
            add_low_rank(weighted, factors, updates, layer, 4, 6, gate_up)
        quantize_gated(gate_up, mixed_size, gated, gated_levels)
        multiply(gated_levels, weights.down, layer, added)
        if is_updated:
            add_low_rank(gated, unchanged, updates, layer, 6, 7, added)
        add(hidden, added)


# Choosing a token


@njit(cache=True, nogil=True)
def leave_out_below(logits: Any, thresholds: Any, out: Any) -> None:
    """out = logits, [num_rows, num_candidates], but minus infinity below thresholds, [num_rows, 1].

    One pass at the memory's pace; torch's `masked_fill` takes twenty times as long.
    """
    for row in range(logits.shape[0]):
        for i in range(logits.shape[1]):
            logit = logits[row, i]
            out[row, i] = logit if logit >= thresholds[row, 0] else _MINUS_INFINITY
