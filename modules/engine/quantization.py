"""Int8 weights for the CPU: exact integer matrix products, so a row's result is its own.

Owns the number format and the layer that computes in it. Which layers use it is `fused_layers`'
business.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

INT8_MAX = 127
# The second term of an activation counts in steps this much finer than the first: the rounding
# error of the first is half a step at most, so it fills int8's range again.
FINER = 2 * INT8_MAX


class Int8Linear:
    """Several linear layers with the same input as one, in int8 with float32 scales.

    A weight row has one scale, and so has an activation row. Products are summed up as integers,
    which is exact: what else is in the batch cannot change a row's result.

    Activations take one int8 term, or two: the second holds what the first rounded away, which
    gives about 15 bits for twice the multiplications (the split of a number into a sum of low-
    precision ones is that of Ozaki et al. 2012).
    """

    def __init__(self, linears: list[nn.Linear], num_terms: int) -> None:
        weight = torch.cat([linear.weight.detach() for linear in linears]).float()
        quantized, scale = quantize_rows(weight, 1)
        self._weight = quantized.t()  # [in_features, out_features]: a view, as the kernel wants it
        self._scale = scale.t().contiguous()  # [1, out_features]
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        self._bias = torch.cat(biases).float() if biases else None
        self._num_terms = num_terms

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [num_tokens, in_features] float32 → [num_tokens, out_features] float32."""
        terms, scale = quantize_rows(x, self._num_terms)
        product = torch._int_mm(terms, self._weight).to(torch.float32)
        if self._num_terms == 2:
            coarse, fine = product.chunk(2)
            product = coarse.add_(fine, alpha=1 / FINER)
        product = product.mul_(scale).mul_(self._scale)
        return product if self._bias is None else product.add_(self._bias)


def quantize_rows(x: Tensor, num_terms: int) -> tuple[Tensor, Tensor]:
    """x ≈ (terms[:n] + terms[n:] / FINER) × scale, for x of n rows.

    Returns: int8 [num_terms × n, num_columns], and float32 [n, 1].
    """
    scale = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True)
    scale = scale.mul_(1 / INT8_MAX).clamp_min_(torch.finfo(torch.float32).tiny)
    scaled = x / scale
    coarse = scaled.round()
    if num_terms == 1:
        return coarse.to(torch.int8), scale
    terms = torch.empty(2, *x.shape, dtype=torch.int8)
    terms[0] = coarse
    terms[1] = scaled.sub_(coarse).mul_(FINER).round_()
    return terms.flatten(0, 1), scale
