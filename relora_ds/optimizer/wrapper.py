"""ReLoRAOptimizer: a ZeRO optimizer that restarts its LoRA factors.

A restart, after every ``restart_every``-th update and on all ranks at once, is merge -> reinitialise -> reset -> verify:

1. W <- W + s·B·A through fp32, from the fp32 masters of A and B;
2. A <- Kaiming from (seed, restart, layer name), B <- 0, in the masters and in the module's copies: the function does not change;
3. the moments of A and B are pruned, exactly, wherever their shards lie (or at other updates, with ``reset.every``);
4. checksums of W, A and B agree over all ranks, or the run stops with the name of the layer.

The re-warmup after a reset multiplies whatever learning rates the optimizer has, so it works under any scheduler.
"""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from relora_ds.comm.counter import COUNTER, RESTART, VERIFY
from relora_ds.config import ReLoRA
from relora_ds.method import exact
from relora_ds.method.frozen_weights import MergeStats, ShardedMaster, stored_tensors
from relora_ds.method.linear import Kept
from relora_ds.method.lora import LORA_GROUP, ReLoRALayer, ReLoRALinear, relora_layers
from relora_ds.method.reinit import initial_As, principal_inputs
from relora_ds.optimizer import moments
from relora_ds.optimizer.replicas import Replicas
from relora_ds.schedule import rewarmup_factor
from relora_ds.supervision import parts
from relora_ds.zero.state import ZeroProxy, ZeroState, data_parallel_group

STATE_KEY = "relora_ds"
PARTS = ("merge", "reset", "verify")
Layers: TypeAlias = Sequence[tuple[str, ReLoRALayer]]


@dataclass(frozen=True)
class RestartRecord:
    """What one restart did: a line of restarts.jsonl.

    Attributes:
        restart: 1-based.
        pruned_fraction: share of the entries of A's and B's moments that were set to zero.
        merged_change: norm of all merged changes over the norm of the weights they went into.
        merge_error: share of the merged change that rounding to the stored dtype lost (norms).
        by_layer_type: the same two figures for each kind of layer (q_proj, up_proj, …).
        seconds: wall time on this rank. parts: of these, into merging with fresh factors, the reset, and comparing.
        bytes: payload of this restart's collectives on this rank.
        weights_checksum: of all wrapped layers' weights, the same on all ranks.
    """

    restart: int
    pruned_fraction: float
    merged_change: float
    merge_error: float
    seconds: float
    parts: dict[str, float]
    bytes: int
    weights_checksum: str
    by_layer_type: dict[str, dict[str, float]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"restart {self.restart}, merged change {self.merged_change:.2%} of W, "
            f"{self.pruned_fraction:.1%} of the moments pruned, {self.seconds:.2f} s"
        )


class ReLoRAOptimizer(ZeroProxy):
    """Wraps DeepSpeed's ZeRO optimizer; put in ``engine.optimizer`` by :func:`relora_ds.initialize`.

    Args:
        zero: DeepSpeedZeroOptimizer of stage 1 or 2.
        model: holds the :class:`~relora_ds.method.lora.ReLoRALayer` layers.
        settings: the recipe's ``relora`` section.
        seed: of the reinitialisations and of random pruning.
        rewarm: whether the learning rate re-warms after a restart (the jagged schedule).

    Attributes:
        updates: calls of :meth:`step` so far, those whose update was skipped for a non-finite gradient included.
        restarts: restarts so far.
        last_restart: the record of the newest one in this process, or None.
        last_reset: what a reset that came without a restart pruned (a share), since the owner last set it to None.
        replicas: what all ranks hold a copy of, and what of it was found wrong and set right.
        tell: is told of each restart, in words; None where the owner looks at :attr:`last_restart`.
        saves_frozen: whether :meth:`state_dict` holds the sharded master; not while a checkpoint is saved whose base holds it.
    """

    OWN = ZeroProxy.OWN | {
        "model", "settings", "seed", "rewarm", "comm", "masters", "frozen_master",
        "updates", "restarts", "last_restart", "last_reset", "replicas", "saves_frozen", "tell", "_used_lrs", "_linears",
    }  # fmt: skip

    def __init__(self, zero: Any, model: nn.Module, settings: ReLoRA, *, seed: int = 0, rewarm: bool = True) -> None:
        super().__init__(zero)
        self.model = model
        self.settings = settings
        self.seed = seed
        self.rewarm = rewarm
        self.comm = data_parallel_group(zero, next(model.parameters()).device)
        factors = {f"{name}.{key}": p for name, layer in relora_layers(model) for key, p in layer.factors().items()}
        self.masters = ZeroState(zero, factors, self.comm)
        self._linears = [layer for _, layer in relora_layers(model) if isinstance(layer, ReLoRALinear)]
        if settings.reset.restart_bias_correction:
            self.masters.own_groups()  # raises now what the first reset would
        self.frozen_master = self._shard_master() if settings.frozen.master == "sharded" else None
        if self.frozen_master is None:
            self._replicate_frozen()
        self.updates = 0
        self.restarts = 0
        self.last_restart: RestartRecord | None = None
        self.last_reset: float | None = None
        self._used_lrs: list[float] = []
        self.replicas = Replicas(model, self.masters, self.frozen_master, self.comm, settings.frozen.on_mismatch)
        self.saves_frozen = True
        self.tell: Callable[[str], None] | None = None
        if settings.init == "residual":
            first_values = self._first_values()
            for layers in self._batches():
                self._reinitialise(layers, first_values)

    def _replicate_frozen(self) -> None:
        """Rank 0's frozen weights for all, as DeepSpeed does with parameters: these are buffers, which it leaves alone."""
        for name, layer in relora_layers(self.model):
            for _, tensor in stored_tensors(name, layer.weight):
                self.comm.broadcast(tensor, 0, "start-up")

    def _shard_master(self) -> ShardedMaster:
        """The fp32 master of the frozen weights; every replica is rounded from it at once, so that all hold the same bits."""
        master = ShardedMaster(
            {name: layer.weight for name, layer in relora_layers(self.model) if layer.weight is not None},
            self.comm.rank,
            self.comm.world_size,
            lambda out, mine: self.comm.all_gather(out, mine, "restart"),
            "cpu" if self.settings.frozen.master_device == "host" else self.comm.device,
        )
        master.publish_all()
        return master

    def step(self, closure: None = None) -> None:
        """One update, at the learning rates of the groups times the re-warmup, and the restart that is due after it."""
        if closure is not None:
            raise ValueError("ZeRO optimizers take no closure")
        with self._rewarmed_lrs():
            self.zero.step()
        self.updates += 1
        self._forget_merged()
        with parts.part(parts.RESTART):
            self._after_update()

    def keep_merged(self, accumulation: int) -> None:
        """Lets linear layers keep W + s·B·A from one update to the next, as the settings say, at so many micro batches an update."""
        for layer in self._linears:
            layer.kept = Kept(self.settings.kept_passes(accumulation))

    def _forget_merged(self) -> None:
        """ZeRO writes the factors through its flat copy of them, which they do not notice."""
        for layer in self._linears:
            layer.kept.forget()

    def _after_update(self) -> None:
        """The restart, the reset or the comparison that is due."""
        reset, verify_every = self.settings.resets.follows(self.updates), self.settings.frozen.verify_every
        if self.settings.restarts.follows(self.updates):
            restarted = self.restart(reset=reset)
            if self.tell is not None:
                self.tell(f"update {self.updates}: {restarted}")
            return
        if reset:
            self.last_reset = self.reset()
        if verify_every and self.updates % verify_every == 0:
            self.replicas.verify(self.updates)

    @contextmanager
    def _rewarmed_lrs(self) -> Iterator[None]:
        """Scales the groups' learning rates for one update and puts them back, so that chained schedulers see their own values."""
        factor = rewarmup_factor(self.updates + 1, self.settings.resets, self.settings.rewarmup) if self.rewarm else 1.0
        groups = self.zero.param_groups
        lrs = [group["lr"] for group in groups]
        for group, lr in zip(groups, lrs, strict=True):
            if self.settings.rewarm == "all" or group.get("name") == LORA_GROUP:
                group["lr"] = lr * factor
        self._used_lrs = [float(group["lr"]) for group in groups]
        try:
            yield
        finally:
            for group, lr in zip(groups, lrs, strict=True):
                group["lr"] = lr

    def get_last_lr(self) -> list[float]:
        """The learning rates that the newest update really used, one a group; the groups' own ``lr`` is without the re-warmup."""
        return self._used_lrs or [float(group["lr"]) for group in self.zero.param_groups]

    @property
    def last_lrs(self) -> dict[str, float]:
        """:meth:`get_last_lr` by the groups' names."""
        names = [str(group.get("name", number)) for number, group in enumerate(self.zero.param_groups)]
        return dict(zip(names, self.get_last_lr(), strict=True))

    @torch.no_grad()
    def restart(self, reset: bool = True) -> RestartRecord:
        """Merge, reinitialise, reset, verify; called by :meth:`step` when the schedule says so, on all ranks alike.

        Args:
            reset: whether the optimizer is reset, too.

        Raises:
            RestartError: the ranks disagree afterwards; names the first layer and the ranks that differ.
        """
        times, bytes_before = [self._now()], COUNTER.payload_bytes((RESTART, VERIFY))
        self.restarts += 1
        stats = self._merge_and_reinitialise()
        times.append(self._now())
        pruned = self.reset() if reset else 0.0
        times.append(self._now())
        digest = self.replicas.verify(self.updates)
        times.append(self._now())
        self._forget_merged()
        total = functools.reduce(operator.add, stats.values())
        self.last_restart = RestartRecord(
            restart=self.restarts,
            pruned_fraction=pruned,
            merged_change=total.relative_change,
            merge_error=total.merge_error,
            seconds=times[-1] - times[0],
            parts={name: after - before for name, before, after in zip(PARTS, times, times[1:], strict=False)},
            bytes=COUNTER.payload_bytes((RESTART, VERIFY)) - bytes_before,
            weights_checksum=digest,
            by_layer_type={
                kind: {"merged_change": figures.relative_change, "merge_error": figures.merge_error}
                for kind, figures in stats.items()
            },
        )
        return self.last_restart

    def _now(self) -> float:
        """When all that was asked of the device is done."""
        if self.comm.device.type == "cuda":
            torch.cuda.synchronize(self.comm.device)
        return time.perf_counter()

    def _merge_and_reinitialise(self) -> dict[str, MergeStats]:
        """Layer by layer, so that no more than one layer's change exists in fp32 at a time. Returns the figures by layer type."""
        stats: dict[str, MergeStats] = {}
        first_values = self._first_values()
        for layers in self._batches():
            for name, layer in layers:
                figures = self._merge(name, layer, {key: self.masters.gather(f"{name}.{key}") for key in layer.factors()})
                kind = name.rpartition(".")[2]
                stats[kind] = stats[kind] + figures if kind in stats else figures
            self._reinitialise(layers, first_values)
        return stats if self.frozen_master is None else self._sum_over_ranks(stats)

    def _batches(self) -> Iterator[Layers]:
        """The layers that begin anew together: one a rank where that takes a decomposition, which one rank does; else one."""
        layers, num = list(relora_layers(self.model)), self.comm.world_size if self.settings.init == "residual" else 1
        yield from (layers[at : at + num] for at in range(0, len(layers), num))

    def _merge(self, name: str, layer: ReLoRALayer, factors: dict[str, Tensor]) -> MergeStats:
        """Merges one layer, from its factors' masters: all of it here, or this rank's rows into the master of W, whose rounding
        all ranks then hold."""
        assert layer.weight is not None, "refused with the settings"
        change = layer.change(**factors)
        return layer.weight.merge(change) if self.frozen_master is None else self.frozen_master.merge(name, change)

    def _first_values(self) -> Iterator[Tensor]:
        """Of each layer's A, in the order of :meth:`_batches`."""
        layers = ((name, layer.rank, layer.in_features) for name, layer in relora_layers(self.model))
        threads = 0 if self.comm.device.type == "cpu" else torch.get_num_threads()
        return initial_As(layers, seed=self.seed, restart=self.restarts, kind=self.settings.init, threads=threads)

    def _reinitialise(self, layers: Layers, first_values: Iterator[Tensor]) -> None:
        """Fresh factors for some layers, whose first values come next, in the masters and in the module's copies."""
        kind = self.settings.init
        fresh = [first.to(layer.lora_A.device) for (_, layer), first in zip(layers, first_values, strict=False)]
        if kind == "residual":
            self._find_principal_rows(layers, fresh)
        for (name, layer), lora_A in zip(layers, fresh, strict=True):
            lora_B = torch.zeros(layer.out_features, layer.rank, device=lora_A.device)
            if kind == "residual":
                self._fit_to_residual(name, layer, lora_A, lora_B)
            self.masters.write(f"{name}.lora_A", lora_A)
            self.masters.write(f"{name}.lora_B", lora_B)
            if layer.lora_scaling is not None:
                # The reference sets it to 0 at a merge; with B = 0 neither of the two would have a gradient from then on.
                self.masters.write(f"{name}.lora_scaling", torch.ones_like(layer.lora_scaling, dtype=torch.float32))

    def _find_principal_rows(self, layers: Layers, fresh: Sequence[Tensor]) -> None:
        """Each A becomes the rows that hold most of what rounding lost of its layer. The k-th is found by rank k, at the same time as
        the others by other ranks, and reaches all from there: the same bits, also where the ranks' machines differ."""
        assert self.frozen_master is not None, "refused with the settings"
        residual = None
        for owner, (name, _) in enumerate(layers):
            gathered = self.comm.gather(self.frozen_master.residual_share(name), owner, RESTART)
            residual = gathered if gathered is not None else residual
        if residual is not None:
            own = fresh[self.comm.rank]
            own.copy_(principal_inputs(residual[: layers[self.comm.rank][1].out_features], own))
        for owner, lora_A in enumerate(fresh):
            self.comm.broadcast(lora_A, owner, RESTART)

    def _fit_to_residual(self, name: str, layer: ReLoRALayer, lora_A: Tensor, lora_B: Tensor) -> None:
        """Fills B, zeros so far, so that s·B·A is the part of what rounding lost that A's rows hold; the master notes it."""
        master = self.frozen_master
        assert master is not None, "refused with the settings"
        scale = float(layer.scale(None if layer.lora_scaling is None else torch.ones(1)))
        right = exact.columns(lora_A.t())
        for rows, piece in master.residual(name):
            lora_B[rows] += exact.product(piece, right).div_(scale).to(torch.float32)
        self.comm.all_reduce(lora_B, RESTART)  # every row has one owner: the sum is exact
        if bool(lora_B.any()):
            master.hold(name, scale * lora_B[master.own(name)], lora_A)

    def reset(self) -> float:
        """Prunes the factors' moments and, if asked, restarts their bias correction; returns the share that was zeroed."""
        reset, draw = self.settings.reset, f"{self.seed}/{self.restarts}"
        if reset.every is not None:  # several may come between two restarts, each of which draws anew
            draw += f"/{self.updates}"
        pruned = moments.prune(self.masters, reset, self.comm, draw=draw)
        if reset.restart_bias_correction:
            self.masters.restart_bias_correction()
        return pruned

    def _sum_over_ranks(self, stats: dict[str, MergeStats]) -> dict[str, MergeStats]:
        """Each rank measured its own rows of the master."""
        table = torch.stack([torch.stack([s.change, s.lost, s.weight]) for s in stats.values()])
        self.comm.all_reduce(table, "restart")
        return {kind: MergeStats(*row) for kind, row in zip(stats, table, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """ZeRO's state of this rank, plus how far the restarts have come; saved by ``engine.save_checkpoint``."""
        own: dict[str, Any] = {"updates": self.updates, "restarts": self.restarts}
        if self.frozen_master is not None and self.saves_frozen:
            own["frozen_master"] = self.frozen_master.state()
        return {**self.zero.state_dict(), STATE_KEY: own}

    @staticmethod
    def own_state(state: dict[str, Any]) -> dict[str, Any]:
        """What :meth:`state_dict` added to ZeRO's state; empty for another optimizer's."""
        return state.get(STATE_KEY) or {}

    def load_state_dict(self, state_dict_list: list[dict[str, Any]], *args: Any, **kwargs: Any) -> None:
        """The counterpart of :meth:`state_dict`; called by ``engine.load_checkpoint`` with the list of all ranks' states."""
        self.zero.load_state_dict(state_dict_list, *args, **kwargs)
        own = self.own_state(state_dict_list[self.comm.rank]) if state_dict_list else None
        if own:
            self.updates, self.restarts = own["updates"], own["restarts"]
            if self.frozen_master is not None:
                self.frozen_master.load(own.get("frozen_master"))
        self._forget_merged()

    def refresh_fp32_params(self) -> None:
        """All masters anew from what the module holds; called by ``engine.load_checkpoint`` where it loads no optimizer states."""
        self.zero.refresh_fp32_params()
        if self.frozen_master is not None:
            self.frozen_master.load(None)
        self._forget_merged()

    _restore_from_bit16_weights = refresh_fp32_params
