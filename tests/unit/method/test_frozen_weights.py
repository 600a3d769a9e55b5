"""Merging into frozen weights, what its rounding loses, and checksums of bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from relora_ds.method import exact, frozen_weights
from relora_ds.method.frozen_weights import (
    FLOATS,
    FrozenWeight,
    MergeStats,
    ShardedMaster,
    checksum,
    dequantise,
    own_rows,
    quantise,
)
from tests.memory import PeakMemory

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64]


def merge_into(weight: Tensor, delta: Tensor) -> MergeStats:
    """Merges ``delta`` into a store that holds ``weight``, which takes the result."""
    store = FrozenWeight(weight, next(name for name, dtype in FLOATS.items() if dtype == weight.dtype))
    stats = store.merge(delta.__getitem__)
    weight.copy_(store.values)
    return stats


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


@pytest.mark.parametrize("rows", [1, 5, 24])
def test_merges_in_pieces_are_those_of_the_whole(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, delta = grid(24, 16, step=2**-10, seed=0), grid(24, 16, step=2**-16, seed=1)
    exact = weight.double() + delta.double()
    monkeypatch.setattr(frozen_weights, "PIECE", rows * 16)
    stats = merge_into(weight, delta)
    assert torch.equal(weight.double(), exact)
    assert float(stats.change) == pytest.approx(float(delta.double().square().sum()), rel=1e-5)


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


@pytest.mark.parametrize("piece", [1, 7, 16, 64, 65])
def test_checksum_does_not_depend_on_the_piece(piece: int) -> None:
    tensor = random_bits(torch.float32, 8, 8)
    assert int(checksum(tensor, piece)) == int(checksum(tensor))


def test_checksum_of_nothing_and_of_one_number() -> None:
    assert int(checksum(torch.empty(0))) == 0
    assert int(checksum(torch.tensor(1.0))) != int(checksum(torch.tensor(2.0)))


# Storage


def normal(rows: int, columns: int, seed: int = 0, std: float = 0.02) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * std


def relative_error(stored: Tensor, exact: Tensor) -> float:
    return float((stored.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize(("group_size", "error"), [(128, 0.0065), (64, 0.0059), (1024, 0.0079)])
def test_int8_rounding_error_of_normal_weights(group_size: int, error: float) -> None:
    weight = normal(1024, 1024)
    values, scales = quantise(weight, group_size)
    assert relative_error(dequantise(values, scales, group_size, torch.float32), weight) == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize("columns", [1, 7, 127, 128, 129, 300])
def test_int8_with_a_ragged_last_group(columns: int) -> None:
    weight = normal(5, columns)
    values, scales = quantise(weight, 128)
    assert values.dtype == torch.int8 and values.shape == weight.shape
    assert scales.dtype == torch.float32 and scales.shape == (5, -(-columns // 128))
    back = dequantise(values, scales, 128, torch.float32)
    assert float((back - weight).abs().max()) <= float(scales.max()) / 2 * 1.0001, "rounded to the nearest"
    assert torch.equal(*(quantise(matrix, 128)[0] for matrix in (weight, back))), "what is stored is stored again as it is"


def test_int8_of_zeros_and_tiny_numbers() -> None:
    values, scales = quantise(torch.tensor([[0.0, 0.0], [1e-40, -1e-41]]), 2)
    assert torch.isfinite(dequantise(values, scales, 2, torch.float32)).all()
    assert torch.equal(values[0], torch.zeros(2, dtype=torch.int8))


def test_int8_takes_at_most_1_04_bytes_per_weight() -> None:
    assert FrozenWeight(normal(256, 512), "int8").stored_bytes / (256 * 512) <= 1.04


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_casts_of_the_model_leave_the_store_intact(dtype: str) -> None:
    """What DeepSpeed, ``.to`` and ``.bfloat16`` do to a model; a saved state comes back to the bit."""
    store = FrozenWeight(normal(9, 200), dtype)
    before = {name: buffer.clone() for name, buffer in store.named_buffers()}
    nn.Sequential(store).bfloat16().to(torch.float16).to("cpu")
    for name, buffer in store.named_buffers():
        assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name])
    other = FrozenWeight(normal(9, 200, seed=1), dtype)
    other.load_state_dict(store.state_dict())
    assert all(torch.equal(buffer, before[name]) for name, buffer in other.named_buffers())


def test_a_scale_is_the_largest_magnitude_of_its_group_over_127() -> None:
    """To the last bit, as division is defined: CUDA would multiply by the inverse of a number (benchmarks/gpu_checks.py)."""
    weight = normal(16, 130)
    groups = [weight[:, start : start + 32] for start in range(0, 130, 32)]
    expected = torch.stack([group.abs().amax(1) / torch.tensor(127.0) for group in groups], dim=1)
    assert torch.equal(quantise(weight, 32)[1], expected)


# The sharded master


@pytest.mark.parametrize(("rows", "world_size"), [(10, 1), (10, 3), (2, 4), (7, 4)])
def test_every_row_has_one_owner(rows: int, world_size: int) -> None:
    owned = [list(range(rows))[own_rows(rows, rank, world_size)] for rank in range(world_size)]
    assert [row for part in owned for row in part] == list(range(rows))


def alone(store: FrozenWeight) -> ShardedMaster:
    return ShardedMaster({"w": store}, 0, 1, lambda out, mine: out.copy_(mine), "cpu")


PLAIN = {"bf16": 0.0017, "int8": 0.0065}


@pytest.mark.parametrize("merges", [5, 20, 100])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_after_any_number_of_merges_the_store_is_the_rounding_of_the_exact_sum(dtype: str, merges: int) -> None:
    """Merges of 0.3% of the norm each: with the master the error stays that of plain rounding; without it, it grows."""
    weight = normal(128, 128)
    exact = weight.double()
    with_master, without = (FrozenWeight(weight, dtype, exact_rows=slice(None)), FrozenWeight(weight, dtype))
    master = alone(with_master)
    for merge in range(merges):
        delta = normal(128, 4, seed=10 + merge) @ normal(4, 128, seed=1000 + merge)
        delta *= 0.003 * weight.norm() / delta.norm()
        exact += delta.double()
        master.merge("w", delta.__getitem__)
        without.merge(delta.__getitem__)
    plain = relative_error(FrozenWeight(exact.float(), dtype).read(), exact)
    assert relative_error(with_master.read(), exact) == pytest.approx(plain, rel=0.02)
    assert plain == pytest.approx(PLAIN[dtype], rel=0.05)
    if merges >= 20:
        assert relative_error(without.read(), exact) > 1.3 * plain


def test_the_master_starts_from_exact_rows_where_they_were_kept() -> None:
    weight = normal(8, 64)
    assert torch.equal(alone(FrozenWeight(weight, "int8", exact_rows=slice(None))).rows["w"], weight)
    assert not torch.equal(alone(FrozenWeight(weight, "int8")).rows["w"], weight)


def test_a_checkpoint_without_a_master_gives_what_is_stored() -> None:
    store = FrozenWeight(normal(8, 64), "int8", exact_rows=slice(None))
    master = alone(store)
    saved = {"rows": {"w": normal(8, 64, seed=7)}, "held": {"w": (normal(8, 2), normal(2, 64))}}
    master.load(saved)
    assert torch.equal(master.rows["w"], saved["rows"]["w"])
    assert torch.equal(master.held["w"][1], saved["held"]["w"][1])
    master.load(None)
    assert torch.equal(master.rows["w"], store.read())
    assert not master.held


def test_what_the_factors_hold_of_the_residual_is_not_added_twice() -> None:
    """Factors that begin with the residual, are trained, and are merged: the master is the exact sum still."""
    weight = normal(48, 64)
    master = alone(FrozenWeight(weight, "int8", exact_rows=slice(None)))
    residual = torch.cat([piece for _, piece in master.residual("w")])
    torch.testing.assert_close(residual, weight - master.weights["w"].read(), rtol=0, atol=0)
    left, right = normal(48, 4, seed=1, std=1), normal(4, 64, seed=2)
    master.hold("w", left, right)
    trained = normal(48, 64, seed=3, std=1e-3)
    change = left @ right + trained
    master.merge("w", change.__getitem__)
    torch.testing.assert_close(master.rows["w"], weight + trained, rtol=0, atol=1e-6)
    assert torch.equal(master.weights["w"].read(), FrozenWeight(master.rows["w"], "int8").read())
    assert not master.held, "merged: the next factors begin anew"


# Rows


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_are_looked_up_are_those_of_the_whole(dtype: str, wanted: torch.dtype) -> None:
    store, ids = FrozenWeight(normal(40, 50), dtype, group_size=16), torch.tensor([[7, 39, 7], [0, 12, 3]])
    rows = store.look_up(ids, wanted)
    assert rows.dtype == wanted and torch.equal(rows, store.read()[ids].to(wanted))
    assert store.look_up(ids[:, :0], wanted).shape == (2, 0, 50)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_looking_rows_up_converts_no_other(dtype: str) -> None:
    store, ids = FrozenWeight(normal(4096, 64), dtype, group_size=16), torch.tensor([[7, 4000, 7], [0, 12, 3]])
    with PeakMemory() as memory:
        store.look_up(ids, torch.float32)
    assert 0 < memory.peak <= 4 * ids.numel() * 64 * 4, "values, scales and two fp32 copies of six rows, at most"


# Memory


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("sharded", [False, True])
def test_peak_memory_of_a_merge_is_a_few_pieces(dtype: str, sharded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside store, master and the change's factors: the layer in its stored dtype, where it is gathered, and eight pieces."""
    rows, columns = 512, 768
    monkeypatch.setattr(frozen_weights, "PIECE", rows * columns // 16)
    store = FrozenWeight(normal(rows, columns), dtype, exact_rows=slice(None) if sharded else None)
    master = alone(store) if sharded else None
    left, right = normal(rows, 4), exact.columns(normal(4, columns))

    def change(piece: slice) -> Tensor:
        return exact.product(left[piece], right).to(torch.float32)

    with PeakMemory() as memory:
        if master is None:
            store.merge(change)
        else:
            master.merge("w", change)
    assert 0 < memory.peak <= (store.stored_bytes if sharded else 0) + 4 * rows * columns // 2


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_peak_memory_of_storing_is_the_store_and_a_few_pieces(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(512, 768)
    monkeypatch.setattr(frozen_weights, "PIECE", weight.numel() // 16)
    with PeakMemory() as memory:
        store = FrozenWeight(weight, dtype)
    assert store.stored_bytes <= memory.peak <= store.stored_bytes + weight.nbytes // 2


def test_the_master_takes_four_bytes_per_weight_and_rank() -> None:
    weights = {"a": FrozenWeight(normal(96, 64), "int8"), "b": FrozenWeight(normal(48, 32), "bf16")}
    total = sum(weight.values.numel() for weight in weights.values())
    for world_size in (1, 2, 4):
        for rank in range(world_size):
            master = ShardedMaster(weights, rank, world_size, lambda out, mine: None, "cpu")
            assert sum(rows.nbytes for rows in master.rows.values()) == 4 * total / world_size
