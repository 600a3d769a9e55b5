"""Frozen weights: merging into them, and checksums that say whether all ranks hold the same bits.

The frozen weight of a layer is stored in the engine's dtype and replicated on every rank. Merging goes through fp32: the sum
``W + delta`` is formed in fp32 and rounded once. What that rounding loses is measured, not hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Elements hashed at a time: bounds the int64 copy that a checksum makes to 32 MiB."""


@dataclass
class MergeStats:
    """Squared Frobenius norms of one or more merges, as 0-d float32 tensors on the weights' device (no synchronisation).

    Attributes:
        change: of the exact change.
        lost: of the part of the change that rounding to the stored dtype lost.
        weight: of the weights before the merge.
    """

    change: Tensor
    lost: Tensor
    weight: Tensor

    def __add__(self, other: MergeStats) -> MergeStats:
        return MergeStats(self.change + other.change, self.lost + other.lost, self.weight + other.weight)

    @property
    def relative_change(self) -> float:
        """Norm of the change over norm of the weight."""
        return float((self.change / self.weight.clamp(min=1e-30)).sqrt())

    @property
    def merge_error(self) -> float:
        """Share of the change that rounding lost: norm of the loss over norm of the change; 0 when nothing changed."""
        return float((self.lost / self.change.clamp(min=1e-30)).sqrt())


@torch.no_grad()
def merge_into(weight: Tensor, delta: Tensor) -> MergeStats:
    """``weight += delta`` through fp32, rounded once to the stored dtype.

    Args:
        weight: stored weight of any shape and floating dtype, changed in place.
        delta: fp32, same shape.
    """
    before = weight.to(torch.float32)
    norm_before = before.square().sum()  # now: in fp32 ``before`` is the weight itself, which the copy changes
    exact = before + delta
    weight.copy_(exact)
    lost = exact - weight.to(torch.float32)
    return MergeStats(delta.square().sum(), lost.square().sum(), norm_before)


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """A 64-bit hash of the bits of ``tensor``: a 0-d int64 tensor on its device.

    The sum of the elements' bit patterns, each times an odd number made from its position, modulo 2**64: any single changed element
    changes it, as does a swap of two that differ (up to chance). Integer arithmetic, so the order of the sum does not matter.
    """
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(integer).flatten()
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), CHUNK):
        part = bits[start : start + CHUNK].to(torch.int64)
        position = torch.arange(start, start + part.numel(), device=tensor.device, dtype=torch.int64)
        total += (part * (position * 0x9E3779B1 * 2 + 1)).sum()
    return total
