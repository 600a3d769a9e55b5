"""Which entries of the optimizer state survive a restart: exact selection over tensors that are sharded in any way.

Pruning a tensor of ``n`` entries with ratio ``p`` keeps its ``n - floor(p n)`` largest magnitudes; of equal ones those with the lower
flat index. The choice is a function of the values alone, never of where they lie: the same bits for any number of ranks.

How: the bits of ``|x|``, read as an integer, sort like ``|x|`` (IEEE 754). A radix select over eight digits of 4 bits finds the exact
threshold: for each digit, every rank counts its candidates into 16 bins, one all-reduce adds the counts up for all tensors at once,
and all ranks take the same digit. Where some but not all keys equal to a threshold are wanted, one all-reduce of tie counts says how
many lie before each fragment. No entry of the state ever leaves its rank. This module is pure but for that all-reduce, which the
caller passes in.

Digits of 8 bits need half the passes and eight times the bytes, digits of 2 bits half the bytes and twice the passes over the keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DIGIT_BITS = 4
NUM_BINS = 1 << DIGIT_BITS
SHIFTS = range(28, -1, -DIGIT_BITS)
LARGEST_KEY = 2**31 - 1

AllReduceSum = Callable[[Tensor], None]
"""Adds an int32 or int64 tensor up over all ranks, in place."""


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
    return torch.randint(0, LARGEST_KEY, (numel,), generator=generator, dtype=torch.int64, device="cpu").to(torch.int32)


def select_largest(
    fragments: Sequence[KeyFragment],
    numels: Sequence[int],
    ratio: float,
    all_reduce_sum: AllReduceSum,
    *,
    pieces: Sequence[tuple[int, int]],
    across_tensors: bool = False,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Masks of the entries to keep, one per fragment.

    Args:
        fragments: this rank's slices, at most one per tensor; together, the ranks' slices cover every tensor once. May be empty.
        numels: number of entries of every tensor, the same list on all ranks.
        ratio: share to prune, in [0, 1].
        all_reduce_sum: sums an integer tensor over the ranks in place; every rank calls it equally often.
        pieces: (tensor, start) of all ranks' slices, in ascending order.
        across_tensors: one threshold for all tensors together (``scope: global``) instead of one for each.
        device: where the counts live (the device of the process group).

    Returns:
        Boolean masks, (n,) each, in the order of ``fragments``.
    """
    if not numels:
        return []
    segment_of = [0 if across_tensors else tensor for tensor in range(len(numels))]
    sizes = [sum(numels)] if across_tensors else list(numels)
    wanted = torch.tensor([num_kept(size, ratio) for size in sizes], dtype=torch.int64, device=device)
    integer = torch.int32 if max(sizes) < 2**31 else torch.int64  # what counts travel as: none exceeds the size of its segment

    threshold, ties, ties_wanted = _radix_select(fragments, segment_of, wanted, all_reduce_sum, integer)
    contested = (ties > ties_wanted).tolist()
    disputed = [piece for piece in pieces if contested[segment_of[piece[0]]]]
    before = _ties_before(fragments, threshold, segment_of, disputed, all_reduce_sum, integer) if any(contested) else {}

    masks = []
    thresholds, wanted_of = threshold.tolist(), ties_wanted.tolist()
    for fragment in fragments:
        segment = segment_of[fragment.tensor]
        mask = fragment.keys > thresholds[segment]
        tied = fragment.keys == thresholds[segment]
        if contested[segment]:
            tied &= torch.cumsum(tied, 0) <= wanted_of[segment] - before[fragment.tensor, fragment.start]
        masks.append(mask | tied if wanted_of[segment] else mask)
    return masks


def select_largest_of_one(keys: Tensor, ratio: float) -> Tensor:
    """:func:`select_largest` for one tensor that lies here whole: (n,) int32 sort keys -> (n,) bool."""
    (mask,) = select_largest([KeyFragment(0, 0, keys)], [keys.numel()], ratio, lambda counts: None, pieces=[(0, 0)])
    return mask


def _radix_select(
    fragments: Sequence[KeyFragment],
    segment_of: Sequence[int],
    wanted: Tensor,
    all_reduce_sum: AllReduceSum,
    integer: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``wanted``-th largest key of each segment, how many keys equal it, and how many of those are wanted: (segments,) int64.

    A segment that wants nothing gets the largest key there is, and none of the keys equal to it.
    """
    prefix, left, ties = torch.zeros_like(wanted), wanted.clone(), torch.zeros_like(wanted)
    candidates = [fragment.keys for fragment in fragments]
    for shift in SHIFTS:
        counts = torch.zeros(wanted.numel(), NUM_BINS, dtype=integer, device=wanted.device)
        prefixes = prefix.tolist()
        for index, fragment in enumerate(fragments):
            segment = segment_of[fragment.tensor]
            if shift != SHIFTS[0]:
                high_digits = candidates[index] >> (shift + DIGIT_BITS)
                candidates[index] = candidates[index].masked_select(high_digits == prefixes[segment])
            digits = (candidates[index] >> shift) & (NUM_BINS - 1)
            counts[segment] += torch.bincount(digits, minlength=NUM_BINS).to(counts)
        all_reduce_sum(counts)
        counts = counts.to(torch.int64)
        at_least = counts.flip(1).cumsum(1).flip(1)  # keys whose digit is this one or a higher one
        digit = (at_least >= left.clamp(min=1).unsqueeze(1)).sum(1).clamp(min=1) - 1
        ties = counts.gather(1, digit.unsqueeze(1)).squeeze(1)
        left = left - (at_least.gather(1, digit.unsqueeze(1)).squeeze(1) - ties)
        prefix = (prefix << DIGIT_BITS) | digit
    nothing = wanted == 0
    return prefix.masked_fill(nothing, LARGEST_KEY), ties.masked_fill(nothing, 0), left.masked_fill(nothing, 0)


def _ties_before(
    fragments: Sequence[KeyFragment],
    threshold: Tensor,
    segment_of: Sequence[int],
    pieces: Sequence[tuple[int, int]],
    all_reduce_sum: AllReduceSum,
    integer: torch.dtype,
) -> dict[tuple[int, int], int]:
    """Keys equal to their segment's threshold that precede each of these pieces in its segment, by (tensor, start)."""
    row_of = {piece: row for row, piece in enumerate(pieces)}
    ties = torch.zeros(len(pieces), dtype=integer, device=threshold.device)
    limits = threshold.tolist()
    for fragment in fragments:
        row = row_of.get((fragment.tensor, fragment.start))
        if row is not None:
            ties[row] = (fragment.keys == limits[segment_of[fragment.tensor]]).sum()
    all_reduce_sum(ties)
    before: dict[tuple[int, int], int] = {}
    segment, total = -1, 0
    for piece, count in zip(pieces, ties.tolist(), strict=True):
        if segment_of[piece[0]] != segment:
            segment, total = segment_of[piece[0]], 0
        before[piece] = total
        total += count
    return before
