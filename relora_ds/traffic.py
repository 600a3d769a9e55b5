"""Bytes that collectives move. A :class:`CountedGroup` is a process group that counts what passes through it."""

from __future__ import annotations

import hashlib
from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


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

    def all_gather(self, out: Tensor, mine: Tensor, purpose: str) -> None:
        """Fills ``out``, (world_size · rows, columns), with ``mine``, (rows, columns), of every rank; contiguous, of any dtype."""
        if self.world_size == 1:
            out.copy_(mine)
            return
        target = out.to(self.device)
        _all_gather(target.view(torch.uint8), mine.to(self.device).view(torch.uint8), group=self.group)
        if target is not out:
            out.copy_(target)
        self.payload_bytes[purpose] += out.numel() * out.element_size()

    def broadcast(self, tensor: Tensor, owner: int, purpose: str) -> Tensor:
        """Sends ``tensor`` (on :attr:`device`) from the rank ``owner`` of this group to all others, in place."""
        if self.world_size > 1:
            source = owner if self.group is None else dist.get_global_rank(self.group, owner)
            dist.broadcast(tensor, src=source, group=self.group)
            self.payload_bytes[purpose] += tensor.numel() * tensor.element_size()
        return tensor

    def agree(self, text: str, purpose: str) -> bool:
        """Whether ``text`` is the same on all ranks, by a 64-bit hash: 16 bytes, however long it is."""
        digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()[:8]), dtype=torch.int64)
        lowest, inverted_highest = self.all_reduce(torch.cat([digest, ~digest]), purpose, dist.ReduceOp.MIN).tolist()
        return bool(lowest == ~inverted_highest)
