"""A recipe's traffic beside that of full-rank training: the same model, data and batch, a few updates each way, in one job."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from relora_ds.bandwidth import estimates, formulas
from relora_ds.bandwidth.formulas import Way
from relora_ds.comm import nic
from relora_ds.comm.counter import COUNTER, GRADIENT, LOSS, START_UP, by_purpose, count_everything, label
from relora_ds.config import Config
from relora_ds.data.token_dataset import TokenDataset, rank_micro_batches
from relora_ds.ds_config import fit as ds_config
from relora_ds.engine.initialize import adamw
from relora_ds.engine.release import collect, release
from relora_ds.launch import libraries
from relora_ds.launch.places import Place
from relora_ds.method.lora import param_groups
from relora_ds.models import build as models
from relora_ds.optimizer.wrapper import ReLoRAOptimizer
from relora_ds.training import phases
from relora_ds.training.preflight import Checked

ARMS = {
    "recipe": "the recipe",
    "full": "full-rank, ZeRO-2",
    "zero2": "full-rank, ZeRO-2, DeepSpeed's defaults",
    "zero1": "full-rank, ZeRO-1, DeepSpeed's defaults",
    "ddp": "full-rank, DistributedDataParallel",
}
"""What can be compared. ``full`` goes the recipe's way with all parameters: the same collectives."""
BASELINE = "zero2"


@dataclass(frozen=True)
class Measurement:
    """One arm, in bytes per update on the mean over the ranks.

    Attributes:
        arm: a key of :data:`ARMS`.
        trainable: parameters.
        counted: sent as rings send, by purpose; ``restart`` is one restart over the updates between two.
        formula: what :mod:`relora_ds.bandwidth.formulas` estimates.
        wire: what the interfaces sent (over all nodes, divided by the ranks).
        tokens: of one update.
        seconds: of one update, as measured here.
    """

    arm: str
    trainable: int
    counted: dict[str, float]
    formula: float
    wire: float
    tokens: int
    seconds: float

    @property
    def total_bytes(self) -> float:
        return sum(self.counted.values())

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total_bytes": self.total_bytes}


@dataclass(frozen=True)
class Steps:
    """How an arm trains.

    Attributes:
        micro_batch: one forward and backward pass on (B, T) ids, and the step after the last one of an update; returns the loss.
        model: whose parameters are trained.
        restart: one restart, where the arm has them.
        updates_between_restarts: how many.
        way, stage, widths: for the formula; widths are those of gradients and parameters on the wire, in bytes.
        close: frees what can be freed.
    """

    micro_batch: Callable[[Tensor, bool], Tensor]
    model: nn.Module
    way: Way
    stage: int
    widths: tuple[float, float]
    close: Callable[[], None]
    restart: Callable[[], object] | None = None
    updates_between_restarts: int = 0


def arms_of(config: Config, chosen: Iterable[str] = ARMS) -> list[str]:
    """The arms to measure, the recipe's first; where the recipe is full-rank itself, ``full`` is the same thing and left out."""
    return [arm for arm in ARMS if arm in chosen and not (arm == "full" and config.method == "full")]


def measure(arm: str, checked: Checked, place: Place, device: torch.device, updates: int) -> Measurement:
    """Trains ``updates`` updates after one to warm up. Every rank calls it."""
    config = checked.config
    with COUNTER.purpose(START_UP):
        steps = _STARTS[arm](checked, device)
    data = TokenDataset(Path(config.data.path), "train", config.data.sequence_length, seed=config.run.seed)
    train = partial(_train, steps, data, checked, place, device)
    train(1)
    with _observed(place, device) as seen:
        started = time.perf_counter()
        for update in range(2, updates + 2):
            train(update)
        seconds = (time.perf_counter() - started) / updates
    counted = {purpose: value / updates for purpose, value in seen.counted.items()}
    wire = seen.wire / updates
    trainable = sum(p.numel() for p in steps.model.parameters() if p.requires_grad)
    restart_formula = 0.0
    if steps.restart is not None and steps.updates_between_restarts:
        with _observed(place, device) as of_restart:
            steps.restart()
        counted["restart"] = sum(of_restart.counted.values()) / steps.updates_between_restarts
        restart_formula = estimates.restart(steps.model, config.lora_settings, place.world_size) / steps.updates_between_restarts
        wire += of_restart.wire / steps.updates_between_restarts
    gradient_width, parameter_width = steps.widths
    formula = restart_formula + formulas.update_bytes(
        trainable, world_size=place.world_size, gradient_width=gradient_width, parameter_width=parameter_width, stage=steps.stage,
        accumulation=accumulation(config, place.world_size), way=steps.way,
    ).total  # fmt: skip
    tokens = config.train.global_batch * config.data.sequence_length
    steps.close()
    return Measurement(arm, trainable, counted, formula, wire, tokens, seconds)


def accumulation(config: Config, world_size: int) -> int:
    """Micro batches of an update on each rank."""
    return config.train.global_batch // (config.train.micro_batch * world_size)


def _train(steps: Steps, data: TokenDataset, checked: Checked, place: Place, device: torch.device, update: int) -> None:
    """One update, and the mean of its loss over the ranks, as a run has it."""
    train = checked.config.train
    batches = rank_micro_batches(
        update, global_batch=train.global_batch, micro_batch=train.micro_batch, rank=place.rank, world_size=place.world_size
    )
    loss = torch.zeros(4, dtype=torch.float64, device=device)
    for number, samples in enumerate(batches, start=1):
        loss[0] += steps.micro_batch(data.batch(samples).to(device), number == len(batches)).detach()
    with COUNTER.purpose(LOSS):
        dist.all_reduce(loss)
    loss.tolist()  # waits for the device


@dataclass
class Observed:
    """counted: wire bytes by purpose, on the mean over the ranks. wire: what the interfaces sent, divided by the ranks."""

    counted: dict[str, float]
    wire: float


@contextmanager
def _observed(place: Place, device: torch.device) -> Iterator[Observed]:
    """What all ranks send inside; filled when it ends."""
    seen = Observed({}, 0.0)
    dist.barrier()
    before, counters = COUNTER.snapshot(), nic.read()
    dist.barrier()  # no rank sends before all have read their counters
    yield seen
    dist.barrier()
    moved = nic.total(nic.since(counters), is_one_node=place.is_one_node).sent if place.local_rank == 0 else 0
    counted = by_purpose(COUNTER.since(before))
    names = sorted(_union(counted))
    table = torch.tensor([*(counted.get(name, 0.0) for name in names), moved], dtype=torch.float64, device=device)
    dist.all_reduce(table)
    *sums, wire = (table / place.world_size).tolist()
    seen.counted, seen.wire = dict(zip(names, sums, strict=True)), wire


def _union(names: Iterable[str]) -> set[str]:
    """Over all ranks."""
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, sorted(names))
    return set().union(*everyones)


def _engine_steps(engine: Any, way: Way, *, restart: Callable[[], object] | None = None, between: int = 0) -> Steps:
    def micro_batch(ids: Tensor, _is_last: bool) -> Tensor:
        loss: Tensor = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        return loss

    wire, stage = engine.communication_data_type, engine.zero_optimization_stage()
    widths = (float(wire.itemsize), float(next(engine.module.parameters()).element_size()))
    return Steps(micro_batch, engine.module, way, stage, widths, partial(release, engine), restart, between)


def _recipe(checked: Checked, device: torch.device) -> Steps:
    """The phase that the method is about: for those with factors, the one with factors."""
    phase = "lora" if checked.config.has_lora_phase else "full"
    model = phases.initial_model(checked, device, phase)
    engine = (phases.full_engine if phase == "full" else phases.lora_engine)(model, checked)
    optimizer, every = engine.optimizer, checked.config.lora_settings.restart_every
    restarts = isinstance(optimizer, ReLoRAOptimizer) and checked.config.method == "relora" and every
    return _engine_steps(
        engine, estimates.way(checked.deepspeed), restart=optimizer.restart if restarts else None, between=every or 0
    )


def _full_rank(checked: Checked) -> Checked:
    """The recipe with all parameters trained, on the model itself (the control's is narrower)."""
    config = checked.config.model_copy(update={"method": "full"})
    return replace(checked, config=config, architecture=models.hf_config(config.model, checked.index.vocab_size))


def _full(checked: Checked, device: torch.device) -> Steps:
    return _recipe(_full_rank(checked), device)


def _defaults(stage: int, checked: Checked, device: torch.device) -> Steps:
    """DeepSpeed as it comes: of its ZeRO settings the stage alone, no way of ours for the gradients."""
    full = _full_rank(checked)
    kept = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "bf16",
        "fp16",
    )
    content = {key: checked.deepspeed[key] for key in kept if key in checked.deepspeed}
    content["zero_optimization"] = {"stage": stage}
    count_everything()
    engine, *_ = deepspeed.initialize(
        libraries.naming_gpu(),
        model=phases.initial_model(full, device, "full"),
        optimizer=adamw(full.config.optimizer),
        config=content,
    )
    label(engine)
    return _engine_steps(engine, "all-reduce")


def _ddp(checked: Checked, device: torch.device) -> Steps:
    """PyTorch's own data parallelism. Its reducer is told to all-reduce from Python, where it is counted; the bytes are the same."""
    full = _full_rank(checked)
    settings = full.config.optimizer
    model = phases.initial_model(full, device, "full")
    optimizer = adamw(settings)(param_groups(model, weight_decay=settings.weight_decay, lr=settings.lr))
    wrapped = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(None, allreduce_hook)
    divisor = ds_config.get(checked.deepspeed, "gradient_accumulation_steps", 1)

    def micro_batch(ids: Tensor, is_last: bool) -> Tensor:
        wrapped.require_backward_grad_sync = is_last
        loss: Tensor = wrapped(input_ids=ids, labels=ids).loss
        with COUNTER.purpose(GRADIENT):
            (loss / divisor).backward()
        if is_last:
            if settings.grad_clip:
                nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
        return loss

    width = float(next(model.parameters()).element_size())
    return Steps(micro_batch, model, "ddp", 0, (width, width), optimizer.state.clear)


_STARTS: dict[str, Callable[[Checked, torch.device], Steps]] = {
    "recipe": _recipe,
    "full": _full,
    "zero2": partial(_defaults, 2),
    "zero1": partial(_defaults, 1),
    "ddp": _ddp,
}


def compare(
    checked: Checked, place: Place, device: torch.device, arms: Iterable[str], updates: int, tell: Callable[[str], None]
) -> list[Measurement]:
    """Measures the arms one after the other; every rank calls it. ``tell`` hears what it is at."""
    results = []
    for arm in arms:
        tell(f"{ARMS[arm]}: {updates} updates, after one to warm up")
        results.append(measure(arm, checked, place, device, updates))
        collect()
    return results
