"""Sums of matrices over the ranks, row by row: each rank gets the rows that it owns, from each other one only those that this has.

What travels is bytes: a row in a floating dtype, or in 8 bits with a scale for each block. Which rows belong to whom is ZeRO's
business: see vocabulary_route.py. Collectives run on the device of the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from relora_ds.comm.counter import LEDGER
from relora_ds.zero.gradient_reduction import ROUND

BLOCK = 256
"""Entries of a row that share a scale in 8 bits."""
SCALE = torch.bfloat16
INDEX = torch.int32
LEVELS = 127


def row_bytes(width: int, wire: torch.dtype) -> int:
    """Bytes of one row of ``width`` entries: ``torch.int8`` has 2 bytes of scale for every block."""
    scales = -(-width // BLOCK) * SCALE.itemsize if wire == torch.int8 else 0
    return width * wire.itemsize + scales


def encode(values: Tensor, wire: torch.dtype) -> Tensor:
    """Rows in a floating dtype: (rows, width) -> (rows, row_bytes) uint8; a view where the dtype is the same."""
    return values.to(wire).contiguous().view(torch.uint8)


def quantise_(values: Tensor) -> Tensor:
    """Rows in 8 bits, symmetric, each block with its own scale; ``values`` keeps what rounding lost.

    Adding that to what is sent next makes the sum of all that was sent differ from the true sum by one rounding, however many there
    were (Seide et al. 2014; Karimireddy et al., arXiv 1901.09847).

    Args:
        values: (rows, width) float32, finite; overwritten.

    Returns:
        (rows, row_bytes) uint8: numbers, then scales.
    """
    rows, width = values.shape
    coded = torch.empty(rows, row_bytes(width, torch.int8), dtype=torch.uint8, device=values.device)
    numbers, scales = coded[:, :width].view(torch.int8), []
    for block, out in zip(values.split(BLOCK, dim=1), numbers.split(BLOCK, dim=1), strict=True):
        scale = block.abs().amax(dim=1, keepdim=True).div_(LEVELS).to(SCALE)
        step = scale.float()
        # Below the smallest normal number the inverse would be infinite: such a block is sent as zeros, and kept.
        inverse = torch.where(step >= torch.finfo(torch.float32).tiny, 1 / step, 0.0)
        levels = (block * inverse).round_().clamp_(-LEVELS, LEVELS)
        out.copy_(levels)
        block.sub_(levels.mul_(step))
        scales.append(scale)
    coded[:, width:] = torch.cat(scales, dim=1).view(torch.uint8)
    return coded


def decode(coded: Tensor, width: int, wire: torch.dtype) -> Tensor:
    """(rows, row_bytes) uint8 -> (rows, width) float32."""
    if wire != torch.int8:
        return coded.clone().view(wire).float()  # a copy, because received bytes do not begin at a multiple of the dtype
    scales = coded[:, width:].clone(memory_format=torch.contiguous_format).view(SCALE).float()
    values = coded[:, :width].view(torch.int8).float()
    for index, block in enumerate(values.split(BLOCK, dim=1)):
        block.mul_(scales[:, index : index + 1])
    return values


def sum_of_own(
    coded: Tensor,
    width: int,
    wire: torch.dtype,
    owned: Sequence[range],
    group: dist.ProcessGroup | None,
    *,
    seen: Tensor | None = None,
    entries_per_round: int = ROUND,
) -> Tensor:
    """The rows that this rank owns, summed over the ranks; a collective.

    Args:
        coded: (rows, row_bytes) uint8, this rank's own values of all rows.
        width: entries of a row.
        wire: what ``coded`` is coded in.
        owned: the rows of each rank in ``group``, the same on all ranks; two may have a row in common.
        group: None for the default one.
        seen: (rows,) bool: rows that are not all zeros, when the others need not be sent. Their number is told first; for each pair
            of ranks such rows go with an index, 4 bytes each, where this is less than sending all. All ranks must give it, or none.
        entries_per_round: entries to exchange at a time, so that packing and receiving take bounded memory.

    Returns:
        (own rows, width) float32, added in the order of the ranks onto +0. The same bits with ``seen`` as without: adding a zero of
        either sign changes nothing in a sum that begins with +0.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    step = max(1, entries_per_round // (world_size * width))
    starts = range(0, max(len(rows) for rows in owned), step)
    spans = [[rows[start : start + step] for rows in owned] for start in starts]
    counts = _counts(coded.shape[1], spans, seen)
    theirs = counts if seen is None else _exchange_counts(counts, coded.device, group)
    total = torch.zeros(len(owned[rank]), width, dtype=torch.float32, device=coded.device)
    for turn, rows in enumerate(spans):
        parts = [_pack(coded, span, seen if counts[to][turn] >= 0 else None) for to, span in enumerate(rows)]
        own, row = rows[rank], coded.shape[1]
        sizes = [len(own) * row if count < 0 else count * (INDEX.itemsize + row) for count in (t[turn] for t in theirs)]
        received = torch.cat(parts)
        if world_size > 1:
            packed, received = received, coded.new_empty(sum(sizes))
            with LEDGER.standing_for(wire):
                dist.all_to_all_single(received, packed, sizes, [part.numel() for part in parts], group=group)
        target = total.narrow(0, own.start - owned[rank].start, len(own))
        for sender, part in enumerate(received.split(sizes)):
            count = theirs[sender][turn]
            if count < 0:
                target += decode(part.view(-1, row), width, wire)
            else:
                index = part[: count * INDEX.itemsize].clone().view(INDEX)
                target.index_add_(0, index, decode(part[count * INDEX.itemsize :].view(-1, row), width, wire))
    return total


def _counts(row: int, spans: Sequence[Sequence[range]], seen: Tensor | None) -> list[list[int]]:
    """By receiver and round: how many rows of a span are sent with an index; -1 where all of them go without."""
    if seen is None:
        return [[-1] * len(spans) for _ in spans[0]] if spans else []
    before = [0, *seen.cumsum(0).tolist()]
    table = []
    for to in range(len(spans[0])):
        numbers = [before[turn[to].stop] - before[turn[to].start] for turn in spans]
        sparser = [n * (INDEX.itemsize + row) < len(turn[to]) * row for n, turn in zip(numbers, spans, strict=True)]
        table.append([n if is_less else -1 for n, is_less in zip(numbers, sparser, strict=True)])
    return table


def _exchange_counts(counts: list[list[int]], device: torch.device, group: dist.ProcessGroup | None) -> list[list[int]]:
    """By sender and round: the counts that the others have for this rank."""
    if len(counts) == 1:
        return counts
    mine = torch.tensor(counts, dtype=torch.int64, device=device)
    theirs, share = torch.empty_like(mine), [mine.shape[1]] * len(counts)
    dist.all_to_all_single(theirs.view(-1), mine.view(-1), share, share, group=group)
    return theirs.tolist()


def _pack(coded: Tensor, span: range, seen: Tensor | None) -> Tensor:
    """The rows of ``span``, all or those that were seen with their indices in it, as one string of bytes."""
    rows = coded[span.start : span.stop]
    if seen is None:
        return rows.reshape(-1)
    index = seen[span.start : span.stop].nonzero().flatten()
    return torch.cat([index.to(INDEX).view(torch.uint8), rows[index].reshape(-1)])
