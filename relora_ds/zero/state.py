"""The inside of DeepSpeed's ZeRO optimizer (stages 1 and 2), which only this room touches.

ZeRO keeps, for every parameter group, one flat fp32 master of all its parameters, cut into equal partitions: each rank owns one, with
Adam's moments beside it. A parameter is therefore a *fragment* on the ranks that own a piece of it, and absent on the others. After
each step the masters are copied over the module's parameters, so whoever changes a parameter must write the master as well as the
module's copy, or the change is undone at the next step.

What is relied on, and checked at start-up by :func:`check_internals`: ``single_partition_of_fp32_groups``, ``bit16_groups``,
``optimizer``, ``dp_process_group`` and, on each parameter, ``_hp_mapping`` with its two fragment addresses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from relora_ds.comm.counter import CountedGroup
from relora_ds.errors import ConfigError
from relora_ds.run import unpickle
from relora_ds.zero import versions as zero_versions

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
INTERNALS = ("single_partition_of_fp32_groups", "bit16_groups", "optimizer", "dp_process_group", "overflow", "step")


class ZeroProxy:
    """Stands in for a ZeRO optimizer: what is not overridden here or in a subclass reads from, and writes to, the wrapped one.

    ``isinstance`` answers as the wrapped optimizer does, because DeepSpeed's engine asks whether its optimizer is a ZeRO one before
    it scales a loss. Subclasses list their own attributes in ``OWN``.
    """

    OWN: frozenset[str] = frozenset({"zero"})

    def __init__(self, zero: DeepSpeedZeroOptimizer) -> None:
        self.zero = zero

    def __getattr__(self, name: str) -> Any:
        if name in type(self).OWN:  # not set yet: asking the wrapped optimizer would recurse
            raise AttributeError(name)
        return getattr(self.zero, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.zero, name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.zero)


def check_internals(zero: Any) -> None:
    """Refuses an optimizer whose inside is not the one that this file was written against.

    Raises:
        ConfigError: in one line, with the DeepSpeed version that is installed and the one that is known to work.
    """

    def refuse(problem: str) -> None:
        raise ConfigError("deepspeed", deepspeed.__version__, problem, zero_versions.install())

    if type(zero) is not DeepSpeedZeroOptimizer:
        refuse(f"the engine's optimizer is {type(zero).__name__}, ReLoRA needs DeepSpeedZeroOptimizer (ZeRO stage 1 or 2)")
    missing = [name for name in INTERNALS if not hasattr(zero, name)]
    if missing:
        refuse(f"DeepSpeedZeroOptimizer has no {', '.join(missing)}")
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        for param in group:
            if not hasattr(param, "_hp_mapping"):
                refuse("parameters have no _hp_mapping")
            mapping = param._hp_mapping
            if mapping is None:
                continue
            if not all(hasattr(mapping, name) for name in ("lp_fragment_address", "hp_fragment_address", "hp_fragment")):
                refuse("_hp_mapping has no fragment addresses")
            address = mapping.hp_fragment_address
            if flat[address.start : address.start + address.numel].data_ptr() != mapping.hp_fragment.data_ptr():
                refuse("a parameter's fragment is not where its address says in the flat fp32 partition")
            piece = mapping.lp_fragment_address
            copy = param.data.reshape(-1)[piece.start : piece.start + piece.numel]
            if not bool(torch.stack(torch.aminmax(copy)).isfinite().all()):  # NaN passes on; no copy is made
                name = zero.param_names.get(param, "a parameter") if hasattr(zero, "param_names") else "a parameter"
                raise ConfigError("model", name, "its weights are not finite", "begin with others")
            if not torch.equal(mapping.hp_fragment.to(copy.device, copy.dtype), copy):
                refuse("a parameter's master is not where its address says: the module's copy holds other values")
    if zero.single_partition_of_fp32_groups[0].dtype != torch.float32:
        refuse("the master weights are not fp32")


def data_parallel_group(zero: Any, device: torch.device) -> CountedGroup:
    """The ranks over which ZeRO shards, with its traffic counted; ``device`` is the model's."""
    return CountedGroup(zero.dp_process_group, device)


def load_universal(zero: DeepSpeedZeroOptimizer, folder: Path, device: torch.device, *, trust: bool = False) -> None:
    """Fills masters, module, moments and step counts of all parameters from DeepSpeed's universal checkpoint, on any number of ranks.

    Args:
        zero: DeepSpeed's optimizer.
        folder: what ``ds_to_universal`` wrote: zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt.
        device: the model's.
        trust: whether the user trusts whoever wrote it.

    Raises:
        ConfigError: a file could run something.
    """
    params = {zero.param_names[param]: param for group in zero.bit16_groups for param in group}
    state = ZeroState(zero, params, data_parallel_group(zero, device))
    for name in params:
        place = folder / "zero" / name
        state.write(name, _universal(place / "fp32.pt", trust).view(params[name].shape))
        if (place / "step.pt").is_file():
            state.start_adam_state(name, int(_universal(place / "step.pt", trust)))
        for key in state.moment_keys_of(name):
            state.write_fragment(name, key, _universal(place / f"{key}.pt", trust))
    zero._load_global_state(unpickle.read(folder / "zero" / "optimizer_state.pt", trust=trust))


def _universal(path: Path, trust: bool) -> Any:
    content = unpickle.read(path, trust=trust)
    return content["param"] if isinstance(content, dict) else content


@dataclass(frozen=True)
class Slice:
    """A contiguous piece of a parameter: flat indices ``start`` to ``start + numel``."""

    start: int
    numel: int


class ZeroState:
    """Masters and moments of chosen parameters, wherever their shards lie.

    Args:
        zero: DeepSpeed's optimizer of stage 1 or 2.
        params: the parameters to serve, by name, in the same order on all ranks.
        comm: the data-parallel group.
    """

    def __init__(self, zero: DeepSpeedZeroOptimizer, params: Mapping[str, nn.Parameter], comm: CountedGroup) -> None:
        check_internals(zero)
        self.zero = zero
        self.comm = comm
        self.params = dict(params)
        self._group_of = {id(p): index for index, group in enumerate(zero.bit16_groups) for p in group}
        outside = [name for name, p in self.params.items() if id(p) not in self._group_of]
        if outside:
            raise ConfigError("optimizer", outside[0], "this trainable parameter is in no group of the optimizer")
        self._slices = self._exchange_slices()

    def _exchange_slices(self) -> dict[str, list[Slice]]:
        """Which piece of each parameter each rank owns: one small all-reduce, so no layout has to be derived from ZeRO's code."""
        table = torch.zeros(self.comm.world_size, len(self.params), 2, dtype=torch.int64, device=self.comm.device)
        for row, param in enumerate(self.params.values()):
            if param._hp_mapping is not None:
                address = param._hp_mapping.lp_fragment_address
                table[self.comm.rank, row] = torch.tensor([address.start, address.numel])
        rows = self.comm.all_reduce(table, "restart").tolist()
        return {name: [Slice(*rank_rows[row]) for rank_rows in rows] for row, name in enumerate(self.params)}

    def pieces(self) -> list[tuple[int, int]]:
        """All ranks' pieces in order, as (index of the parameter, start)."""
        return [
            (index, start)
            for index, slices in enumerate(self._slices.values())
            for start in sorted(piece.start for piece in slices if piece.numel)
        ]

    def own_slice(self, name: str) -> Slice:
        """This rank's piece of a parameter; of length 0 where it owns none."""
        return self._slices[name][self.comm.rank]

    def fragment(self, name: str, key: str | None = None) -> Tensor | None:
        """This rank's piece of the fp32 master (``key`` None) or of a moment: (n,) float32, a view that may be written to.

        None where this rank owns nothing of the parameter, or the optimizer has not made that moment yet.
        """
        param = self.params[name]
        if param._hp_mapping is None:
            return None
        flat = self._flat(name)
        # Read from the optimizer's own state: DeepSpeed's links to it go stale when a checkpoint is loaded.
        source = flat.data if key is None else self.zero.optimizer.state[flat].get(key)
        address = param._hp_mapping.hp_fragment_address
        return None if source is None else source.narrow(0, address.start, address.numel)

    def moment_keys(self) -> list[str]:
        """Names of the optimizer's per-entry state, the first moment first (Adam: exp_avg, exp_avg_sq); [] before the first step."""
        return self.moment_keys_of(next(iter(self.params))) if self.params else []

    def moment_keys_of(self, name: str) -> list[str]:
        """The same for the group of one parameter: groups begin to have state at different times."""
        flat = self._flat(name)
        state = self.zero.optimizer.state.get(flat, {})
        keys = [key for key, value in state.items() if torch.is_tensor(value) and value.shape == flat.shape]
        return sorted(keys, key=lambda key: (key not in FIRST_MOMENTS, key))

    def gather(self, name: str, key: str | None = None) -> Tensor:
        """The whole fp32 master, or moment, of a parameter on every rank: its shape, on the group's device.

        Each owner broadcasts its piece: 4 bytes an entry reach each rank, and all ranks get the same bits.
        """
        full = torch.empty(self.params[name].numel(), dtype=torch.float32, device=self.comm.device)
        for owner, piece in enumerate(self._slices[name]):
            if piece.numel:
                part = full.narrow(0, piece.start, piece.numel)
                if owner == self.comm.rank:
                    part.copy_(self.fragment(name, key))
                self.comm.broadcast(part, owner, "restart")
        return full.view(self.params[name].shape)

    @torch.no_grad()
    def write(self, name: str, value: Tensor) -> None:
        """Sets a parameter everywhere it lives: the module's copy on this rank, and this rank's piece of the fp32 master.

        Args:
            name: of the parameter.
            value: fp32, the parameter's shape, the same bits on all ranks.
        """
        self.params[name].data.copy_(value)
        self.write_fragment(name, None, value)

    @torch.no_grad()
    def write_fragment(self, name: str, key: str | None, value: Tensor) -> None:
        """Writes this rank's piece of ``value`` (the parameter's shape) into the master (``key`` None) or a moment."""
        own, fragment = self.own_slice(name), self.fragment(name, key)
        if fragment is not None:
            fragment.copy_(value.reshape(-1)[own.start : own.start + own.numel])

    def restart_bias_correction(self) -> None:
        """Sets Adam's step count to 0 for the groups of these parameters, which must hold nothing else."""
        for flat, group in self.own_groups():
            self._set_step(flat, group, 0)

    def step_count(self, name: str) -> int:
        """Adam's step count for the group of a parameter; 0 before the first step."""
        flat, group = self._flat(name), self._group(name)
        return int(self.zero.optimizer.state.get(flat, {}).get("step", group.get("step", 0)))

    def start_adam_state(self, name: str, steps: int) -> None:
        """Makes Adam's state for the group of a parameter before its first step: zero moments and ``steps`` as its step count."""
        flat, group = self._flat(name), self._group(name)
        state = self.zero.optimizer.state[flat]
        if not state:
            on_device = group.get("fused") or group.get("capturable")
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if on_device else "cpu")
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat.data), torch.zeros_like(flat.data)
        self._set_step(flat, group, steps)

    def _flat(self, name: str) -> Tensor:
        return self.zero.single_partition_of_fp32_groups[self._group_of[id(self.params[name])]]

    def _group(self, name: str) -> dict[str, Any]:
        return self.zero.optimizer.param_groups[self._group_of[id(self.params[name])]]

    def own_groups(self) -> Sequence[tuple[Tensor, dict[str, Any]]]:
        """The groups of these parameters: this rank's flat master, and the optimizer's settings.

        Raises:
            ConfigError: one holds other parameters, too.
        """
        served = {id(p) for p in self.params.values()}
        indices = sorted({self._group_of[key] for key in served})
        for index in indices:
            if any(id(p) not in served for p in self.zero.bit16_groups[index]):
                raise ConfigError(
                    "relora.reset.restart_bias_correction",
                    True,
                    "the LoRA factors share an optimizer group with other parameters",
                    "let relora_ds.initialize make the groups",
                )
        return [(self.zero.single_partition_of_fp32_groups[i], self.zero.optimizer.param_groups[i]) for i in indices]

    def _set_step(self, flat: Tensor, group: dict[str, Any], steps: int) -> None:
        """torch keeps the count in the state, as a tensor or a number; fused implementations keep it in the group."""
        state = self.zero.optimizer.state.get(flat, {})
        if torch.is_tensor(state.get("step")):
            state["step"].fill_(steps)
        elif "step" in state:
            state["step"] = steps
        if "step" in group:
            group["step"] = steps
