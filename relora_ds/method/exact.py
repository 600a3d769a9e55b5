"""Products of matrices whose sums do not round, so that their bits depend on the values alone. PURE: knows of no ranks.

A product in floating point has other last bits on another machine, with another number of rows or of threads, and where TF32 or bf16
is allowed. Here the factors are first rounded to whole numbers (times a power of two), of so few bits that no sum of their products
leaves fp64's 53: all sums are exact, and their order means nothing (the error-free products of Ozaki et al., Numerical Algorithms
59, 2012, with one slice). An entry loses 2**-:func:`bits_for` of the largest in its row or column at most; with up to 128 terms
that is 2**-23, and the product errs about as one in fp32 does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SUM_BITS = 53
"""Whole numbers up to 2**53 are exact in fp64."""
EXPONENT = 0x7FF << 52
"""The exponent's bits in an fp64 number that is not negative: what they alone are worth is the largest power of two within it."""


class Whole(NamedTuple):
    """A matrix as ``numbers * unit``: whole numbers in fp64, and powers of two that broadcast."""

    numbers: Tensor
    unit: Tensor


def bits_for(terms: int) -> int:
    """How many bits wide two factors may be for a sum of so many products to be exact."""
    return (SUM_BITS - (terms - 1).bit_length()) // 2


def unit_for(largest: Tensor, bits: int) -> Tensor:
    """Powers of two by which numbers up to ``largest``, fp64 and not negative, become whole numbers up to 2**bits.

    Where ``largest`` is infinite or not a number the result is not finite either, nor is what is made of it.
    """
    power = (largest.view(torch.int64) & EXPONENT).view(torch.float64)
    return power.masked_fill(power == 0, 1.0) * 2.0 ** (1 - bits)


def whole(values: Tensor, unit: Tensor) -> Tensor:
    """``values``, of any floating dtype, as the nearest whole numbers of ``unit``: fp64."""
    return values.to(torch.float64, copy=True).div_(unit).round_()  # in place: fresh pages cost more than the arithmetic


def rows(left: Tensor) -> Whole:
    """The left factor (n, k) of a product, each row by its own unit."""
    return _whole(left, dim=1, terms=left.shape[1])


def columns(right: Tensor) -> Whole:
    """The right factor (k, m) of a product, each column by its own unit."""
    return _whole(right, dim=0, terms=right.shape[0])


@torch.no_grad()
def _whole(values: Tensor, dim: int, terms: int) -> Whole:
    unit = unit_for(values.abs().amax(dim, keepdim=True).to(torch.float64), bits_for(terms))
    return Whole(whole(values, unit), unit)


@torch.no_grad()
def product(left: Tensor, right: Whole) -> Tensor:
    """left (n, k) · right (k, m): (n, m) fp64, each row the same bits whichever rows it is formed with.

    Args:
        left: of any floating dtype.
        right: what :func:`columns` gave.
    """
    numbers, unit = rows(left)
    total = (numbers @ right.numbers).add_(0.0)  # a kernel may leave -0.0 where another leaves 0.0
    return total.mul_(unit).mul_(right.unit)
