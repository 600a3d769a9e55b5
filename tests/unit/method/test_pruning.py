"""The radix select against a plain sort, for any placement of the shards. Ranks are threads that meet in the all-reduce."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from relora_ds.method import pruning
from relora_ds.method.pruning import KeyFragment, magnitude_keys, num_kept, random_keys, select_largest, select_largest_of_one


def awkward_values(numel: int, seed: int) -> Tensor:
    """Normal numbers with ties, zeros of both signs, denormals and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=generator)
    kind = torch.randint(0, 8, (numel,), generator=generator)
    values[kind == 0] = 0.0
    values[kind == 1] = -0.0
    values[kind == 2] = 0.5
    values[kind == 3] = -0.5
    values[kind == 4] *= 1e-42
    values[torch.rand(numel, generator=generator) < 0.01] = float("inf")
    return values


def sorted_mask(values: Tensor, ratio: float) -> Tensor:
    """What the select must return: a stable sort by falling magnitude keeps the lower flat index among equals."""
    order = torch.sort(values.abs().double(), descending=True, stable=True).indices
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[order[: num_kept(values.numel(), ratio)]] = True
    return mask


def on_ranks(world_size: int, function: Callable[[int, Callable[[Tensor], None]], None]) -> None:
    """Runs ``function(rank, all_reduce_sum)`` in one thread per rank."""
    meet = threading.Barrier(world_size)
    parts: list[Tensor | None] = [None] * world_size
    errors: list[BaseException] = []

    def body(rank: int) -> None:
        def all_reduce_sum(tensor: Tensor) -> None:
            parts[rank] = tensor.clone()
            meet.wait(10)
            total = torch.stack([part for part in parts if part is not None]).sum(0)
            meet.wait(10)
            tensor.copy_(total)

        try:
            function(rank, all_reduce_sum)
        except BaseException as error:
            errors.append(error)
            meet.abort()

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def select_sharded(tensors: list[Tensor], cuts: list[int], ratio: float, across_tensors: bool) -> list[Tensor]:
    """Masks of all tensors when the concatenation of them is cut at ``cuts`` into one shard per rank."""
    edges = [0, *cuts, sum(t.numel() for t in tensors)]
    masks = [torch.zeros(t.numel(), dtype=torch.bool) for t in tensors]
    starts = [0, *itertools.accumulate(t.numel() for t in tensors)]
    pieces = [
        (index, place - low)
        for index, (low, high) in enumerate(itertools.pairwise(starts))
        for place in sorted({low, *(edge for edge in edges if low < edge < high)})
    ]

    def body(rank: int, all_reduce_sum: Callable[[Tensor], None]) -> None:
        fragments, offset = [], 0
        for index, tensor in enumerate(tensors):
            start, end = max(edges[rank] - offset, 0), min(edges[rank + 1] - offset, tensor.numel())
            if start < end:
                fragments.append(KeyFragment(index, start, magnitude_keys(tensor[start:end])))
            offset += tensor.numel()
        kept = select_largest(
            fragments,
            [t.numel() for t in tensors],
            ratio,
            all_reduce_sum,
            pieces=pieces,
            across_tensors=across_tensors,
        )
        assert list(kept) == [fragment.tensor for fragment in fragments]
        for fragment in fragments:
            mask = kept[fragment.tensor]
            masks[fragment.tensor][fragment.start : fragment.start + mask.numel()] = mask

    on_ranks(len(edges) - 1, body)
    return masks


PLACEMENTS = {
    "one rank": [],
    "two ranks, a tensor straddles": [700],
    "three ranks, a tensor over all": [1001, 1500],
    "four ranks, one owns nothing": [400, 400, 1900],
    "four ranks, the last owns nothing": [300, 900, 2237],
}


@pytest.fixture(params=[1, 600, 1 << 16], ids=["each apart", "some together", "all together"])
def batch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many keys are worked on together."""
    monkeypatch.setattr(pruning, "BATCH", request.param)


@pytest.mark.usefixtures("batch")
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.8, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("cuts", PLACEMENTS.values(), ids=PLACEMENTS.keys())
def test_per_tensor_equals_a_sort(cuts: list[int], ratio: float) -> None:
    tensors = [awkward_values(n, seed) for seed, n in enumerate([500, 1, 1729, 7])]
    masks = select_sharded(tensors, cuts, ratio, across_tensors=False)
    for tensor, mask in zip(tensors, masks, strict=True):
        assert int(mask.sum()) == num_kept(tensor.numel(), ratio)
        assert torch.equal(mask, sorted_mask(tensor, ratio))


@pytest.mark.usefixtures("batch")
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("cuts", PLACEMENTS.values(), ids=PLACEMENTS.keys())
def test_across_tensors_equals_a_sort_of_all(cuts: list[int], ratio: float) -> None:
    tensors = [awkward_values(n, seed) for seed, n in enumerate([500, 1, 1729, 7])]
    masks = select_sharded(tensors, cuts, ratio, across_tensors=True)
    assert torch.equal(torch.cat(masks), sorted_mask(torch.cat(tensors), ratio))


@pytest.mark.parametrize("value", [0.0, 1e-45, 3.5, float("inf")])
def test_all_equal_keeps_the_lowest_indices(value: float) -> None:
    (mask,) = select_sharded([torch.full((1000,), value)], [10, 999], 0.9, across_tensors=False)
    assert torch.equal(mask.nonzero().flatten(), torch.arange(100))


def test_keys_sort_like_magnitudes() -> None:
    values = torch.tensor([0.0, -1e-45, 1e-40, -1e-38, 0.1, -0.1, 1.0, -3e38, float("inf"), float("nan")])
    keys = magnitude_keys(values)
    assert keys.tolist() == sorted(keys.tolist())
    assert keys[4] == keys[5]
    assert magnitude_keys(torch.tensor([-0.0])).item() == 0


def test_random_keys_are_a_function_of_the_seed() -> None:
    assert torch.equal(random_keys(1000, 3), random_keys(1000, 3))
    assert not torch.equal(random_keys(1000, 3), random_keys(1000, 4))
    assert random_keys(1000, 3).min() >= 0
    with torch.device("meta"):  # a script's default device
        drawn = random_keys(1000, 3)
    assert torch.equal(drawn, random_keys(1000, 3))


@pytest.mark.parametrize(
    ("numel", "ratio", "kept"), [(1000, 0.99, 10), (7, 0.99, 1), (100, 0.0, 100), (100, 1.0, 0), (3, 0.5, 2)]
)
def test_number_kept(numel: int, ratio: float, kept: int) -> None:
    assert num_kept(numel, ratio) == kept


def what_travels(keys: list[Tensor], numels: list[int], ratio: float) -> list[tuple[torch.Size, torch.dtype]]:
    """Shapes and dtypes of the sums of a rank whose pieces are whole tensors; further pieces are elsewhere."""
    sums: list[tuple[torch.Size, torch.dtype]] = []
    fragments = [KeyFragment(index, 0, values) for index, values in enumerate(keys)]
    pieces = [(index, start) for index, n in enumerate(numels) for start in (0, n)]
    select_largest(fragments, numels, ratio, lambda counts: sums.append((counts.shape, counts.dtype)), pieces=pieces)
    return sums


def test_ties_are_told_only_where_some_but_not_all_are_wanted() -> None:
    distinct, tied = torch.arange(100, dtype=torch.int32), torch.arange(50, dtype=torch.int32).repeat(2)
    counts = [(torch.Size([2, 16]), torch.int32)] * 8
    assert what_travels([distinct, distinct], [100, 100], 0.9) == counts
    assert what_travels([distinct, tied], [100, 100], 0.9) == counts, "ten of a hundred: five pairs"
    assert what_travels([distinct, tied], [100, 100], 0.91) == [*counts, (torch.Size([2]), torch.int32)], (
        "pieces of the second alone"
    )
    assert what_travels([], [1, 2**31], 0.5)[0] == (torch.Size([2, 16]), torch.int64), "int32 could not hold the count"


def test_one_tensor_equals_a_sort() -> None:
    values = awkward_values(300, 5)
    assert torch.equal(select_largest_of_one(magnitude_keys(values), 0.8), sorted_mask(values, 0.8))
