"""The two phases of a run and the change between them: full-rank training, then LoRA factors on frozen weights. One engine each."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from relora_ds import ds_config, lora
from relora_ds import model as models
from relora_ds.adapters import deepspeed_weights, is_peft, peft_base, peft_weights
from relora_ds.checks import Checked
from relora_ds.config import Config
from relora_ds.engine import adamw, initialize, wrapping
from relora_ds.export import merged_weights
from relora_ds.frozen import own_rows
from relora_ds.run_folder import RunFolder
from relora_ds.weights import Source, blank, pretrained
from relora_ds.zero import ZeroState, data_parallel_group


@dataclass(frozen=True)
class Carried:
    """What a parameter takes along into the LoRA phase: its fp32 master, its moments by name, Adam's step count; on the CPU."""

    master: Tensor
    moments: dict[str, Tensor]
    step: int


def initial_model(checked: Checked, device: torch.device, phase: str, *, is_resumed: bool = False) -> nn.Module:
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
        return None if settings.path is None else merged_weights(Path(settings.path))
    if not is_peft(settings.path):
        return settings.path
    base = peft_base(Path(settings.path))
    with models.explained("model.path", settings.path, "its base cannot be loaded"):
        return peft_weights(Path(settings.path), pretrained(base, model), model)


def _wrap_units(model: nn.Module, checked: Checked) -> Callable[[str], None]:
    """Wraps the target layers of one unit of the model at a time."""
    settings = checked.config.lora_settings
    targets = lora.find_targets(model, settings.targets)
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
        traffic=checked.config.traffic,
    )
    return engine


def lora_engine(model: nn.Module, checked: Checked, exact_rows: dict[str, Tensor] | None = None) -> Any:
    """An engine that trains the factors, embeddings, norms and head, and restarts the factors inside ``step()``.

    Args:
        model: wrapped in place, where it is not wrapped yet.
        checked: the recipe.
        exact_rows: this rank's rows of the frozen weights in fp32, where more is known of them than ``model`` holds.
    """
    config = checked.config
    settings = config.lora_settings.model_copy(update={"warm_start": 0})
    precision = ds_config.precision(checked.deepspeed)
    if not any(True for _ in lora.relora_layers(model)):
        lora.wrap(model, targets=settings.targets, **wrapping(settings, config.run.seed, precision))
    for name, layer in lora.relora_layers(model):
        if exact_rows is not None and layer.weight is not None:
            layer.weight.exact_rows = exact_rows[name]
    engine, *_ = initialize(
        model=model,
        optimizer=adamw(config.optimizer),
        model_parameters=_groups(model, config),
        config=checked.deepspeed,
        relora=settings,
        traffic=config.traffic,
        seed=config.run.seed,
        rewarm=config.optimizer.schedule == "jagged",
    )
    return engine


def change_phase(engine: Any, checked: Checked, device: torch.device) -> Any:
    """Ends the full-rank phase and begins the LoRA phase with its weights; returns the new engine.

    Embeddings, norms, biases and head go on with their fp32 masters, so no precision is lost; their moments go along when
    ``relora.keep_moments`` says so, and start from zero otherwise, as in the paper.
    """
    settings = checked.config.relora
    targets = lora.find_targets(engine.module, settings.targets)
    carried = _take_along(engine, targets, device, moments=settings.keep_moments)
    exact_rows = _exact_rows(engine, targets, device) if settings.frozen.master == "sharded" else None
    model = engine.module
    engine.destroy()
    del engine
    for param in model.parameters():  # their storage is the old engine's flat buffer, which must not outlive it
        param.data = param.data.clone()
        param.grad = None
    gc.collect()
    engine = lora_engine(model, checked, exact_rows)
    _hand_over(engine, carried, device)
    return engine


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
