"""Merging into frozen weights, what its rounding loses, and checksums of bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from relora_ds import frozen
from relora_ds.frozen import MergeStats, checksum, merge_into

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64]


def grid(*shape: int, step: float, seed: int) -> Tensor:
    """Random multiples of ``step`` in [-1, 1]: sums of two such grids are exact in fp32 when the steps are not below 2**-20."""
    generator = torch.Generator().manual_seed(seed)
    limit = round(1 / step)
    return torch.randint(-limit, limit + 1, shape, generator=generator) * step


def test_merge_into_fp32_is_the_sum_and_loses_nothing() -> None:
    weight, delta = grid(24, 16, step=2**-10, seed=0), grid(24, 16, step=2**-16, seed=1)
    exact = weight.double() + delta.double()
    stats = merge_into(weight, delta)
    assert weight.dtype == torch.float32
    assert torch.equal(weight.double(), exact)
    assert float(stats.change) == pytest.approx(float(delta.double().square().sum()), rel=1e-5)
    assert float(stats.lost) == 0.0
    assert stats.merge_error == 0.0


def test_merge_into_bf16_is_the_exact_sum_rounded_once() -> None:
    weight, delta = grid(24, 16, step=2**-6, seed=0).to(torch.bfloat16), grid(24, 16, step=2**-16, seed=1)
    before, exact = weight.double(), weight.double() + delta.double()
    stats = merge_into(weight, delta)
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, exact.to(torch.bfloat16))
    assert float(stats.lost) > 0
    assert float(stats.lost) == pytest.approx(float((exact - weight.double()).square().sum()), rel=1e-4)
    assert float(stats.weight) == pytest.approx(float(before.square().sum()), rel=1e-5)


def test_bf16_statistics_by_hand() -> None:
    """Above 1, bf16 has steps of 2**-7: of a change by 2**-7 + 2**-9 the second part, a fifth of the whole, is lost."""
    weight = torch.ones(4, 8, dtype=torch.bfloat16)
    stats = merge_into(weight, torch.full((4, 8), 2**-7 + 2**-9))
    assert torch.equal(weight, torch.full((4, 8), 1 + 2**-7, dtype=torch.bfloat16))
    assert float(stats.change) == pytest.approx(32 * (2**-7 + 2**-9) ** 2)
    assert float(stats.lost) == pytest.approx(32 * 2**-18)
    assert float(stats.weight) == 32.0
    assert stats.relative_change == pytest.approx(2**-7 + 2**-9)
    assert stats.merge_error == pytest.approx(1 / 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_change_is_measured_against_the_weight_before(dtype: torch.dtype) -> None:
    stats = merge_into(torch.full((4, 4), 2.0, dtype=dtype), torch.full((4, 4), 2.0))
    assert stats.relative_change == pytest.approx(1.0)


def test_statistics_of_several_merges_add_up() -> None:
    def stats(change: float, lost: float, weight: float) -> MergeStats:
        return MergeStats(torch.tensor(change), torch.tensor(lost), torch.tensor(weight))

    total = stats(3.0, 0.25, 60.0) + stats(1.0, 0.75, 40.0)
    assert total.relative_change == pytest.approx((4 / 100) ** 0.5)
    assert total.merge_error == pytest.approx((1 / 4) ** 0.5)


def test_merging_nothing_loses_nothing() -> None:
    weight = grid(3, 5, step=2**-6, seed=0).to(torch.bfloat16)
    before = weight.clone()
    stats = merge_into(weight, torch.zeros(3, 5))
    assert torch.equal(weight, before)
    assert (stats.relative_change, stats.merge_error) == (0.0, 0.0)


def random_bits(dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(-128, 128, (*shape[:-1], shape[-1] * size), generator=generator).to(torch.int8)
    return raw.view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checksum_is_one_int64_and_repeats(dtype: torch.dtype) -> None:
    tensor = random_bits(dtype, 6, 5)
    assert checksum(tensor).dtype == torch.int64
    assert checksum(tensor).shape == ()
    assert int(checksum(tensor)) == int(checksum(tensor.clone()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checksum_changes_with_every_single_bit(dtype: torch.dtype) -> None:
    tensor = random_bits(dtype, 3, 5)
    original, width = int(checksum(tensor)), 8 * tensor.element_size()
    for element in range(tensor.numel()):
        for bit in range(width):
            flipped = tensor.clone()
            raw = flipped.view(INTEGERS[tensor.element_size()]).view(-1)
            raw[element] ^= torch.tensor(-(1 << bit) if bit == width - 1 else 1 << bit, dtype=raw.dtype)
            assert int(checksum(flipped)) != original, f"bit {bit} of element {element}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checksum_changes_with_the_sign_of_zero_or_a_swap(dtype: torch.dtype) -> None:
    tensor = random_bits(dtype, 40)
    original = int(checksum(tensor))
    for first, second in ((0, 1), (3, 17), (38, 39)):
        swapped = tensor.clone()
        swapped[[first, second]] = tensor[[second, first]]
        assert int(checksum(swapped)) != original
    if dtype.is_floating_point:
        assert int(checksum(torch.zeros(3, dtype=dtype))) != int(checksum(-torch.zeros(3, dtype=dtype)))


def test_checksum_does_not_depend_on_strides() -> None:
    tensor = random_bits(torch.bfloat16, 6, 10)

    def bits(values: Tensor) -> Tensor:
        return values.contiguous().view(torch.int16)

    column_major = tensor.t().contiguous().t()
    every_second = torch.stack([tensor, tensor], dim=-1).flatten(1)[:, ::2]
    for other in (column_major, every_second):
        assert not other.is_contiguous()
        assert torch.equal(bits(other), bits(tensor))
        assert int(checksum(other)) == int(checksum(tensor))


@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 65])
def test_checksum_does_not_depend_on_the_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = random_bits(torch.float32, 8, 8)
    whole = int(checksum(tensor))
    monkeypatch.setattr(frozen, "CHUNK", chunk)
    assert int(checksum(tensor)) == whole


def test_checksum_of_nothing_and_of_one_number() -> None:
    assert int(checksum(torch.empty(0))) == 0
    assert int(checksum(torch.tensor(1.0))) != int(checksum(torch.tensor(2.0)))
