"""Bytes that collectives put on the wire, counted at the dispatcher: nothing that calls torch.distributed escapes it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SCALARS = 16
"""Entries up to which a collective carries a norm, a flag or a loss, not gradients or parameters."""


class Wire(TorchDispatchMode):
    """Counts what this rank sends while it is entered, by kind of collective, as ring algorithms over ``world_size`` ranks do.

    gloo's reduce-scatter counts as the all-reduce that it is inside.

    Attributes:
        sent_bytes: of collectives of more than ``SCALARS`` entries.
        scalar_bytes: of the others.
        payload_bytes: of all tensors that were handed over, however far they travelled.
        calls: how often each kind moved more than ``SCALARS`` entries.
    """

    def __init__(self) -> None:
        super().__init__()
        self.world_size = dist.get_world_size()
        self.sent_bytes = 0.0
        self.scalar_bytes = 0.0
        self.payload_bytes = 0
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("c10d::") and name != "c10d::barrier":
            kind = name.removeprefix("c10d::").strip("_")
            largest = max((t for t in tree_leaves(args) if isinstance(t, torch.Tensor)), key=lambda tensor: tensor.nbytes)
            sent = self._sent(kind, args, largest.nbytes)
            self.payload_bytes += largest.nbytes
            if largest.numel() > SCALARS:
                self.sent_bytes += sent
                self.calls[kind] = self.calls.get(kind, 0) + 1
            else:
                self.scalar_bytes += sent
        return func(*args, **(kwargs or {}))

    def _sent(self, kind: str, args: Any, num_bytes: int) -> float:
        """``num_bytes`` are those of the whole: what all ranks hold together after a gather, or bring to a reduction."""
        share = (self.world_size - 1) / self.world_size * num_bytes
        if kind in ("allreduce", "allreduce_coalesced", "reduce_scatter", "reduce_scatter_base"):
            return 2 * share
        if kind == "alltoall_base":
            packed, splits = args[1], args[4]
            return float(packed.nbytes - splits[dist.get_rank()] * packed.element_size())
        if kind in ("allgather_base", "allgather", "broadcast", "reduce"):
            return share
        raise AssertionError(f"no byte formula for {kind}")
