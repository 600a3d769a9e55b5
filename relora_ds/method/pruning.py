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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from relora_ds.method.frozen_weights import PIECE_ON_GPU

DIGIT_BITS = 4
NUM_BINS = 1 << DIGIT_BITS
SHIFTS = range(28, -1, -DIGIT_BITS)
LARGEST_KEY = 2**31 - 1
BATCH = 1 << 15
"""Keys of several tensors that are worked on together on a CPU: small tensors cost a call each, large ones gain nothing by it."""

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
    fragments: Iterable[KeyFragment],
    numels: Sequence[int],
    ratio: float,
    all_reduce_sum: AllReduceSum,
    *,
    pieces: Sequence[tuple[int, int]],
    across_tensors: bool = False,
    device: torch.device | str = "cpu",
) -> dict[int, Tensor]:
    """Masks of the entries to keep, by the number of their tensor.

    Args:
        fragments: this rank's slices in the order of their tensors, at most one of each; together, the ranks' slices cover every
            tensor once. May be empty. They are taken a few at a time, so that an iterator need not hold all of them.
        numels: number of entries of every tensor, the same list on all ranks.
        ratio: share to prune, in [0, 1].
        all_reduce_sum: sums an integer tensor over the ranks in place; every rank calls it equally often.
        pieces: (tensor, start) of all ranks' slices, in ascending order.
        across_tensors: one threshold for all tensors together (``scope: global``) instead of one for each.
        device: where the counts live (the device of the process group).

    Returns:
        Boolean masks, (n,) each, one per fragment.
    """
    if not numels:
        return {}
    segment_of = [0 if across_tensors else tensor for tensor in range(len(numels))]
    sizes = [sum(numels)] if across_tensors else list(numels)
    wanted = torch.tensor([num_kept(size, ratio) for size in sizes], dtype=torch.int64, device=device)
    integer = torch.int32 if max(sizes) < 2**31 else torch.int64  # what counts travel as: none exceeds the size of its segment
    batches = [_Batch(own, segment_of) for own in _side_by_side(fragments)]

    threshold, ties, ties_wanted = _radix_select(batches, wanted, all_reduce_sum, integer)
    contested = ties > ties_wanted
    is_contested = contested.tolist()
    disputed = [piece for piece in pieces if is_contested[segment_of[piece[0]]]]
    own = [fragment for batch in batches for fragment in batch.fragments]
    before = _ties_before(own, threshold, segment_of, disputed, all_reduce_sum, integer) if disputed else {}

    masks: dict[int, Tensor] = {}
    beyond = threshold - ((ties_wanted > 0) & ~contested).to(threshold.dtype)  # where all ties are wanted, they count as larger
    for batch in batches:
        masks.update(batch.larger_than(beyond))
    thresholds, wanted_of = threshold.tolist(), ties_wanted.tolist()
    for fragment in own:
        segment = segment_of[fragment.tensor]
        if is_contested[segment]:
            tied = fragment.keys == thresholds[segment]
            tied &= torch.cumsum(tied, 0) <= wanted_of[segment] - before[fragment.tensor, fragment.start]
            masks[fragment.tensor] |= tied
    return masks


def select_largest_of_one(keys: Tensor, ratio: float) -> Tensor:
    """:func:`select_largest` for one tensor that lies here whole: (n,) int32 sort keys -> (n,) bool."""
    return select_largest([KeyFragment(0, 0, keys)], [keys.numel()], ratio, lambda counts: None, pieces=[(0, 0)])[0]


def batch_on(device: torch.device) -> int:
    """How many keys of several tensors are worked on together where they lie on ``device``."""
    return BATCH if device.type == "cpu" else PIECE_ON_GPU


def _side_by_side(fragments: Iterable[KeyFragment]) -> Iterator[list[KeyFragment]]:
    """The same fragments, as many together as are worked on at a time."""
    batch: list[KeyFragment] = []
    size = 0
    for fragment in fragments:
        if batch and size + fragment.keys.numel() > batch_on(fragment.keys.device):
            yield batch
            batch, size = [], 0
        batch.append(fragment)
        size += fragment.keys.numel()
    if batch:
        yield batch


class _Batch:
    """Fragments whose keys lie one behind another, so that one operation serves them all.

    Args:
        fragments: in the order of their tensors.
        segment_of: the segment of each tensor, ascending.

    Attributes:
        fragments: the same, their keys views of one tensor.
        span: the segments that they belong to.
    """

    def __init__(self, fragments: Sequence[KeyFragment], segment_of: Sequence[int]) -> None:
        self._sizes = [fragment.keys.numel() for fragment in fragments]
        self._keys = fragments[0].keys if len(fragments) == 1 else torch.cat([fragment.keys for fragment in fragments])
        parts = self._keys.split(self._sizes)
        self.fragments = [KeyFragment(old.tensor, old.start, part) for old, part in zip(fragments, parts, strict=True)]
        self._segments = [segment_of[fragment.tensor] for fragment in fragments]
        self.span = slice(self._segments[0], self._segments[-1] + 1)
        self._candidates: tuple[Tensor, Tensor] | None = None

    def _rows(self) -> Tensor:
        """For each key its segment within :attr:`span`: (n,) int32; (1,) where that is one for all."""
        device, first = self._keys.device, self._segments[0]
        if first == self._segments[-1]:
            return torch.zeros(1, dtype=torch.int32, device=device)
        rows = torch.tensor([segment - first for segment in self._segments], dtype=torch.int32).to(device)
        return torch.repeat_interleave(rows, torch.tensor(self._sizes).to(device), output_size=self._keys.numel())

    def count(self, shift: int, prefix: Tensor) -> Tensor:
        """How many candidates of each segment have each digit at ``shift``: (segments of :attr:`span`, bins) int64.

        Candidates are the keys whose bits before that digit are their segment's in ``prefix``, (segments,) int64.
        """
        keys, rows = self._candidates or (self._keys, self._rows())
        if shift != SHIFTS[0]:
            own = prefix[self.span].to(keys.device, torch.int32)
            stays = (keys >> (shift + DIGIT_BITS)) == own.index_select(0, rows)
            keys, rows = keys.masked_select(stays), rows if len(rows) == 1 else rows.masked_select(stays)
            if len(keys) <= len(self._keys) // 4:  # else choosing anew costs no more than holding so many
                self._candidates = keys, rows
        num_rows = self.span.stop - self.span.start
        digits = ((keys >> shift) & (NUM_BINS - 1)).add_(rows << DIGIT_BITS)
        return torch.bincount(digits, minlength=num_rows * NUM_BINS).view(num_rows, NUM_BINS)

    def larger_than(self, limit: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Which keys are larger than their segment's in ``limit``, (segments,) int64: (tensor, mask) of each fragment."""
        self._candidates = None
        mask = self._keys > limit[self.span].to(self._keys.device, torch.int32).index_select(0, self._rows())
        yield from zip((fragment.tensor for fragment in self.fragments), mask.split(self._sizes), strict=True)


def _radix_select(
    batches: Sequence[_Batch], wanted: Tensor, all_reduce_sum: AllReduceSum, integer: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``wanted``-th largest key of each segment, how many keys equal it, and how many of those are wanted: (segments,) int64.

    A segment that wants nothing gets the largest key there is, and none of the keys equal to it.
    """
    prefix, left, ties = torch.zeros_like(wanted), wanted.clone(), torch.zeros_like(wanted)
    for shift in SHIFTS:
        counts = torch.zeros(wanted.numel(), NUM_BINS, dtype=integer, device=wanted.device)
        for batch in batches:
            counts[batch.span] += batch.count(shift, prefix).to(counts)
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
