"""Singular values of a change of a weight, and what they say of its rank. PURE: knows of no runs and no ranks.

Lialin et al., arXiv 2307.05695, show by these values that restarts add up to a change of high rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SMALL = 0.1
"""The paper counts the singular values below it."""
NOISE_SHARE = 1e-4
"""Values up to this share of the largest count as none: well above what fp32 leaves of a product of low rank."""
EXACT_SIDE = 2048
"""Matrices whose smaller side is longer get only their largest values, from a sketch."""
SKETCH = 512
"""How many those are where nothing is known of the rank."""
OVERSAMPLE = 16
"""Directions of a sketch beyond the rank that is expected."""
POWER_STEPS = 2


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a matrix, or the largest of them.

    Attributes:
        values: those that were computed, (k,) falling, fp32 on the CPU.
        side: how many there are: the smaller side of the matrix.
        norm: Frobenius norm of the matrix.
        error: of a sketch: each value σ lies between the computed one and √(value² + error²), and those that were not computed are
            at most this. 0 where all values were computed.
        noise: what is not above it counts as no value at all.
    """

    values: Tensor
    side: int
    norm: float
    error: float
    noise: float

    @property
    def largest(self) -> float:
        return float(self.values[0]) if len(self.values) else 0.0

    @property
    def num_above_noise(self) -> int:
        """The numerical rank; for a sketch, of the values that were computed."""
        return int((self.values > self.noise).sum())

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the values as shares of their sum (Roy and Vetterli, EUSIPCO 2007); 0 for no change.

        k equal values give k. For a sketch, of the values that were computed.
        """
        total = self.values.sum(dtype=torch.float64)
        if total == 0:
            return 0.0
        shares = self.values.to(torch.float64) / total
        return math.exp(-float(torch.special.xlogy(shares, shares).sum()))

    @property
    def stable_rank(self) -> float:
        """Squared Frobenius norm over the squared largest value; 0 for no change."""
        return (self.norm / self.largest) ** 2 if self.largest else 0.0

    def share_below(self, limit: float = SMALL) -> float:
        """Share of all values below ``limit``. Those that a sketch left out count as below: true where its error is below it."""
        return 1.0 - int((self.values >= limit).sum()) / self.side


def rounding_noise(shape: Sequence[int], spacing: float, roundings: int) -> float:
    """About the largest singular value of what rounding adds to a matrix.

    Each rounding adds independent errors of step / √12 to the entries, and a matrix of independent entries of standard deviation d
    has a largest singular value of about d·(√out + √in).

    Args:
        shape: (out, in) of the matrix.
        spacing: of the numbers that it is kept in (:func:`relora_ds.method.frozen_weights.spacing`).
        roundings: how often it was rounded.
    """
    return spacing * math.sqrt(roundings / 12) * (math.sqrt(shape[0]) + math.sqrt(shape[1]))


@torch.no_grad()
def measure(change: Tensor, *, bound: int | None = None, rounding: float = 0.0, exact_side: int = EXACT_SIDE) -> Spectrum:
    """The spectrum of a change, all values where its smaller side is not above ``exact_side``, else the largest, by a sketch.

    Args:
        change: (out, in) fp32.
        bound: the rank that it has at most, where that is known.
        rounding: see :func:`rounding_noise`.
        exact_side: the longest side for which all values are computed.
    """
    side, norm, error = min(change.shape), float(torch.linalg.matrix_norm(change.to(torch.float64))), 0.0
    if side <= exact_side:
        values = torch.linalg.svdvals(change)
    else:
        values, error = sketch(change, min(side, (SKETCH if bound is None or bound >= side else bound) + OVERSAMPLE))
    largest = float(values[0]) if len(values) else 0.0
    return Spectrum(values.to("cpu", torch.float32), side, norm, error, max(NOISE_SHARE * largest, rounding))


def sketch(matrix: Tensor, size: int, seed: int = 0) -> tuple[Tensor, float]:
    """The largest singular values by a randomised range finder (Halko, Martinsson and Tropp, arXiv 0909.4061), and their error.

    With Q an orthonormal basis of what power steps make of random directions, the values of QᵀM are those of QQᵀM. The squares of M's
    values exceed theirs by E² = ‖M − QQᵀM‖² in all (Frobenius norms). E is computed, not estimated.

    Args:
        matrix: M, (out, in) fp32.
        size: how many values.
        seed: of the random directions.

    Returns:
        (size,) values, falling, none above the true one; and E.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    directions = torch.randn(wide.shape[1], size, generator=generator).to(wide)
    basis = torch.linalg.qr(wide @ directions).Q
    for _ in range(POWER_STEPS):
        basis = torch.linalg.qr(wide.t() @ basis).Q
        basis = torch.linalg.qr(wide @ basis).Q
    inside = basis.t() @ wide
    return torch.linalg.svdvals(inside), float(torch.linalg.matrix_norm(wide - basis @ inside))


def mean(numbers: Sequence[float]) -> float:
    """The arithmetic mean of at least one number."""
    return math.fsum(numbers) / len(numbers)
