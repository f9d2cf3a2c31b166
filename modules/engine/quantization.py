"""Weights of 8 and of 4 bits for the CPU: how they are packed, and the rotation for those of 8.

With 8 bits a weight row has one scale, and so has an activation row. With 4 bits each group of
inputs has its own, and as in GGUF's Q4_1 a minimum too, so that such a file's weights stay what
they are. Products are summed up as integers, which is exact, and groups in their order: what else
is in the batch cannot change a row's result.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from modules.engine import cpu_kernels
from modules.engine.cpu_kernels import (
    GROUP,
    PANEL,
    QUAD,
    UNROLL,
    ZERO_POINT,
    Int4Matrices,
    Int8Matrices,
)

INT4_MAX = 15
INT8_MAX = 127
Floats = NDArray[np.float32]
_TINY = 1e-30
_FEWER_STEPS = range(14, 7, -1)  # fewer than 8 are also twice, or thrice, as many


class Weights(ABC):
    """The weight that has one role in each layer, in a format of `cpu_kernels.multiply`."""

    matrices: Int8Matrices | Int4Matrices

    def __init__(self, num_layers: int, num_outputs: int, num_inputs: int) -> None:
        self.num_outputs, self.num_inputs = num_outputs, num_inputs
        num_panels = _pad(num_outputs, PANEL) // PANEL
        self.matrices = self._allocate(num_layers, num_panels)

    @abstractmethod
    def set(self, layer: int, weight: Tensor) -> None:
        """`weight`: [num_outputs, num_inputs], float32."""

    def multiply(self, layer: int, x: Floats) -> Floats:
        """x [num_rows, num_inputs] @ the weight's transpose, [num_rows, num_outputs]."""
        levels = cpu_kernels.make_levels(len(x), self.matrices)
        cpu_kernels.quantize(x, levels)
        out = np.empty((len(x), self.matrices.packed.shape[1] * PANEL), np.float32)
        cpu_kernels.multiply(levels, self.matrices, layer, out)
        return out[:, : self.num_outputs]

    @abstractmethod
    def _allocate(self, num_layers: int, num_panels: int) -> Int8Matrices | Int4Matrices: ...


class Int8Weights(Weights):
    matrices: Int8Matrices

    def _allocate(self, num_layers: int, num_panels: int) -> Int8Matrices:
        padded = _pad(self.num_inputs, QUAD * UNROLL)
        return Int8Matrices(
            packed=np.zeros((num_layers, num_panels, padded // QUAD, PANEL, QUAD), np.uint8),
            scales=np.zeros((num_layers, num_panels, 1, PANEL), np.float32),
            num_inputs=padded,
        )

    def set(self, layer: int, weight: Tensor) -> None:
        matrices = self.matrices
        scale = weight.abs().amax(1, keepdim=True) / INT8_MAX
        scale = scale.clamp_min_(torch.finfo(torch.float32).tiny)
        num_panels = matrices.packed.shape[1]
        levels = np.full((num_panels * PANEL, matrices.num_inputs), ZERO_POINT, np.uint8)
        rounded = (weight / scale).round_().add_(ZERO_POINT)
        levels[: self.num_outputs, : self.num_inputs] = rounded.numpy()
        quads = levels.reshape(num_panels, PANEL, -1, QUAD)
        matrices.packed[layer] = quads.transpose(0, 2, 1, 3)
        matrices.scales[layer].reshape(-1)[: self.num_outputs] = scale[:, 0].numpy()


class Int4Weights(Weights):
    matrices: Int4Matrices

    def _allocate(self, num_layers: int, num_panels: int) -> Int4Matrices:
        padded = _pad(self.num_inputs, GROUP)
        scales = (num_layers, num_panels, padded // GROUP, PANEL)
        return Int4Matrices(
            packed=np.zeros((num_layers, num_panels, padded // QUAD // 2, PANEL, QUAD), np.uint8),
            scales=np.zeros(scales, np.uint16),
            minimums=np.zeros(scales, np.uint16),
            num_inputs=padded,
        )

    def set(self, layer: int, weight: Tensor) -> None:
        matrices = self.matrices
        num_panels = matrices.packed.shape[1]
        rows = num_panels * PANEL - self.num_outputs
        padded = F.pad(weight, (0, matrices.num_inputs - self.num_inputs, 0, rows))
        groups = padded.unflatten(1, (-1, GROUP))
        least, most = (limit[..., None] for limit in groups.aminmax(dim=-1))
        scales = ((most - least) / _count_steps(groups)).clamp_min_(_TINY).bfloat16()
        minimums = least.bfloat16()
        levels = ((groups - minimums.float()) / scales.float()).round_().clamp_(0, INT4_MAX)
        pairs = levels.byte().numpy().reshape(num_panels, PANEL, -1, 2, QUAD)
        pairs = pairs.transpose(3, 0, 2, 1, 4)
        matrices.packed[layer] = pairs[0] | pairs[1] << 4
        for numbers, array in ((scales, matrices.scales), (minimums, matrices.minimums)):
            bits = numbers.view(torch.uint16).numpy().reshape(num_panels, PANEL, -1)
            array[layer] = bits.transpose(0, 2, 1)


def _count_steps(groups: Tensor) -> Tensor:
    """Between the least and the most of each group, [..., 1]: as many as 4 bits have, or fewer.

    Weights that a file has in 4 bits (Q4_0, Q4_K) need not use all of them. On steps of another
    size they would be rounded once more.
    """
    counts = torch.full_like(groups[..., :1], INT4_MAX)
    rows = groups[:PANEL]
    if all((_misfit(rows, count) >= _misfit(rows, INT4_MAX) / 8).all() for count in _FEWER_STEPS):
        return counts
    least = _misfit(groups, INT4_MAX) / 8
    for count in _FEWER_STEPS:
        misfit = _misfit(groups, count)
        counts[misfit < least] = count
        least = torch.minimum(least, misfit)
    return counts


def _misfit(groups: Tensor, count: int) -> Tensor:
    """How far at most weights are from steps, `count` of which are between the outer ones."""
    least, most = (limit[..., None] for limit in groups.aminmax(dim=-1))
    steps = (groups - least) * (count / (most - least).clamp_min_(_TINY))
    return (steps - steps.round()).abs_().amax(-1, keepdim=True)


def _pad(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


class Rotation:
    """An orthogonal matrix R that mixes all entries of a vector.

    Activations have outliers in a few channels, which leave the others few of int8's levels. x R
    has none, and (x R) (W R)ᵀ = x Wᵀ (QuaRot, Ashkboos et al. 2024). It is a Kronecker product of
    two smaller matrices, so applying it is cheap.
    """

    def __init__(self, size: int) -> None:
        power = size & -size
        generator = torch.Generator().manual_seed(0)
        odd = torch.randn(size // power, size // power, generator=generator, dtype=torch.float64)
        signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
        self._signs = signs.float()
        self._odd = torch.linalg.qr(odd)[0].float()
        self._hadamard = hadamard(power) / math.sqrt(power)

    def apply(self, x: Tensor) -> Tensor:
        """x R, for x [..., size], float32."""
        blocks = (x * self._signs).unflatten(-1, (len(self._odd), len(self._hadamard)))
        mixed: Tensor = self._odd.t() @ (blocks @ self._hadamard)
        return mixed.flatten(-2)

    def undo(self, x: Tensor) -> Tensor:
        """x Rᵀ: what `apply` made x of."""
        blocks = x.unflatten(-1, (len(self._odd), len(self._hadamard)))
        plain: Tensor = self._odd @ blocks @ self._hadamard
        return plain.flatten(-2) * self._signs


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix of ones and minus ones, [size, size]; `size` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
