"""Which entries of the optimizer state survive a restart: exact selection over tensors that are sharded in any way.

Pruning a tensor of ``n`` entries with ratio ``p`` keeps its ``n - floor(p n)`` largest magnitudes; of equal ones those with the lower
flat index. The choice is a function of the values alone, never of where they lie: the same bits for any number of ranks.

How: the bits of ``|x|``, read as an integer, sort like ``|x|`` (IEEE 754). A radix select over four digits of 8 bits finds the exact
threshold: for each digit, every rank counts its candidates into 256 bins, one all-reduce adds the counts up for all tensors at once,
and all ranks take the same digit. Then one all-reduce of tie counts says how many ties lie before each fragment. No entry of the
state ever leaves its rank. This module is pure but for that all-reduce, which the caller passes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DIGIT_BITS = 8
NUM_BINS = 1 << DIGIT_BITS
SHIFTS = (24, 16, 8, 0)
LARGEST_KEY = 2**31 - 1

AllReduceSum = Callable[[Tensor], None]
"""Adds an int64 tensor up over all ranks, in place."""


@dataclass(frozen=True)
class KeyFragment:
    """This rank's contiguous slice of the sort keys of one tensor.

    Attributes:
        tensor: index of the tensor, the same on all ranks.
        start: flat index in that tensor of the first key.
        keys: (n,) int32, non-negative; larger is kept first.
    """

    tensor: int
    start: int
    keys: Tensor


def num_kept(numel: int, ratio: float) -> int:
    """Entries that survive: ``n - floor(ratio n)``."""
    return numel - math.floor(ratio * numel)


def magnitude_keys(values: Tensor) -> Tensor:
    """Sort keys of ``values`` by magnitude.

    Args:
        values: (n,) float32, of any sign; denormals and infinities sort where they belong, NaN above all.

    Returns:
        (n,) int32, the bit pattern of ``|values|``.
    """
    return values.to(torch.float32).view(torch.int32) & 0x7FFFFFFF


def random_keys(numel: int, seed: int) -> Tensor:
    """Sort keys that select a uniformly random subset: (numel,) int32, a function of ``seed`` alone (drawn on the CPU)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, LARGEST_KEY, (numel,), generator=generator, dtype=torch.int64).to(torch.int32)


def select_largest(
    fragments: Sequence[KeyFragment],
    numels: Sequence[int],
    ratio: float,
    all_reduce_sum: AllReduceSum,
    *,
    rank: int,
    world_size: int,
    across_tensors: bool = False,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Masks of the entries to keep, one per fragment.

    Args:
        fragments: this rank's slices, at most one per tensor; together, the ranks' slices cover every tensor once. May be empty.
        numels: number of entries of every tensor, the same list on all ranks.
        ratio: share to prune, in [0, 1].
        all_reduce_sum: sums an int64 tensor over the ranks in place; every rank calls it equally often.
        rank, world_size: who is calling; only used to order ties.
        across_tensors: one threshold for all tensors together (``scope: global``) instead of one for each.
        device: where the counts live (the device of the process group).

    Returns:
        Boolean masks, (n,) each, in the order of ``fragments``.
    """
    num_tensors = len(numels)
    if num_tensors == 0:
        return []
    segment_of = [0 if across_tensors else tensor for tensor in range(num_tensors)]
    sizes = [sum(numels)] if across_tensors else list(numels)
    wanted = torch.tensor([num_kept(size, ratio) for size in sizes], dtype=torch.int64, device=device)

    threshold, ties_wanted = _radix_select(fragments, segment_of, wanted, all_reduce_sum, device)
    ties_before = _ties_before(
        fragments, threshold, segment_of, all_reduce_sum, rank, world_size, across_tensors, num_tensors, device
    )

    masks = []
    thresholds, ties_left = threshold.tolist(), (ties_wanted[segment_of] - ties_before).tolist()
    for fragment in fragments:
        limit = thresholds[segment_of[fragment.tensor]]
        mask = fragment.keys > limit
        tied = fragment.keys == limit
        mask |= tied & (torch.cumsum(tied, 0) <= ties_left[fragment.tensor])
        masks.append(mask)
    return masks


def _radix_select(
    fragments: Sequence[KeyFragment],
    segment_of: Sequence[int],
    wanted: Tensor,
    all_reduce_sum: AllReduceSum,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """The ``wanted``-th largest key of each segment, and how many keys equal to it are wanted: both (segments,) int64.

    A segment that wants nothing gets the largest key there is, and none of the keys equal to it.
    """
    prefix = torch.zeros_like(wanted)
    left = wanted.clone()
    for shift in SHIFTS:
        counts = torch.zeros(wanted.numel(), NUM_BINS, dtype=torch.int64, device=device)
        prefixes = prefix.tolist()
        for fragment in fragments:
            segment = segment_of[fragment.tensor]
            high_digits = fragment.keys >> (shift + DIGIT_BITS) if shift + DIGIT_BITS < 32 else torch.zeros_like(fragment.keys)
            candidates = fragment.keys[high_digits == prefixes[segment]]
            digits = (candidates >> shift) & (NUM_BINS - 1)
            counts[segment] += torch.bincount(digits, minlength=NUM_BINS).to(device)
        all_reduce_sum(counts)
        at_least = counts.flip(1).cumsum(1).flip(1)  # keys whose digit is this one or a higher one
        digit = (at_least >= left.clamp(min=1).unsqueeze(1)).sum(1).clamp(min=1) - 1
        above = at_least.gather(1, digit.unsqueeze(1)).squeeze(1) - counts.gather(1, digit.unsqueeze(1)).squeeze(1)
        left = left - above
        prefix = (prefix << DIGIT_BITS) | digit
    nothing = wanted == 0
    return torch.where(nothing, torch.full_like(prefix, LARGEST_KEY), prefix), torch.where(nothing, 0, left)


def _ties_before(
    fragments: Sequence[KeyFragment],
    threshold: Tensor,
    segment_of: Sequence[int],
    all_reduce_sum: AllReduceSum,
    rank: int,
    world_size: int,
    across_tensors: bool,
    num_tensors: int,
    device: torch.device | str,
) -> Tensor:
    """Keys equal to the threshold that precede this rank's fragment of each tensor, in the order (tensor, flat index).

    Returns:
        (tensors,) int64; for ``scope: tensor`` only ties within the same tensor count.
    """
    table = torch.zeros(2, world_size, num_tensors, dtype=torch.int64, device=device)
    limits = threshold.tolist()
    for fragment in fragments:
        table[0, rank, fragment.tensor] = fragment.start
        table[1, rank, fragment.tensor] = (fragment.keys == limits[segment_of[fragment.tensor]]).sum().to(device)
    all_reduce_sum(table)
    starts, ties = table[0], table[1]
    in_same_tensor = torch.where(starts < starts[rank], ties, 0).sum(0)
    totals = ties.sum(0)
    in_earlier_tensors = totals.cumsum(0) - totals
    return in_same_tensor + in_earlier_tensors if across_tensors else in_same_tensor
