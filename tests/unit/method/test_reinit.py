"""First values of the factors: orthonormal rows, and what a store has lost of its master."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from relora_ds.method import frozen_weights, reinit
from relora_ds.method.frozen_weights import FrozenWeight
from relora_ds.method.reinit import ITERATIONS, InitName, initial_A, initial_As, initial_B, principal_inputs
from tests.products import ExactProducts


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rank", "columns"), [(1, 8), (5, 8), (8, 8), (16, 100)])
def test_orthonormal_rows(rank: int, columns: int) -> None:
    rows = initial_A(rank, columns, name="layer", seed=1, restart=2, kind="orthonormal")
    assert rows.dtype == torch.float32 and rows.is_contiguous()
    torch.testing.assert_close(rows @ rows.t(), torch.eye(rank), rtol=0, atol=1e-6)
    assert torch.equal(initial_A(rank, columns, name="layer", seed=1, restart=2, kind="orthonormal"), rows)
    assert not torch.equal(initial_A(rank, columns, name="layer", seed=1, restart=3, kind="orthonormal"), rows)


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("kind", ["kaiming", "orthonormal", "residual"])
def test_the_values_of_many_layers_are_those_of_each(kind: InitName, threads: int) -> None:
    layers = [(f"layer {number}", 2 + number % 3, 8 + number) for number in range(20)]
    values = list(initial_As(layers, seed=1, restart=2, kind=kind, threads=threads))
    assert len(values) == len(layers)
    for value, (name, rank, columns) in zip(values, layers, strict=True):
        assert torch.equal(value, initial_A(rank, columns, name=name, seed=1, restart=2, kind=kind))


def test_values_are_drawn_a_few_layers_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, draw = [], reinit._drawn

    def note(*shape_and_more: Any) -> Tensor:
        drawn.append(threading.current_thread())
        return draw(*shape_and_more)

    monkeypatch.setattr(reinit, "_drawn", note)
    values = initial_As([(str(number), 2, 8) for number in range(100)], seed=1, restart=2, threads=3)
    for used in range(1, 4):
        next(values)
        assert used <= len(drawn) <= used + 3
    values.close()
    assert threading.current_thread() not in drawn


def test_initial_B_is_uniform_within_one_over_the_root_of_the_rank() -> None:
    values = initial_B(400, 16, name="layer", seed=1)
    assert 0.24 < float(values.abs().max()) <= 0.25
    assert float(values.mean()) == pytest.approx(0.0, abs=0.01)
    assert not torch.equal(initial_B(400, 16, name="other", seed=1), values)


def energy(matrix: Tensor, rows: Tensor) -> float:
    """Share of the squared norm of ``matrix`` that its projection onto the row space keeps."""
    return float((matrix @ rows.t()).square().sum() / matrix.square().sum())


def principal(matrix: Tensor, start: Tensor) -> Tensor:
    return principal_inputs(matrix.clone(), start)


def test_a_low_rank_matrix_is_held_whole() -> None:
    matrix = normal(60, 4) @ normal(4, 40, seed=1)
    rows = principal(matrix, initial_A(4, 40, name="layer", seed=0, restart=0))
    torch.testing.assert_close(rows @ rows.t(), torch.eye(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(matrix @ rows.t() @ rows, matrix, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_of_a_rounding_error_as_much_as_an_exact_svd_holds(dtype: str) -> None:
    """Its spectrum is flat: the hardest case. Within 2% of the best that any factors of this rank could hold."""
    weight = 0.02 * normal(384, 256)
    residual = weight - FrozenWeight(weight, dtype).read()
    rows = principal(residual, initial_A(64, 256, name="layer", seed=0, restart=0))
    best = torch.linalg.svdvals(residual.double())[:64].square().sum() / residual.double().square().sum()
    assert 0.98 * float(best) < energy(residual, rows) <= float(best) * 1.0001
    assert float(best) > 0.3


@pytest.mark.parametrize("num", [1, 3, 61])
def test_in_pieces_of_rows_it_is_the_same_bits(num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By construction: all sums that pieces, or threads, could reorder are exact."""
    matrix, start = normal(61, 40), initial_A(8, 40, name="layer", seed=0, restart=0)
    whole = principal(matrix, start)
    monkeypatch.setattr(frozen_weights, "PIECE", 40 * -(-61 // num))
    with ExactProducts() as asked:
        assert torch.equal(principal(matrix, start), whole)
    assert asked.num == ITERATIONS * 2 * num


def test_sums_over_all_rows_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest there can be: whole numbers of one sign, up to their bound; what pieces add up stays within 2**53."""
    sums: list[float] = []
    product = reinit.normal_product

    def seen(*args: Any) -> Tensor:
        total = product(*args)
        sums.append(float(total.abs().max()))
        return total

    monkeypatch.setattr(reinit, "normal_product", seen)
    monkeypatch.setattr(frozen_weights, "PIECE", 3 * 8)
    principal(torch.full((512, 8), 2 - 2**-23), torch.full((1, 8), 8**-0.5))
    assert 2**49 < max(sums) <= 2**53


@pytest.mark.parametrize("of", [lambda: initial_A(96, 1500, name="a", seed=1, restart=0, kind="orthonormal"), None])
def test_the_number_of_threads_changes_no_bit(of: Callable[[], Tensor] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A QR decomposition of this size has other bits with other threads; so it is asked of one, however many there are."""
    seen: list[int] = []
    qr = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda matrix: (seen.append(torch.get_num_threads()), qr(matrix))[1])
    matrix = normal(300, 1500)
    of = of or (lambda: principal(matrix, initial_A(96, 1500, name="a", seed=1, restart=0)))
    before = torch.get_num_threads()
    found = []
    for num in (1, 2):
        torch.set_num_threads(num)
        found.append(of())
        assert torch.get_num_threads() == num
    torch.set_num_threads(before)
    assert torch.equal(*found)
    assert set(seen) == {1}


def test_of_nothing_the_start_is_kept() -> None:
    start = initial_A(3, 10, name="layer", seed=0, restart=0)
    assert torch.equal(principal(torch.zeros(7, 10), start), start)


def test_whole_numbers_stay_within_what_fp32_holds() -> None:
    """Exact sums of so few terms would allow more than its 24 bits."""
    matrix, start = normal(3, 2), initial_A(1, 2, name="layer", seed=0, restart=0)
    best = torch.linalg.svdvals(matrix.double())[0].square() / matrix.double().square().sum()
    assert energy(matrix, principal(matrix, start)) == pytest.approx(float(best), rel=0.02)
    principal_inputs(matrix, start)
    assert torch.equal(matrix, matrix.round()) and 2**23 <= float(matrix.abs().max()) <= 2**24
