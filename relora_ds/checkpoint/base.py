"""The frozen base: the frozen weights of a run between two restarts, written once and shared by all checkpoints in between.

base/restart_K/ holds a safetensors file per rank and a manifest. With a sharded master a file holds this rank's fp32 rows of every
matrix, from which every replica is rounded; without one, this rank's share of the rows as they are stored. Rows can be read by any
number of ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from relora_ds.method import exact as exactly
from relora_ds.method.frozen_weights import FrozenWeight, ShardedMaster, own_rows, piece_on, pieces, spacing
from relora_ds.method.lora import relora_layers
from relora_ds.optimizer.wrapper import ReLoRAOptimizer
from relora_ds.run import manifest as manifests
from relora_ds.run.folder import RunFolder


def folder_of(run: RunFolder, restarts: int) -> Path:
    return run.base / f"restart_{restarts:04d}"


def file_of(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def frozen_weights(optimizer: Any) -> dict[str, FrozenWeight]:
    """The frozen weights by layer name; none for an engine of the full-rank phase, or for ``low_rank``."""
    if not isinstance(optimizer, ReLoRAOptimizer):
        return {}
    return {name: layer.weight for name, layer in relora_layers(optimizer.model) if layer.weight is not None}


def snapshot(optimizer: ReLoRAOptimizer) -> dict[str, Tensor]:
    """This rank's share of the base, copied to host memory."""
    rank, world_size, master = optimizer.comm.rank, optimizer.comm.world_size, optimizer.frozen_master
    copied: dict[str, Tensor] = {}
    for name, weight in frozen_weights(optimizer).items():
        if master is None:
            own = own_rows(weight.shape[0], rank, world_size)
            for part, buffer in weight.named_buffers():
                copied[f"{name}/{part}"] = buffer[own]
        else:
            copied[f"{name}/rows"] = master.rows[name]
            if name in master.held:
                copied[f"{name}/held_left"], copied[f"{name}/held_right"] = master.held[name]
    return {key: value.to("cpu", copy=True).contiguous() for key, value in copied.items()}


def describe(optimizer: ReLoRAOptimizer) -> dict[str, Any]:
    """The manifest of a base, without its files."""
    weights = frozen_weights(optimizer)
    return {
        "restarts": optimizer.restarts,
        "kind": "stored" if optimizer.frozen_master is None else "master",
        "world_size": optimizer.comm.world_size,
        "layers": {
            name: {"shape": list(weight.shape), "dtype": weight.dtype_name, "group_size": weight.group_size}
            for name, weight in weights.items()
        },
    }


class Base:
    """Reads a base.

    Args:
        folder: base/restart_K, complete.

    Raises:
        ManifestError: it has no readable manifest.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        content = manifests.read_json(folder)
        self.is_master = content["kind"] == "master"
        self.world_size: int = content["world_size"]
        self.layers: dict[str, dict[str, Any]] = content["layers"]
        self._open = [safe_open(folder / file_of(rank), framework="pt") for rank in range(self.world_size)]
        self._names = [set(file.keys()) for file in self._open]

    def _rows(self, name: str, part: str, rows: slice) -> Tensor:
        """Rows of one part of a layer, from whichever files hold them."""
        found = []
        for rank, file in enumerate(self._open):
            own = own_rows(self.layers[name]["shape"][0], rank, self.world_size)
            start, stop = max(rows.start, own.start), min(rows.stop, own.stop)
            if start < stop:
                found.append(file.get_slice(f"{name}/{part}")[start - own.start : stop - own.start])
        return torch.cat(found) if found else self._open[0].get_slice(f"{name}/{part}")[0:0]

    def _stored(self, name: str, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Rows as a replica stores them: values and scales."""
        layer = self.layers[name]
        if self.is_master:
            return FrozenWeight.rounded(self._rows(name, "rows", rows), layer["dtype"], layer["group_size"])
        return self._rows(name, "values", rows), self._rows(name, "scales", rows) if layer["dtype"] == "int8" else None

    def exact(self, name: str) -> tuple[Tensor, Tensor]:
        """A frozen weight, (out, in) fp32, the master where there is one; and the :func:`spacing` of what it is kept in."""
        layer = self.layers[name]
        rows = slice(0, layer["shape"][0])
        if self.is_master:
            master = self._rows(name, "rows", rows)
            return master, spacing(master, None)
        values, scales = self._stored(name, rows)
        return FrozenWeight.exact(values, scales, layer["group_size"]), spacing(values, scales)

    def held(self, name: str) -> Tensor | None:
        """What the master holds already of the factors' product, (out, in) fp32; None where that is nothing."""
        if f"{name}/held_left" not in self._names[0]:
            return None
        left = self._rows(name, "held_left", slice(0, self.layers[name]["shape"][0]))
        return exactly.product(left, exactly.columns(self._open[0].get_tensor(f"{name}/held_right"))).to(torch.float32)

    def state(self) -> dict[str, Tensor]:
        """The frozen weights as a replica stores them, by their names in the model's ``state_dict``."""
        state = {}
        for name, layer in self.layers.items():
            values, scales = self._stored(name, slice(0, layer["shape"][0]))
            state[f"{name}.weight.values"] = values
            if scales is not None:
                state[f"{name}.weight.scales"] = scales
        return state

    def load_into(self, optimizer: ReLoRAOptimizer) -> None:
        """Fills every replica, and the sharded master where there is one; every rank must call it."""
        master = optimizer.frozen_master
        for name, weight in frozen_weights(optimizer).items():
            if master is not None and self.is_master:
                self._load_master(master, name)
                continue
            same = self.layers[name]["dtype"] == weight.dtype_name and self.layers[name]["group_size"] == weight.group_size
            for rows in pieces(slice(0, weight.shape[0]), weight.shape[1], piece_on(weight.device)):
                stored = self._stored(name, rows)
                if not same:
                    stored = weight.round(FrozenWeight.exact(*stored, self.layers[name]["group_size"]))
                weight.store(*stored, rows)
            if master is not None:
                master.rows[name].copy_(weight.read(master.own(name)))
        if master is not None:
            master.publish_all()

    def _load_master(self, master: ShardedMaster, name: str) -> None:
        own = master.own(name)
        master.rows[name].copy_(self._rows(name, "rows", own))
        master.held.pop(name, None)
        if f"{name}/held_left" in self._names[0]:
            master.hold(name, self._rows(name, "held_left", own), self._open[0].get_tensor(f"{name}/held_right"))


def entries(run: RunFolder) -> list[Path]:
    """All base folders of a run, complete or not, by their restart."""
    return manifests.numbered(run.base, "restart")
