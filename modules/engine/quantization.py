"""Int8 weights for the CPU: their format, and the rotation that makes activations fit int8.

A weight row has one scale, and so has an activation row. Products are summed up as integers, which
is exact: what else is in the batch cannot change a row's result.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modules.engine import cpu_kernels
from modules.engine.cpu_kernels import PANEL, QUAD, UNROLL, ZERO_POINT, Matrices

INT8_MAX = 127
Floats = NDArray[np.float32]


class Int8Weights:
    """The weight that has one role in each layer, in the format of `cpu_kernels.multiply`."""

    def __init__(self, num_layers: int, num_outputs: int, num_inputs: int) -> None:
        self.num_outputs, self.num_inputs = num_outputs, num_inputs
        num_panels = _pad(num_outputs, PANEL) // PANEL
        num_quads = _pad(num_inputs, QUAD * UNROLL) // QUAD
        self.matrices = Matrices(
            packed=np.zeros((num_layers, num_panels, num_quads, PANEL, QUAD), np.int8),
            scales=np.zeros((num_layers, num_panels, PANEL), np.float32),
            offsets=np.zeros((num_layers, num_panels, PANEL), np.int32),
        )

    def set(self, layer: int, weight: Tensor) -> None:
        """`weight`: [num_outputs, num_inputs], float32."""
        packed, scales, offsets = (array[layer] for array in self.matrices)
        scale = weight.abs().amax(1, keepdim=True) / INT8_MAX
        scale = scale.clamp_min_(torch.finfo(torch.float32).tiny)
        levels = np.zeros((packed.shape[0] * PANEL, packed.shape[1] * QUAD), np.int8)
        levels[: self.num_outputs, : self.num_inputs] = (weight / scale).round_().numpy()
        packed[:] = levels.reshape(len(packed), PANEL, -1, QUAD).transpose(0, 2, 1, 3)
        offsets[:] = -ZERO_POINT * levels.sum(1, dtype=np.int32).reshape(offsets.shape)
        scales.reshape(-1)[: self.num_outputs] = scale[:, 0].numpy()

    def multiply(self, layer: int, x: Floats) -> Floats:
        """x [num_rows, num_inputs] @ the weight's transpose, [num_rows, num_outputs]."""
        packed, weight_scales, offsets = (array[layer] for array in self.matrices)
        levels = np.full((len(x), packed.shape[1] * QUAD), ZERO_POINT, np.uint8)
        scales = np.empty(len(x), np.float32)
        cpu_kernels.quantize(x, levels, scales)
        out = np.empty((len(x), weight_scales.size), np.float32)
        cpu_kernels.multiply(levels, scales, packed, weight_scales, offsets, out)
        return out[:, : self.num_outputs]


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


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix of ones and minus ones, [size, size]; `size` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
