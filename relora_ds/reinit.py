"""The first values of A and B, at the start of the LoRA phase and at every restart. Pure: no ranks, no optimizer.

Random values are a function of (seed, restart, layer name) alone, so that all ranks, at any world size and after any resume, draw the
same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

InitName = Literal["kaiming", "orthonormal", "residual"]
ITERATIONS = 8
"""Of the subspace iteration: even on the flat spectrum of a rounding error it then holds over 98% of what an exact SVD would."""


def initial_A(rank: int, in_features: int, *, name: str, seed: int, restart: int, kind: InitName = "kaiming") -> Tensor:
    """A, (rank, in) float32 on the CPU.

    Args:
        rank, in_features: its shape.
        name: of the layer.
        seed, restart: of the run; 0 for the start of the LoRA phase.
        kind: ``kaiming`` (uniform with a = sqrt 5, so in ±1/sqrt(in), as in the paper) or ``orthonormal`` rows (the QR
            decomposition of a normal matrix, in float64). ``residual`` starts from the former, see :func:`principal_inputs`.
    """
    generator = _generator(f"{seed}/{restart}/{name}")
    if kind == "orthonormal":
        normal = torch.randn(in_features, rank, dtype=torch.float64, device="cpu", generator=generator)
        return torch.linalg.qr(normal).Q.t().to(torch.float32).contiguous()
    return _kaiming(rank, in_features, generator)


def initial_B(out_features: int, rank: int, *, name: str, seed: int) -> Tensor:
    """B where there is no frozen weight, (out, rank) float32 on the CPU: Kaiming-uniform, since B = 0 is a layer of zeros."""
    return _kaiming(out_features, rank, _generator(f"{seed}/B/{name}"))


def _kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    bound = 1.0 / math.sqrt(columns)
    return torch.empty(rows, columns, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)


def _generator(text: str) -> torch.Generator:
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def principal_inputs(
    residual: Callable[[], Iterable[Tensor]], start: Tensor, sum_over_ranks: Callable[[Tensor], Tensor]
) -> Tensor:
    """The rank-r row space that holds most of a matrix whose rows are split over ranks: its leading right singular vectors.

    Subspace iteration in float64 (Golub and Van Loan, Matrix Computations, 8.2.4). Only sums of (in, r) matrices travel. Without
    truncation at the end the result depends smoothly on the matrix, so the order of sums does not turn it.

    Args:
        residual: gives this rank's rows anew at every call, in pieces (rows, in).
        start: (r, in) float32, the subspace to begin with.
        sum_over_ranks: adds a float64 tensor over the ranks.

    Returns:
        (r, in) float32 with orthonormal rows; ``start`` itself where the matrix is zero.
    """
    basis = start.t().to(torch.float64)
    for _ in range(ITERATIONS):
        product = torch.zeros_like(basis)
        for piece in residual():
            exact = piece.to(torch.float64)
            product += exact.t() @ (exact @ basis)
        product = sum_over_ranks(product)
        if not bool(product.any()):
            return start
        basis = torch.linalg.qr(product / product.abs().max()).Q
    return basis.t().to(torch.float32).contiguous()
