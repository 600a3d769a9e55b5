"""initialize(): model -> wrap -> deepspeed.initialize -> ReLoRAOptimizer. It mirrors ``deepspeed.initialize``."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from relora_ds.checkpoint.base import frozen_weights
from relora_ds.checkpoint.reader import load_base
from relora_ds.comm.counter import COUNTER, START_UP, count_everything, label
from relora_ds.config import Optimizer, ReLoRA, parse_relora
from relora_ds.ds_config import fit as ds_config
from relora_ds.errors import ConfigError
from relora_ds.launch import libraries, process_group
from relora_ds.method.frozen_weights import FrozenWeight
from relora_ds.method.full_rank import full_rank_line
from relora_ds.method.lora import LORA_GROUP, param_groups, relora_layers, wrap
from relora_ds.optimizer.wrapper import ReLoRAOptimizer
from relora_ds.run import unpickle
from relora_ds.zero import versions as zero_versions
from relora_ds.zero.gradient_reduction import route_gradients
from relora_ds.zero.parts import name_parts
from relora_ds.zero.per_parameter import do_once

ADAMS = ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam")


@COUNTER.serving(START_UP)
def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    mpu: Any = None,
    collate_fn: Any = None,
    config: str | Path | Mapping[str, Any] | None = None,
    *,
    relora: ReLoRA | dict[str, Any] | None = None,
    lora_lr: float | None = None,
    seed: int = 0,
    rewarm: bool = True,
    trust: bool = False,
    **others: Any,
) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize`` for a model that is trained by ReLoRA.

    The target layers of ``model`` are wrapped in place (unless they already are), but for those whose weight is frozen
    (``requires_grad=False``), which stay as they are. The factors get parameter groups of their own, and
    ``engine.optimizer`` becomes a :class:`~relora_ds.optimizer.wrapper.ReLoRAOptimizer`, which restarts inside ``engine.step()``.
    The loop stays as it is; ``engine.save_checkpoint`` and ``load_checkpoint`` hold merged weights and restarts.

    Args:
        args, training_data, collate_fn, others: as in ``deepspeed.initialize``.
        model: any causal language model, or any module with linear layers or embeddings.
        optimizer: Adam or AdamW: an instance, or a callable that takes parameter groups; None for the one in ``config``, or, where
            that has none, :func:`adamw` with the defaults of :class:`relora_ds.config.Optimizer`. Weights that become frozen
            leave its groups; the factors come in, with the settings of the group that their weight was in.
        model_parameters: parameters or groups to train; all trainable ones when None.
        lr_scheduler: a callable that takes the optimizer, or None for the one in ``config``.
        config: DeepSpeed's configuration: a path or a dictionary; None for the one that ``args.deepspeed_config`` names.
        relora: the settings of :class:`relora_ds.config.ReLoRA`; None for ``deepspeed.initialize`` as it is, but for
            gradient reduction.
        lora_lr: learning rate of the factors; that of their group when None.
        seed: of the factors' initialisation.
        rewarm: whether learning rates climb from 0 again after a restart.
        trust: whether ``engine.load_checkpoint`` unpickles whatever is in a checkpoint, which can run anything, because you trust
            whoever wrote it. Without it a checkpoint holds tensors, numbers, text and containers of them, also in your
            ``client_state``; classes of your own there are named to ``torch.serialization.add_safe_globals`` instead.

    Returns:
        (engine, optimizer, dataloader, scheduler).

    Raises:
        ConfigError: a setting, or something of DeepSpeed's, that cannot be served; before anything is trained.
    """
    if model is None:
        raise ConfigError("model", None, "is required")
    args, given = _configured(args, config if config is not None else others.pop("config_params", None))
    content = ds_config.normalise(ds_config.read(given))
    precision = ds_config.precision(content)
    ds_config.refuse_unrunnable(precision)
    libraries.skip_shared_memory_build()
    if precision == "bf16" and not torch.cuda.is_available():
        done = libraries.guard_bf16()
        if done:
            warnings.warn(done, stacklevel=2)
    args = libraries.naming_gpu(args)
    count_everything()
    name_parts()
    if relora is None:
        _join()
        plain = deepspeed.initialize(
            args, model, optimizer, model_parameters, training_data, lr_scheduler,
            mpu=mpu, collate_fn=collate_fn, config=content, **others,
        )  # fmt: skip
        ds_config.refuse_other_precision(plain[0], precision)
        _route(plain[0])
        label(plain[0])
        plain[0].load_checkpoint = _reader(plain[0], trust)
        return plain

    settings = parse_relora(relora)
    ds_config.refuse_unsupported(content)
    ds_config.refuse_other_kinds(content)
    if mpu is not None or isinstance(model, deepspeed.PipelineModule):
        raise ConfigError("model", type(model).__name__, "pipeline and tensor parallelism are not supported")
    if any(hasattr(module, "base_layer") for module in model.modules()):  # else PEFT's own factors would get factors
        way_out = "merge them with merge_and_unload() and call requires_grad_(True) on what is to be trained"
        raise ConfigError("model", type(model).__name__, "holds PEFT's adapters", way_out)
    if settings.warm_start:
        raise ConfigError(
            "relora.warm_start", settings.warm_start, "the training loop is yours", "train the model first, then initialize"
        )
    given = _materialise(model_parameters)
    full_rank = None
    if not any(True for _ in relora_layers(model)):
        full_rank = full_rank_line(model)
        wrap(model, targets=settings.targets, **wrapping(settings, seed, precision))
    if optimizer is None and "optimizer" not in content:
        optimizer = adamw(Optimizer())
    optimizer, groups = _groups(model, optimizer, given, lr_scheduler, content, lora_lr)
    if settings.rewarm == "factors":
        _refuse_unnamed(model, optimizer.param_groups if isinstance(optimizer, torch.optim.Optimizer) else groups or [])
    stores = _stores(model)
    _join()
    engine, zero, loader, scheduler = deepspeed.initialize(
        args, model, optimizer, groups, training_data, lr_scheduler, collate_fn=collate_fn, config=content, **others
    )
    _keep(stores)
    ds_config.refuse_other_precision(engine, precision)
    for remark in filter(None, (full_rank, ds_config.idle(content)) if dist.get_rank() == 0 else ()):
        warnings.warn(remark, stacklevel=2)
    _route(engine)
    base = type(engine.basic_optimizer).__name__
    if base not in ADAMS:
        raise ConfigError("optimizer", base, f"ReLoRA prunes Adam's moments: one of {', '.join(ADAMS)}")
    engine.optimizer = ReLoRAOptimizer(zero, engine.module, settings, seed=seed, rewarm=rewarm)
    engine.optimizer.keep_merged(engine.gradient_accumulation_steps())
    label(engine)
    engine.load_checkpoint = _reader(engine, trust)
    return engine, engine.optimizer, loader, scheduler


def _configured(args: Any, config: Any) -> tuple[Any, Any]:
    """DeepSpeed's configuration, which may be the one of its option --deepspeed_config; and ``args`` without it, for DeepSpeed, which
    takes it from one place alone."""
    named = getattr(args, "deepspeed_config", None)
    if named is None:
        if config is None:
            raise ConfigError(
                "config", None, "is required", "pass DeepSpeed's JSON file or its content, or args with deepspeed_config"
            )
        return args, config
    if config is not None:
        raise ConfigError("config", config, f"args.deepspeed_config={named!r} is given, too", "leave one of the two out")
    args = copy.copy(args)
    args.deepspeed_config = None
    return args, named


def _join() -> None:
    """Starts the process group as the launcher says, and alone without one: left to itself, DeepSpeed would ask MPI who it is.

    Not where DeepSpeed was told to leave this machine's GPUs alone.
    """
    if get_accelerator().device_name() == "cuda" or not torch.cuda.is_available():
        process_group.require()


def _stores(model: nn.Module) -> list[tuple[FrozenWeight, str, torch.dtype]]:
    """The buffers of the frozen weights, by owner and name, with their dtypes."""
    owners = [module for module in model.modules() if isinstance(module, FrozenWeight)]
    return [(owner, name, buffer.dtype) for owner in owners for name, buffer in owner.named_buffers(recurse=False)]


def _keep(stores: list[tuple[FrozenWeight, str, torch.dtype]]) -> None:
    """Undoes that DeepSpeed makes those fp32 whose names are on a list of the model, or in ``data_types.keep_in_fp32_modules``."""
    for owner, name, dtype in stores:
        buffer = owner.get_buffer(name)
        buffer.data = buffer.data.to(dtype)


def _reader(engine: Any, trust: bool) -> Callable[..., Any]:
    """The engine's ``load_checkpoint`` that runs nothing, and brings the frozen weights of a checkpoint whose base holds them."""
    load_checkpoint = engine.load_checkpoint

    @functools.wraps(load_checkpoint)
    def load(*args: Any, **kwargs: Any) -> Any:
        with unpickle.guarded(trust=trust, way_out=unpickle.WAY_OUT_OF_SCRIPTS):
            path, client_state = load_checkpoint(*args, **kwargs)
        if path is not None and not all(weight.was_loaded for weight in frozen_weights(engine.optimizer).values()):
            load_base(engine.optimizer, Path(path).parent)
        return path, client_state

    return load


def adamw(settings: Optimizer) -> Callable[[Any], torch.optim.Optimizer]:
    """Makes torch's fused AdamW of the groups that DeepSpeed is given; groups without a learning rate get ``settings.lr``."""
    beta1, beta2 = settings.betas
    return lambda groups: torch.optim.AdamW(
        groups, lr=settings.lr, betas=(beta1, beta2), eps=settings.eps, weight_decay=settings.weight_decay, fused=True
    )


def wrapping(settings: ReLoRA, seed: int, precision: str) -> dict[str, Any]:
    """What :func:`relora_ds.method.lora.wrap_layers` is told for these settings.

    ``precision`` is the engine's, in which ``frozen.dtype: auto`` stores.
    """
    frozen = settings.frozen
    if frozen.dtype == "auto":
        frozen = frozen.model_copy(update={"dtype": precision})
    shard = None
    if frozen.master == "sharded":
        process_group.require()
        shard = (dist.get_rank(), dist.get_world_size())
    return {
        "rank": settings.rank,
        "alpha": settings.alpha,
        "dropout": settings.dropout,
        "seed": seed,
        "frozen": frozen,
        "shard": shard,
        "trainable_scaling": settings.trainable_scaling,
        "init": settings.init,
        "linear": settings.linear,
    }


def _materialise(parameters: Iterable[Any] | None) -> list[dict[str, Any]] | None:
    """Parameter groups as dictionaries, read before wrapping: a generator over the model would see the wrapped one."""
    if parameters is None:
        return None
    entries = list(parameters)
    if entries and isinstance(entries[0], dict):
        return [{**group, "params": list(group["params"])} for group in entries]
    return [{"params": entries}]


def _groups(
    model: nn.Module,
    optimizer: Any,
    chosen: list[dict[str, Any]] | None,
    lr_scheduler: Any,
    content: dict[str, Any],
    lora_lr: float | None,
) -> tuple[Any, list[dict[str, Any]] | None]:
    """The optimizer and the parameter groups that ``deepspeed.initialize`` gets, with the factors in groups of their own."""
    if isinstance(optimizer, torch.optim.Optimizer):
        if optimizer.state:
            raise ConfigError("optimizer", type(optimizer).__name__, "has already taken a step", "pass a fresh one")
        if lr_scheduler is not None and not callable(lr_scheduler):
            raise ConfigError(
                "lr_scheduler",
                type(lr_scheduler).__name__,
                "was made for the groups before wrapping",
                "pass lambda optimizer: scheduler",
            )
        optimizer.param_groups[:] = regroup(model, optimizer.param_groups, lora_lr)
        return optimizer, None
    if chosen is not None:
        return optimizer, regroup(model, chosen, lora_lr)
    decay = ds_config.get(content, "optimizer.params.weight_decay")
    return optimizer, param_groups(model, weight_decay=decay, lora_lr=lora_lr)


def _route(engine: Any) -> None:
    """Gives a fresh engine's gradients their way, once it is as in the newest version and does nothing more often than needed."""
    untried = zero_versions.untried()
    if untried and dist.get_rank() == 0:
        warnings.warn(untried, stacklevel=1)
    zero_versions.mend(engine)
    do_once(engine.optimizer)
    route_gradients(engine)


def regroup(model: nn.Module, groups: list[dict[str, Any]], lora_lr: float | None) -> list[dict[str, Any]]:
    """The user's groups without the frozen weights, each followed by a group of the factors that stand for them.

    Raises:
        ConfigError: the factors of some layer belong to no group, because the weight was in none; or ``lora_lr`` is given for factors
            that have a group already.
    """
    factors = {layer.replaces: list(layer.factors().values()) for _, layer in relora_layers(model)}
    already = {id(p) for group in groups for p in group["params"]}
    if lora_lr is not None and any(id(f) in already for pair in factors.values() for f in pair):
        raise ConfigError(
            "lora_lr", lora_lr, "the factors are in groups of yours", "give these groups their rate, or leave it out"
        )
    regrouped = []
    for group in groups:
        kept = [p for p in group["params"] if p.requires_grad]
        new = [f for p in group["params"] for f in factors.pop(id(p), []) if id(f) not in already]
        if kept:
            regrouped.append({**group, "params": kept})
        if new:
            rate = {} if lora_lr is None else {"lr": lora_lr}
            regrouped.append({**group, **rate, "params": new, "name": LORA_GROUP})
    missing = [f for pair in factors.values() for f in pair if id(f) not in already]
    if missing:
        name = next(name for name, layer in relora_layers(model) if layer.lora_A is missing[0])
        raise ConfigError(
            "model_parameters",
            name,
            "this layer is a target of ReLoRA, but its weight is in no group",
            "add it, or leave it out of targets",
        )
    return regrouped


def _refuse_unnamed(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Raises ConfigError where factors are in a group of the user's that is not known to be theirs: its rate would never re-warm."""
    factors = {id(f) for _, layer in relora_layers(model) for f in layer.factors().values()}
    for group in groups:
        are_factors = {id(p) in factors for p in group["params"]}
        if are_factors != {False} and (are_factors != {True} or group.get("name") != LORA_GROUP):
            problem = f"factors are in a group that is not theirs alone, with name={LORA_GROUP!r}"
            raise ConfigError(
                "relora.rewarm", "factors", problem, "make such a group, or let relora_ds.initialize wrap the model"
            )
