"""Spectra of matrices whose singular values are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from relora_ds.spectra.spectrum import NOISE_SHARE, Spectrum, measure, rounding_noise, sketch


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q


def with_values(values: list[float], shape: tuple[int, int]) -> Tensor:
    """An (out, in) fp32 matrix with these singular values, and zeros."""
    left, right = (orthonormal(side, len(values), seed) for seed, side in enumerate(shape))
    return (left * torch.tensor(values, dtype=torch.float64) @ right.t()).to(torch.float32)


@pytest.mark.parametrize("shape", [(40, 40), (40, 96), (96, 40)])
def test_a_matrix_of_rank_k_has_k_values_above_noise(shape: tuple[int, int]) -> None:
    values = [3.0, 1.0, 0.2, 0.05, 0.001]
    found = measure(with_values(values, shape))
    assert found.side == len(found.values) == 40 and found.error == 0.0
    assert found.values[:5].tolist() == pytest.approx(values, rel=1e-3)
    assert found.num_above_noise == 5 and found.noise == pytest.approx(3 * NOISE_SHARE)
    assert found.largest == pytest.approx(3.0) and found.norm == pytest.approx(math.hypot(*values))
    assert found.share_below(0.1) == pytest.approx(37 / 40)
    assert found.share_below(0.5) == pytest.approx(38 / 40)


@pytest.mark.parametrize("count", [1, 7, 24])
def test_equal_values_have_their_number_as_effective_and_stable_rank(count: int) -> None:
    found = measure(with_values([0.5] * count, (24, 60)))
    assert found.effective_rank == pytest.approx(count, rel=1e-3)
    assert found.stable_rank == pytest.approx(count, rel=1e-5)


def test_unequal_values() -> None:
    found = Spectrum(torch.tensor([3.0, 1.0]), side=2, norm=math.sqrt(10), error=0.0, noise=0.0)
    assert found.effective_rank == pytest.approx(4 / 3**0.75)  # shares 3/4 and 1/4
    assert found.stable_rank == pytest.approx(10 / 9)


def test_no_change_has_no_rank() -> None:
    found = measure(torch.zeros(8, 5))
    assert (found.num_above_noise, found.effective_rank, found.stable_rank, found.share_below()) == (0, 0.0, 0.0, 1.0)


def test_fp32_is_enough_for_the_noise_level() -> None:
    """The values that it gives a product of low rank beyond its rank, and its errors, are far below that."""
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(300, 8, generator=generator) @ torch.randn(8, 200, generator=generator)
    found, exact = measure(matrix), torch.linalg.svdvals(matrix.to(torch.float64))
    assert (found.values - exact).abs().max() < 0.1 * NOISE_SHARE * found.largest
    assert found.values[8] < 0.1 * found.noise and found.num_above_noise == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_noise(dtype: torch.dtype) -> None:
    """A weight that was rounded, and rounded again after a change of rank 2, shows that change and nothing else."""
    weight = torch.randn(200, 120, generator=torch.Generator().manual_seed(4)) * 0.02
    change = with_values([1.0, 0.5], (200, 120))
    after = ((weight.to(dtype).float() + change).to(dtype).float() + change).to(dtype).float()
    step = float(after.square().mean().sqrt()) * torch.finfo(dtype).eps
    noise = rounding_noise(after.shape, step, 3)
    found = measure(after - weight.to(dtype).float(), rounding=noise)
    assert found.num_above_noise == 2
    assert found.values[2] > NOISE_SHARE * found.largest or dtype is torch.float16, "or there would be no need of it"
    assert 0.2 * noise < found.values[2] < noise


# The sketch


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
@pytest.mark.parametrize("decay", [0.5, 0.97, 1.0])
def test_a_sketch_is_right_within_the_error_that_it_states(shape: tuple[int, int], decay: float) -> None:
    """Of values that fall fast, slowly and not at all."""
    matrix = with_values([decay**index for index in range(200)], shape)
    exact = torch.linalg.svdvals(matrix)
    values, error = sketch(matrix, 40)
    rounding = 1e-5
    assert (values <= exact[:40] + rounding).all()
    assert (exact[:40] <= (values.square() + error**2).sqrt() + rounding).all()
    assert exact[40] <= error + rounding
    left = float((exact.square().sum() - values.square().sum()).clamp(min=0).sqrt())
    assert error == pytest.approx(left, rel=0.01, abs=2e-3)
    again, same = sketch(matrix, 40)
    assert torch.equal(again, values) and same == error, "its directions are always the same"


def test_a_sketch_finds_all_of_a_change_whose_rank_is_known() -> None:
    values = [2.0] * 10 + [0.3] * 10
    found = measure(with_values(values, (160, 120)), bound=20, exact_side=64)
    assert found.side == 120 and len(found.values) == 36 and found.error < 1e-5
    assert found.num_above_noise == 20
    assert found.values[:20].tolist() == pytest.approx(values, rel=1e-4)
    assert found.share_below(0.1) == pytest.approx(100 / 120)
    everything = measure(with_values(values, (160, 120)))
    assert found.effective_rank == pytest.approx(everything.effective_rank, rel=1e-3)
    assert found.stable_rank == pytest.approx(everything.stable_rank, rel=1e-4)
