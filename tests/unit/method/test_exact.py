"""Products that do not round: equal to integer arithmetic, so the same bits on every machine, however they are formed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from relora_ds.method import exact
from tests.products import ExactProducts


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(left: Tensor, right: Tensor) -> Tensor:
    return exact.product(left, exact.columns(right))


def fractions(factor: exact.Whole) -> list[list[Fraction]]:
    return [[Fraction(value) for value in row] for row in (factor.numbers * factor.unit).tolist()]


@pytest.mark.parametrize("terms", [1, 3, 64, 200])
def test_a_product_is_that_of_integer_arithmetic(terms: int) -> None:
    """Not one bit is lost of any sum."""
    left, right = normal(6, terms), normal(terms, 5, seed=1) * 10.0 ** torch.arange(-2, 3)
    a, b = fractions(exact.rows(left)), fractions(exact.columns(right))
    truth = [[sum((row[k] * b[k][j] for k in range(terms)), Fraction(0)) for j in range(5)] for row in a]
    assert [[Fraction(value) for value in row] for row in product(left, right).tolist()] == truth


@pytest.mark.parametrize("terms", [1, 2, 3, 128, 129, 4096])
def test_the_largest_sums_there_can_be_are_exact(terms: int) -> None:
    """All factors just below a power of two, so that they become the largest whole numbers, and of one sign."""
    largest = torch.full((1, terms), 2 - 2**-23)
    numbers = int(exact.rows(largest).numbers[0, 0])
    assert numbers <= 2 ** exact.bits_for(terms) and terms * numbers**2 <= 2**53
    assert terms * (2 * 2 ** exact.bits_for(terms)) ** 2 > 2**53, "a bit more would not be exact"
    with ExactProducts() as asked:
        product(largest, largest.t())
    assert asked.num == 1


def test_the_same_bits_whoever_forms_which_rows_in_which_order() -> None:
    left, right = normal(301, 48), normal(48, 130, seed=1)
    whole = product(left, right)
    for share in (1, 2, 7, 16, 151):
        assert torch.equal(torch.cat([product(piece, right) for piece in left.split(share)]), whole), share
    order = torch.randperm(48, generator=torch.Generator().manual_seed(2))
    assert torch.equal(product(left[:, order], right[order]), whole)
    assert torch.equal(product(left.t().contiguous().t(), right.t().contiguous().t()), whole)
    assert product(left[:0], right).shape == (0, 130)


@contextmanager
def threads(num: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "under",
    [
        lambda: threads(1),
        lambda: threads(2),
        lambda: precision("high"),
        lambda: precision("medium"),
        lambda: torch.autocast("cpu", torch.bfloat16),
    ],
    ids=["1 thread", "2 threads", "TF32", "bf16", "autocast"],
)
def test_no_switch_changes_a_bit(under: Callable[[], AbstractContextManager[None]]) -> None:
    left, right = normal(256, 64), normal(64, 512, seed=1)
    results = []
    for context in (nullcontext, under):
        with context(), ExactProducts():
            results.append(product(left, right))
    assert torch.equal(*results)


@pytest.mark.parametrize(("terms", "times"), [(8, 1.0), (128, 1.5), (1024, 3.0)])
def test_it_errs_about_as_fp32_does(terms: int, times: float) -> None:
    """The widths fall by half a bit with each doubling of the terms; so do the roundings of an fp32 sum add up, as their root."""
    left, right = normal(40, terms), normal(terms, 50, seed=1)
    truth = left.double() @ right.double()
    # A sum in fp32 in the plainest order, by operations that each round correctly: the same on every machine.
    plain = torch.zeros(40, 50)
    for k in range(terms):
        plain += left[:, k : k + 1] * right[k : k + 1]
    assert float((product(left, right).float() - truth).norm()) <= times * float((plain - truth).norm())


def test_numbers_at_the_ends_of_the_range() -> None:
    left = torch.tensor([[0.0, -0.0], [1e-45, -1e-45], [3e38, -3e38], [1.0, 0.0]])
    right = torch.tensor([[0.0, 1e-45, 3e38], [0.0, 3e-45, -3e38]])
    torch.testing.assert_close(product(left, right), left.double() @ right.double(), rtol=1e-7, atol=0)
    assert not torch.signbit(product(-left[:1], right)).any(), "no zero is negative"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    left, right = normal(3, 4), normal(4, 5, seed=1)
    left[1, 2] = value
    assert product(left, right).isfinite().all(1).tolist() == [True, False, True]
    right[0, 3] = value
    assert not product(left, right)[:, 3].isfinite().any()
