"""The copies of W, A and B that every rank holds: compared bit by bit, and set right from a master or a majority if asked."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from relora_ds.errors import RestartError
from relora_ds.method.frozen_weights import ShardedMaster, checksum, stored_tensors
from relora_ds.method.lora import relora_layers
from relora_ds.zero.state import ZeroState

WEIGHTS = (".weight", ".weight.scales")
"""How W's names of :func:`~relora_ds.method.frozen_weights.stored_tensors` end; a layer may be called ``weights_proj``."""


@dataclass(frozen=True)
class Mismatch:
    """A tensor that is not the same on all ranks.

    Attributes:
        name: layer and part.
        ranks: those that differ from ``reference``.
        reference: a rank of the majority; rank 0 where there is none.
        is_majority: whether more than half of the ranks agree with ``reference``.
    """

    name: str
    ranks: tuple[int, ...]
    reference: int
    is_majority: bool

    @classmethod
    def of(cls, name: str, sums: list[int]) -> Mismatch:
        """From the checksums of all ranks."""
        commonest, count = Counter(sums).most_common(1)[0]
        is_majority = 2 * count > len(sums)
        reference = sums.index(commonest) if is_majority else 0
        return cls(name, tuple(r for r, value in enumerate(sums) if value != sums[reference]), reference, is_majority)

    def __str__(self) -> str:
        return f"{self.name} differs on rank(s) {', '.join(map(str, self.ranks))} from rank {self.reference}"


class Replicas:
    """What :func:`verify` compares.

    Args:
        model: holds the :class:`~relora_ds.method.lora.ReLoRALayer` layers.
        masters: of A and B.
        frozen_master: of W, where there is one.
        comm: the ranks that hold copies.
        on_mismatch: ``stop`` or ``repair``.

    Attributes:
        repairs: what was found wrong and set right, in words, since the owner last emptied the list.
    """

    def __init__(
        self, model: nn.Module, masters: ZeroState, frozen_master: ShardedMaster | None, comm: Any, on_mismatch: str
    ) -> None:
        self.model, self.masters, self.frozen_master, self.comm = model, masters, frozen_master, comm
        self.on_mismatch = on_mismatch
        self.repairs: list[str] = []

    def verify(self, update: int) -> str:
        """Compares the bits of every wrapped layer's W, A and B over the ranks; returns a checksum of all W.

        With ``on_mismatch: repair`` what differs is set right and noted in :attr:`repairs`.

        Raises:
            RestartError: names the first tensor that differs and the ranks that disagree with the majority.
        """
        tensors: dict[str, Tensor] = {}
        for name, layer in relora_layers(self.model):
            tensors.update(stored_tensors(name, layer.weight))
            tensors.update({f"{name}.{key}": factor for key, factor in layer.factors().items()})
        sums = torch.stack([checksum(tensor.data) for tensor in tensors.values()])
        if not self.comm.agree(repr(sums.tolist()), "verify"):
            lowest = self.comm.all_reduce(sums.clone(), "verify", dist.ReduceOp.MIN)
            highest = self.comm.all_reduce(sums.clone(), "verify", dist.ReduceOp.MAX)
            differing = (lowest != highest).nonzero().flatten().tolist()
            names = list(tensors)
            for mismatch in self._mismatches([names[index] for index in differing], sums[differing]):
                self._repair(mismatch, tensors[mismatch.name], len(differing), update)
            return self.verify(update)
        weights = [value for name, value in zip(tensors, sums.tolist(), strict=True) if name.endswith(WEIGHTS)]
        return hashlib.sha256(repr(weights).encode()).hexdigest()[:16]

    def _mismatches(self, names: list[str], sums: Tensor) -> list[Mismatch]:
        """Who differs from whom: every rank's checksums of the tensors that are not alike."""
        table = torch.zeros(self.comm.world_size, len(names), dtype=torch.int64, device=sums.device)
        table[self.comm.rank] = sums
        by_rank = self.comm.all_reduce(table, "verify").tolist()
        return [Mismatch.of(name, [row[column] for row in by_rank]) for column, name in enumerate(names)]

    def _repair(self, mismatch: Mismatch, tensor: Tensor, num_differing: int, update: int) -> None:
        """Sets one tensor right on the ranks where it is wrong, or raises RestartError."""
        layer = mismatch.name.removesuffix(".scales").removesuffix(".weight")
        is_factor = mismatch.name in self.masters.params
        if self.on_mismatch == "repair":
            if is_factor:
                tensor.data.copy_(self.masters.gather(mismatch.name))
            elif self.frozen_master is not None:
                self.frozen_master.publish(layer)
            elif mismatch.is_majority:
                self.comm.broadcast(tensor.data, mismatch.reference, "verify")
        if self.on_mismatch == "stop" or not (is_factor or self.frozen_master is not None or mismatch.is_majority):
            raise RestartError(
                f"after update {update} the ranks hold different weights: {mismatch} ({num_differing} tensor(s) differ in all)"
            )
        self.repairs.append(f"after update {update}: {mismatch}; repaired")
