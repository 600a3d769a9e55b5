"""The two phases of a run and the change between them: full-rank training, then LoRA factors on frozen weights. One engine each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from relora_ds.config import Config
from relora_ds.ds_config import fit as ds_config
from relora_ds.engine.initialize import adamw, initialize, wrapping
from relora_ds.engine.release import collect, release
from relora_ds.method import lora
from relora_ds.method.frozen_weights import own_rows
from relora_ds.method.targets import find_targets
from relora_ds.models import build as models
from relora_ds.models.adapters import deepspeed_weights, is_peft, peft_base, peft_weights
from relora_ds.models.compiling import compile_blocks, is_wanted
from relora_ds.models.export import merged_weights
from relora_ds.models.weights import Source, blank, pretrained
from relora_ds.run.folder import RunFolder
from relora_ds.training.preflight import Checked
from relora_ds.zero.state import ZeroState, data_parallel_group


@dataclass(frozen=True)
class Carried:
    """What a parameter takes along into the LoRA phase: its fp32 master, its moments by name, Adam's step count; on the CPU."""

    master: Tensor
    moments: dict[str, Tensor]
    step: int


@dataclass(frozen=True)
class HandOver:
    """What is left of the full-rank phase, in host memory.

    Attributes:
        model: not wrapped yet.
        carried: by name of the parameter, those that will not be frozen.
        exact_rows: (own rows, in) fp32 of each weight that will be frozen, where a sharded master is to begin with them.
    """

    model: nn.Module
    carried: dict[str, Carried]
    exact_rows: dict[str, Tensor] | None


def initial_model(checked: Checked, device: torch.device, phase: str, *, is_resumed: bool = False) -> PreTrainedModel:
    """The model at the start of a phase: random weights, a Hugging Face model's, or the merged weights of an earlier run.

    For the LoRA phase it is wrapped, unit by unit: what is frozen is rounded once, from fp32, and a sharded master starts from the
    exact weights. A resumed run gets zeros, since its checkpoint holds everything.
    """
    config = checked.config
    dtype = ds_config.DTYPES[ds_config.precision(checked.deepspeed)]
    model = models.skeleton(checked.architecture, attention=config.model.attention, dtype=dtype, device=device).train()
    start = blank if is_resumed else _first_weights(checked, model)
    finish = _wrap_units(model, checked) if phase == "lora" else None
    models.fill(model, dtype=dtype, device=device, seed=config.run.seed, weights=start, finish=finish)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _first_weights(checked: Checked, model: PreTrainedModel) -> str | Source | None:
    """Where the weights of a new run come from; None for random ones."""
    settings = checked.config.model
    if settings.weights is not None:
        return deepspeed_weights(Path(settings.weights), model, trust=checked.trust)
    if settings.path is None or RunFolder(Path(settings.path)).exists():
        return None if settings.path is None else merged_weights(Path(settings.path), trust=checked.trust)
    if not is_peft(settings.path):
        return settings.path
    base = peft_base(Path(settings.path))
    with models.explained("model.path", settings.path, "its base cannot be loaded"):
        return peft_weights(Path(settings.path), pretrained(base, model), model)


def _wrap_units(model: nn.Module, checked: Checked) -> Callable[[str], None]:
    """Wraps the target layers of one unit of the model at a time."""
    settings = checked.config.lora_settings
    targets = find_targets(model, settings.targets)
    how = wrapping(settings, checked.config.run.seed, ds_config.precision(checked.deepspeed))

    def wrap(unit: str) -> None:
        inside = {name: module for name, module in targets.items() if f"{name}.".startswith(f"{unit}.")}
        for name in inside:
            del targets[name]  # or its weight would stay in memory
        lora.wrap_layers(model, inside, **how)

    return wrap


def full_engine(model: nn.Module, checked: Checked) -> Any:
    """A plain DeepSpeed engine that trains every parameter."""
    groups = _groups(model, checked.config)
    engine, *_ = initialize(
        model=model,
        optimizer=adamw(checked.config.optimizer),
        model_parameters=groups,
        config=checked.deepspeed,
        trust=checked.trust,
    )
    return _compiled(engine, checked)


def lora_engine(model: nn.Module, checked: Checked) -> Any:
    """An engine that trains the factors, embeddings, norms and head of a wrapped model, and restarts the factors in ``step()``."""
    config = checked.config
    settings = config.lora_settings.model_copy(update={"warm_start": 0})
    engine, *_ = initialize(
        model=model,
        optimizer=adamw(config.optimizer),
        model_parameters=_groups(model, config),
        config=checked.deepspeed,
        relora=settings,
        seed=config.run.seed,
        rewarm=config.optimizer.schedule == "jagged",
        trust=checked.trust,
    )
    return _compiled(engine, checked)


def _compiled(engine: Any, checked: Checked) -> Any:
    """The engine, its model's blocks compiled where the recipe says so."""
    if is_wanted(checked.config.model.compile, engine.device):
        compile_blocks(engine.module)
    return engine


def end_full_rank(engine: Any, checked: Checked, device: torch.device) -> HandOver:
    """Ends the full-rank phase: what the LoRA phase begins with, in host memory; nothing of the engine is left on the device.

    The caller still holds the engine, an empty shell: it has to let go of it before :func:`begin_lora`.

    Embeddings, norms, biases and head go on with their fp32 masters, so no precision is lost; their moments go along when
    ``relora.keep_moments`` says so, and start from zero otherwise, as in the paper.
    """
    settings, model = checked.config.relora, engine.module
    targets = find_targets(model, settings.targets)
    carried = _take_along(engine, targets, device, moments=settings.keep_moments)
    exact_rows = _exact_rows(engine, targets, device) if settings.frozen.master == "sharded" else None
    release(engine, keep_on="cpu")
    return HandOver(model, carried, exact_rows)


def begin_lora(before: HandOver, checked: Checked, device: torch.device) -> Any:
    """Begins the LoRA phase with the weights of the full-rank phase; returns the new engine.

    The weights come to the device one layer at a time, each of which is stored as it will be kept before the next one comes.
    """
    collect()  # the old engine's shell, of which nobody knows any more
    _wrap_from_host(before, checked, device)
    engine = lora_engine(before.model.to(device), checked)
    _hand_over(engine, before.carried, device)
    return engine


def _wrap_from_host(before: HandOver, checked: Checked, device: torch.device) -> None:
    """Wraps the target layers of a model in host memory; of the exact rows each layer gets its own."""
    settings = checked.config.lora_settings
    how = wrapping(settings, checked.config.run.seed, ds_config.precision(checked.deepspeed))
    targets = list(find_targets(before.model, settings.targets).items())
    while targets:
        name, module = targets.pop()
        lora.wrap_layers(before.model, {name: module.to(device)}, **how)
        del module  # or its weight would stay in memory
        layer = before.model.get_submodule(name)
        if before.exact_rows is not None and layer.weight is not None:
            layer.weight.exact_rows = before.exact_rows.pop(name)


@torch.no_grad()
def _exact_rows(engine: Any, targets: Mapping[str, nn.Module], device: torch.device) -> dict[str, Tensor]:
    """This rank's rows, (own rows, in) fp32 on the CPU, of the masters of the weights that will be frozen."""
    params = {name: module.weight for name, module in targets.items()}
    comm = data_parallel_group(engine.optimizer, device)
    state = ZeroState(engine.optimizer, params, comm)
    rows = {}
    for name, module in targets.items():
        full = state.gather(name)
        full = full.t() if isinstance(module, lora.Conv1D) else full
        rows[name] = full[own_rows(full.shape[0], comm.rank, comm.world_size)].cpu().clone()
    return rows


@torch.no_grad()
def _take_along(engine: Any, targets: Mapping[str, nn.Module], device: torch.device, *, moments: bool) -> dict[str, Carried]:
    left_behind = {id(module.weight) for module in targets.values()}
    params = {name: p for name, p in engine.module.named_parameters() if p.requires_grad and id(p) not in left_behind}
    state = ZeroState(engine.optimizer, params, data_parallel_group(engine.optimizer, device))
    keys = state.moment_keys() if moments else []
    return {
        name: Carried(state.gather(name).cpu(), {key: state.gather(name, key).cpu() for key in keys}, state.step_count(name))
        for name in params
    }


@torch.no_grad()
def _hand_over(engine: Any, carried: dict[str, Carried], device: torch.device) -> None:
    params = {name: p for name, p in engine.module.named_parameters() if name in carried}
    state = ZeroState(engine.optimizer.zero, params, data_parallel_group(engine.optimizer, device))
    for name, values in carried.items():
        if values.moments:
            state.start_adam_state(name, values.step)
        for key, moment in values.moments.items():
            state.write_fragment(name, key, moment.to(device))
        state.write(name, values.master.to(device))


def _groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    settings = config.optimizer
    return lora.param_groups(model, weight_decay=settings.weight_decay, lr=settings.lr, lora_lr=settings.lora_lr)
