"""What a run sent: traffic.json, counted bytes beside those that the nodes' interfaces saw."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from relora_ds.callbacks.callback import Callback, RunState
from relora_ds.comm import nic
from relora_ds.comm.counter import CHECKPOINT, COUNTER, UPDATE, Kind, Tally, by_purpose, rows
from relora_ds.launch.places import Place
from relora_ds.method.lora import count_parameters
from relora_ds.run.folder import read_traffic, write_atomically


class TrafficLog(Callback):
    """Writes traffic.json: one entry for every start of the run, brought up to date at each checkpoint; on every rank.

    An entry holds what rank 0 counted by operation, dtype and group, what came before the first update included; and from that update
    on what rank 0 counted by purpose, the bytes per update, on the mean over the ranks, and for every node the bytes that its ranks
    counted beside those that its interfaces sent and received.

    Args:
        path: of traffic.json.
        place: of this process.
        hosts: of all ranks.
        device: of the collectives.
        attempt: which start of a job this is; empty outside of one.
    """

    def __init__(self, path: Path, place: Place, hosts: Sequence[str], device: torch.device, attempt: str) -> None:
        self.path, self.place, self.hosts, self.device, self.attempt = path, place, hosts, device, attempt
        self.is_counting_node = place.local_rank == 0
        self.first_update = 0
        self.trainable_parameters: int | None = None
        self._counted: dict[Kind, Tally] = {}
        self._seen: nic.Counters = {}
        self._lap = 0.0

    def begin(self, run: RunState) -> None:
        self.count_from(run.done.update + 1)

    def update(self, run: RunState, record: dict[str, Any]) -> None:
        record["sent_bytes"] = self.lap()

    def checkpoint(self, run: RunState) -> None:
        self.trainable_parameters, _ = count_parameters(run.engine.module)
        self.write(run.done.update)

    def count_from(self, first_update: int) -> None:
        """The start-up is over: ``first_update`` comes next."""
        self.first_update = first_update
        self._counted, self._seen = COUNTER.snapshot(), nic.read()
        self._lap = COUNTER.wire_bytes(UPDATE)

    def lap(self) -> int:
        """Bytes that this rank sent for updates since the last call, or since :meth:`count_from`."""
        before, self._lap = self._lap, COUNTER.wire_bytes(UPDATE)
        return round(self._lap - before)

    def write(self, update: int) -> None:
        """After ``update``; a collective of 32 bytes a rank. What cannot be written is left for the next time."""
        counted = COUNTER.since(self._counted)
        seen = nic.total(nic.since(self._seen), is_one_node=self.place.is_one_node) if self.is_counting_node else nic.Bytes(0, 0)
        sent = by_purpose(counted)
        mine = [sum(sent.values()), sum(sent.get(purpose, 0.0) for purpose in UPDATE), seen.sent, seen.received]
        table = torch.zeros(self.place.world_size, len(mine), dtype=torch.float64)
        table[self.place.rank] = torch.tensor(mine, dtype=torch.float64)
        shared = table.to(self.device)
        with COUNTER.purpose(CHECKPOINT):
            dist.all_reduce(shared)
        if self.place.is_main:
            with suppress(OSError):  # the next one will hold it
                self._replace_entry(update, counted, shared.cpu())

    def _replace_entry(self, update: int, counted: dict[Kind, Tally], by_rank: Tensor) -> None:
        updates = update - self.first_update + 1
        entry = {
            "attempt": self.attempt,
            "first_update": self.first_update,
            "last_update": update,
            "world_size": self.place.world_size,
            "backend": dist.get_backend(),
            "trainable_parameters": self.trainable_parameters,
            "wire_bytes_per_update": float(by_rank[:, 1].mean()) / updates,
            "wire_bytes": {purpose: round(value) for purpose, value in by_purpose(counted).items()},
            "nodes": self._nodes(by_rank),
            "unseen": self._unseen(),
            "interfaces": {name: vars(count) for name, count in nic.since(self._seen).items()},
            "collectives": rows(COUNTER.tallies),
        }
        key = (self.attempt, self.first_update)
        starts = [start for start in read_traffic(self.path) if (start.get("attempt"), start.get("first_update")) != key]
        write_atomically(self.path, json.dumps({"starts": [*starts, entry]}, indent=1))

    def _unseen(self) -> list[str]:
        """What of rank 0's node went past its interfaces."""
        return nic.unseen(shares_memory=dist.get_backend() == "nccl" and len(set(self.hosts)) < len(self.hosts))

    def _nodes(self, by_rank: Tensor) -> list[dict[str, Any]]:
        """By host: its ranks, what they counted, what its interfaces saw."""
        nodes = []
        for host in dict.fromkeys(self.hosts):
            ranks = [rank for rank, name in enumerate(self.hosts) if name == host]
            counted, _, sent, received = by_rank[ranks].sum(0).tolist()
            nodes.append({"host": host, "ranks": ranks, "counted_bytes": counted, "sent_bytes": sent, "received_bytes": received})
        return nodes
