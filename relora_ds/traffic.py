"""Bytes that collectives move. A :class:`CountedGroup` is a process group that counts what passes through it."""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor


class CountedGroup:
    """The collectives that restarts and the training loop use, each counted by purpose in payload bytes per rank.

    Args:
        group: a torch process group; None for the default one.
        device: where tensors must lie for this group's backend; others are moved there and back.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device | str) -> None:
        self.group = group
        self.device = torch.device(device)
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.payload_bytes: Counter[str] = Counter()

    def all_reduce(self, tensor: Tensor, purpose: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduces ``tensor`` over the ranks in place and returns it."""
        if self.world_size > 1:
            moved = tensor.to(self.device)
            dist.all_reduce(moved, op=op, group=self.group)
            if moved is not tensor:
                tensor.copy_(moved)
            self.payload_bytes[purpose] += tensor.numel() * tensor.element_size()
        return tensor

    def all_gather(self, tensor: Tensor, purpose: str) -> Tensor:
        """(rows, columns) of every rank, one below the other: (world_size · rows, columns), on the tensor's device."""
        if self.world_size == 1:
            return tensor
        mine = tensor.to(self.device).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather([part.view(torch.uint8) for part in parts], mine.view(torch.uint8), group=self.group)
        self.payload_bytes[purpose] += mine.numel() * mine.element_size() * self.world_size
        return torch.cat(parts).to(tensor.device)

    def broadcast(self, tensor: Tensor, owner: int, purpose: str) -> Tensor:
        """Sends ``tensor`` (on :attr:`device`) from the rank ``owner`` of this group to all others, in place."""
        if self.world_size > 1:
            source = owner if self.group is None else dist.get_global_rank(self.group, owner)
            dist.broadcast(tensor, src=source, group=self.group)
            self.payload_bytes[purpose] += tensor.numel() * tensor.element_size()
        return tensor
