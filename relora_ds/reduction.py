"""Means of gradients over the ranks, each piece on the rank that owns it and nowhere else.

Of every n bytes of gradients (N-1)/N·n leave each rank, where an all-reduce sends twice as many. Which piece belongs to whom is
ZeRO's business: see zero.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

EVEN = 1.005
"""Padding that a reduce-scatter may add. Beyond it, one reduce per owner sends less."""

_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def indices_by_owner(owners: Sequence[int], world_size: int) -> list[list[int]]:
    """The pieces of each rank, as indices into ``owners``, in the order in which they come."""
    indices: list[list[int]] = [[] for _ in range(world_size)]
    for index, owner in enumerate(owners):
        indices[owner].append(index)
    return indices


def is_even(sizes: Sequence[int]) -> bool:
    """Whether the ranks own so nearly alike that padding all of them to the largest adds next to nothing."""
    return len(sizes) * max(sizes) <= EVEN * sum(sizes)


def mean_of_own(
    pieces: Sequence[Tensor], owners: Sequence[int], wire: torch.dtype, group: dist.ProcessGroup | None, *, average: bool = True
) -> dict[int, Tensor]:
    """The pieces that this rank owns, averaged over the ranks; a collective.

    Args:
        pieces: (n_i,) each, of any floating dtype, the same lengths on all ranks; not written to.
        owners: the rank in ``group`` that each piece belongs to, the same on all ranks.
        wire: the dtype that is sent.
        group: None for the default one.
        average: False for the sum.

    Returns:
        By index into ``pieces``: (n_i,) float32, summed in it, on a CPU; ``wire`` elsewhere.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    indices = indices_by_owner(owners, world_size)
    sizes = [sum(pieces[index].numel() for index in own) for own in indices]
    packed = torch.cat([pieces[index].to(wire) for own in indices for index in own])
    divisor = world_size if average else 1
    if world_size == 1:
        total = packed
    elif packed.device.type == "cpu":
        total = sum_exchanged(packed, sizes, group).div_(divisor)
    else:
        # Divided first: a sum of fp16 may be too large where its mean is not.
        total = sum_scattered(packed.div_(divisor), sizes, group)
    return dict(zip(indices[rank], total.split([pieces[index].numel() for index in indices[rank]]), strict=True))


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


def sum_scattered(packed: Tensor, sizes: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """The same by the backend's own sums, for NCCL: (sizes[rank],) of ``packed``'s dtype; ``packed`` is lost."""
    rank = dist.get_rank(group)
    parts = packed.split(list(sizes))
    if not is_even(sizes):
        for owner, part in enumerate(parts):
            if part.numel():
                dist.reduce(part, dst=owner if group is None else dist.get_global_rank(group, owner), group=group)
        return parts[rank]
    rows = packed.new_zeros(len(sizes), max(sizes))
    for row, part in zip(rows, parts, strict=True):
        row[: part.numel()] = part
    own = packed.new_empty(max(sizes))
    _reduce_scatter(own, rows.view(-1), group=group)
    return own[: sizes[rank]]
