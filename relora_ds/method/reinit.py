"""The first values of A and B, at the start of the LoRA phase and at every restart. Pure: no ranks, no optimizer.

Random values are a function of (seed, restart, layer name) alone, so that all ranks, at any world size and after any resume, draw the
same.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor

from relora_ds.method import exact
from relora_ds.method.frozen_weights import piece_on, pieces

InitName = Literal["kaiming", "orthonormal", "residual"]
ITERATIONS = 8
"""Of the subspace iteration: even on the flat spectrum of a rounding error it then holds over 98% of what an exact SVD would."""
KEPT_BITS = 24
"""Of the whole numbers that stand for the matrix: as many as fp32 holds, in which they lie."""


def initial_A(rank: int, in_features: int, *, name: str, seed: int, restart: int, kind: InitName = "kaiming") -> Tensor:
    """A, (rank, in) float32 on the CPU.

    Args:
        rank, in_features: its shape.
        name: of the layer.
        seed, restart: of the run; 0 for the start of the LoRA phase.
        kind: ``kaiming`` (uniform with a = sqrt 5, so in ±1/sqrt(in), as in the paper) or ``orthonormal`` rows (the QR
            decomposition of a normal matrix, in float64). ``residual`` starts from the former, see :func:`principal_inputs`.
    """
    return _finished(_drawn(rank, in_features, f"{seed}/{restart}/{name}", kind), kind)


def initial_As(
    layers: Iterable[tuple[str, int, int]], *, seed: int, restart: int, kind: InitName = "kaiming", threads: int = 0
) -> Iterator[Tensor]:
    """:func:`initial_A` of one layer after another, given as (name, rank, in_features).

    A generator fills one matrix by one thread, ten nanoseconds an entry, while a GPU waits: half a second for llama_1b at rank 128.
    So other threads may draw the numbers, as many layers ahead of the caller: ``threads``; 0 where the caller needs the cores itself.
    """
    if not threads:
        for name, rank, in_features in layers:
            yield initial_A(rank, in_features, name=name, seed=seed, restart=restart, kind=kind)
        return
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[Tensor]] = deque()
        for name, rank, in_features in layers:
            ahead.append(pool.submit(_drawn, rank, in_features, f"{seed}/{restart}/{name}", kind))
            if len(ahead) > threads:
                yield _finished(ahead.popleft().result(), kind)
        while ahead:
            yield _finished(ahead.popleft().result(), kind)


def _drawn(rank: int, in_features: int, draw: str, kind: InitName) -> Tensor:
    """The random numbers that A is made of."""
    if kind == "orthonormal":
        return torch.randn(in_features, rank, dtype=torch.float64, device="cpu", generator=_generator(draw))
    return _kaiming(rank, in_features, _generator(draw))


def _finished(drawn: Tensor, kind: InitName) -> Tensor:
    """A, (rank, in) float32; in the caller's thread, because a QR decomposition sets how many threads all have."""
    return _orthonormal_columns(drawn).t().to(torch.float32).contiguous() if kind == "orthonormal" else drawn


def initial_B(out_features: int, rank: int, *, name: str, seed: int) -> Tensor:
    """B where there is no frozen weight, (out, rank) float32 on the CPU: Kaiming-uniform, since B = 0 is a layer of zeros."""
    return _kaiming(out_features, rank, _generator(f"{seed}/B/{name}"))


def _kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    bound = 1.0 / math.sqrt(columns)
    return torch.empty(rows, columns, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)


def _generator(text: str) -> torch.Generator:
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _orthonormal_columns(matrix: Tensor) -> Tensor:
    """Q of the QR decomposition, by one thread: how many a rank has depends on how many ranks share its CPU, and LAPACK's last bits
    on how many threads there are."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return torch.linalg.qr(matrix).Q
    finally:
        torch.set_num_threads(num_threads)


def principal_inputs(matrix: Tensor, start: Tensor) -> Tensor:
    """The rank-r row space that holds most of a matrix: its leading right singular vectors.

    Subspace iteration in float64 (Golub and Van Loan, Matrix Computations, 8.2.4), Q = orth(Rᵀ R Q). R, Q and R Q are rounded to
    whole numbers of so few bits that all sums are exact (:mod:`relora_ds.method.exact`): with any number of threads the result is the
    same bits. Rounding Q and R Q matters less than what the iteration leaves out.

    Args:
        matrix: R, (out, in) float32. It is overwritten, so that no second one of its size is needed.
        start: (r, in) float32, the subspace to begin with.

    Returns:
        (r, in) float32 with orthonormal rows; ``start`` itself where the matrix is zero.
    """
    columns = start.shape[1]
    bits = min(KEPT_BITS, exact.bits_for(max(matrix.shape)))
    low, high = matrix.aminmax()
    largest = torch.maximum(-low, high).to(torch.float64)
    if not bool(largest):
        return start
    unit = exact.unit_for(largest, bits)
    parts = [matrix[rows] for rows in pieces(slice(0, matrix.shape[0]), columns, piece_on(matrix.device))]
    for part in parts:
        part.copy_(exact.whole(part, unit))
    basis = start.t().to(torch.float64)
    for _ in range(ITERATIONS):
        numbers, basis_unit = exact.columns(basis)
        # No entry of R·q exceeds the longest row that R may have, times the length of q.
        product_unit = exact.unit_for(math.sqrt(columns) * 2.0**bits * numbers.square().sum(0).sqrt(), bits)
        product = normal_product(parts, numbers, product_unit) * product_unit * basis_unit
        if not bool(product.any()):
            return start
        basis = _orthonormal_columns(product / product.abs().max())
    return basis.t().to(torch.float32).contiguous()


def normal_product(parts: Sequence[Tensor], numbers: Tensor, unit: Tensor) -> Tensor:
    """Rᵀ (R Q), where R Q is rounded to whole numbers of ``unit``: (in, r) fp64 from rows of R and from Q, whole numbers both."""
    product = torch.zeros_like(numbers)
    for part in parts:
        own = part.to(torch.float64)
        product += own.t() @ exact.whole(own @ numbers, unit)
    return product
