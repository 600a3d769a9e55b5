"""Means of gradients over the ranks, each piece on the rank that owns it and nowhere else, for gloo.

Of every n bytes of gradients (N-1)/N·n leave each rank, where an all-reduce sends twice as many. Which piece belongs to whom is
ZeRO's business: see state.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from relora_ds.comm.counter import LEDGER

ROUND = 2**24
"""Entries that all ranks together exchange at a time: what is packed and what is received take no more than this each."""


@dataclass(frozen=True)
class Cut:
    """``numel`` entries from ``start`` of the piece number ``index``."""

    index: int
    start: int
    numel: int


def rounds(owners: Sequence[int], numels: Sequence[int], world_size: int, limit: int) -> list[list[list[Cut]]]:
    """Cuts pieces so that no rank gets more than ``limit`` entries at a time.

    Args:
        owners: the rank that each piece belongs to.
        numels: the length of each piece.
        world_size: number of ranks.
        limit: at least 1.

    Returns:
        By round and rank: what belongs to that rank, in the order in which the pieces come. Every entry is there once.
    """
    turns: list[list[list[Cut]]] = []
    taken = [0] * world_size
    for index, (owner, numel) in enumerate(zip(owners, numels, strict=True)):
        start = 0
        while start < numel:
            turn, used = divmod(taken[owner], limit)
            cut = Cut(index, start, min(numel - start, limit - used))
            if turn == len(turns):
                turns.append([[] for _ in range(world_size)])
            turns[turn][owner].append(cut)
            taken[owner] += cut.numel
            start += cut.numel
    return turns


def means_of_own(
    pieces: Sequence[Tensor],
    owners: Sequence[int],
    wire: torch.dtype,
    group: dist.ProcessGroup | None,
    *,
    average: bool = True,
    numel_per_round: int = ROUND,
) -> Iterator[tuple[Cut, Tensor]]:
    """The pieces that this rank owns, averaged over the ranks; a collective, to be gone through to its end.

    Args:
        pieces: (n_i,) each, on a CPU, of any floating dtype, the same lengths on all ranks. A yielded one may be written to.
        owners: the rank in ``group`` that each piece belongs to, the same on all ranks.
        wire: the dtype that is sent.
        group: None for the default one.
        average: False for the sum.
        numel_per_round: entries to exchange at a time.

    Yields:
        A cut of an own piece and its mean: (numel,) float32, summed in it.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    limit = max(1, numel_per_round // world_size)
    divisor = world_size if average else 1
    for turn in rounds(owners, [piece.numel() for piece in pieces], world_size, limit):
        sizes = [sum(cut.numel for cut in cuts) for cuts in turn]
        packed = torch.cat([pieces[cut.index].narrow(0, cut.start, cut.numel).to(wire) for cuts in turn for cut in cuts])
        if world_size == 1:
            total = packed.float()
        else:
            total = sum_exchanged(packed, sizes, group).div_(divisor)
        yield from zip(turn[rank], total.split([cut.numel for cut in turn[rank]]), strict=True)


def sum_exchanged(packed: Tensor, sizes: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """Sums by an all-to-all and an addition in fp32: gloo's own reduce and reduce-scatter send up to twice the bytes.

    Args:
        packed: (sum(sizes),) what belongs to rank 0, to rank 1, …
        sizes: entries of each rank.
        group: a process group.

    Returns:
        (sizes[rank],) float32, added in the order of the ranks: the same bits every time.
    """
    rank, width = dist.get_rank(group), packed.element_size()
    received = packed.new_empty(len(sizes) * sizes[rank])
    with LEDGER.standing_for(packed.dtype):
        dist.all_to_all_single(
            received.view(torch.uint8),  # gloo does not know every dtype
            packed.view(torch.uint8),
            [sizes[rank] * width] * len(sizes),
            [size * width for size in sizes],
            group=group,
        )
    total = torch.zeros(sizes[rank], dtype=torch.float32, device=packed.device)
    for part in received.split(sizes[rank]) if sizes[rank] else ():
        total += part
    return total
