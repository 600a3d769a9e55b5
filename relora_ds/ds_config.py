"""DeepSpeed's own configuration: reading it, fitting it to a recipe, and refusing in one line what ReLoRA cannot serve."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from relora_ds.config import Config, Traffic
from relora_ds.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def read(source: str | Path | Mapping[str, Any], *near: Path) -> dict[str, Any]:
    """DeepSpeed's configuration as a dictionary of its own.

    Args:
        source: its content, or the path of the JSON file; a relative path is looked for in the current folder, then in ``near``.

    Raises:
        ConfigError: no such file, or not a JSON object.
    """
    if isinstance(source, Mapping):
        return deepcopy(dict(source))
    path = next((place for place in (Path(source), *(folder / source for folder in near)) if place.is_file()), None)
    if path is None:
        raise ConfigError("deepspeed", str(source), "no such file", "name a DeepSpeed JSON file, e.g. ds_configs/zero2_bf16.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_twins)
    except ValueError as error:
        raise ConfigError("deepspeed", str(path), f"is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError("deepspeed", str(path), "does not hold a JSON object")
    return content


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError where a key is given twice, of which json would drop the first."""
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{twice!r} is given twice in one object")
    return dict(pairs)


def get(config: Mapping[str, Any], dotted: str, default: Any = None) -> Any:
    """The value at ``section.key``; ``default`` where a section or the key is missing."""
    value: Any = config
    for name in dotted.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return default
        value = value[name]
    return value


def precision(config: Mapping[str, Any]) -> str:
    """``bf16``, ``fp16`` or ``fp32``: the dtype in which the engine holds the model."""
    enabled = [name for name in ("bf16", "fp16") if get(config, f"{name}.enabled", False)]
    if len(enabled) > 1:
        raise ConfigError("deepspeed.bf16.enabled", True, "bf16 and fp16 are both enabled", "enable one of them")
    return enabled[0] if enabled else "fp32"


def adapt(recipe: Config, world_size: int) -> Config:
    """The recipe of a run that goes on with another number of ranks: the global batch stays, the micro batch gives way if it must.

    Raises:
        ConfigError: the global batch does not divide over the ranks; names the numbers of ranks that do.
    """
    train = recipe.train
    if train.global_batch % world_size:
        fitting = [str(ranks) for ranks in range(1, train.global_batch + 1) if train.global_batch % ranks == 0]
        nearest = sorted(fitting, key=lambda ranks: abs(int(ranks) - world_size))[:4]
        raise ConfigError(
            "--nproc",
            world_size,
            f"train.global_batch={train.global_batch} does not divide over so many ranks",
            f"go on with {', '.join(sorted(nearest, key=int))}",
        )
    share = train.global_batch // world_size
    micro_batch = next(size for size in range(min(train.micro_batch, share), 0, -1) if share % size == 0)
    return recipe.model_copy(update={"train": train.model_copy(update={"micro_batch": micro_batch})})


def fit(config: Mapping[str, Any], recipe: Config, world_size: int) -> dict[str, Any]:
    """``config`` with the batch, the accumulation and the clipping of the recipe, which decides them.

    Raises:
        ConfigError: the global batch does not divide over ranks and micro batches, or the file has an optimizer or scheduler.
    """
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise ConfigError(
                f"deepspeed.{section}",
                get(config, f"{section}.type"),
                "the recipe's optimizer section decides this",
                "leave it out",
            )
    train = recipe.train
    share = train.micro_batch * world_size
    if train.global_batch % share:
        below = max(share, train.global_batch - train.global_batch % share)
        raise ConfigError(
            "train.global_batch",
            train.global_batch,
            f"is not a multiple of micro_batch x ranks = {train.micro_batch} x {world_size}",
            f"use {below} or {below + share}, or another micro batch",
        )
    fitted = deepcopy(dict(config))
    fitted.update(
        train_batch_size=train.global_batch,
        train_micro_batch_size_per_gpu=train.micro_batch,
        gradient_accumulation_steps=train.global_batch // share,
        gradient_clipping=recipe.optimizer.grad_clip,
    )
    if precision(config) == "bf16":
        # Without it DeepSpeed applies a non-finite bf16 gradient; with it all ranks skip that update together.
        fitted["bf16"].setdefault("check_grad_overflow", True)
    if get(config, "zero_optimization.offload_optimizer.device") == "cpu":
        fitted.setdefault("zero_force_ds_cpu_optimizer", False)  # or DeepSpeed insists on an Adam that it compiles
    return fitted


Rule = tuple[str, Callable[[Any], bool], str, str]
_NEEDS: tuple[Rule, ...] = (
    ("zero_optimization.stage", lambda v: v not in (1, 2), "ReLoRA runs on ZeRO stage 1 or 2", "set it to 2"),
    ("zero_optimization.offload_param", bool, "needs ZeRO-3, which ReLoRA cannot run on", "leave it out"),
    ("zero_optimization.offload_optimizer.device", lambda v: v == "nvme", "moments on NVMe cannot be pruned", "use cpu or none"),
    ("zero_optimization.round_robin_gradients", bool, "DeepSpeed's fragment addresses are wrong with it", "leave it out"),
    ("zero_optimization.zenflow", bool, "ZenFlow's selective optimizer cannot be restarted", "leave it out"),
    (
        "zero_optimization.elastic_checkpoint",
        bool,
        "the factors have a step count of their own, which it cannot hold",
        "leave it out",
    ),
    ("zero_optimization.load_from_fp32_weights", lambda v: v is False, "a resume would lose the fp32 masters", "leave it out"),
    ("zero_optimization.compute_grad_norm", lambda v: v is False, "non-finite updates could not be skipped", "leave it out"),
    (
        "checkpoint.load_universal",
        bool,
        "relora-ds train converts a checkpoint of another number of ranks by itself",
        "leave it out",
    ),
    ("tensor_parallel.autotp_size", lambda v: (v or 1) > 1, "tensor parallelism is not supported", "leave it out"),
    ("sequence_parallel_size", lambda v: (v or 1) > 1, "sequence parallelism is not supported", "leave it out"),
    ("expert_parallel.enabled", bool, "expert parallelism is not supported", "leave it out"),
    ("compile.deepcompile", bool, "DeepCompile is not supported", "leave it out"),
    ("fp16.fp16_master_weights_and_grads", bool, "ReLoRA needs fp32 master weights", "leave it out"),
    ("bf16.bf16_master_weights_and_grads", bool, "ReLoRA needs fp32 master weights", "leave it out"),
    ("bf16.bf16_optimizer_states", bool, "ReLoRA needs fp32 moments", "leave it out"),
)


def refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Raises ConfigError, naming the key of DeepSpeed's configuration, for what ReLoRA would train wrongly or not at all."""
    if get(config, "zero_optimization.stage") is None:
        raise ConfigError("deepspeed.zero_optimization.stage", None, "ReLoRA runs on ZeRO stage 1 or 2", "set it to 2")
    for key, is_wrong, problem, way_out in _NEEDS:
        value = get(config, key)
        if value is not None and is_wrong(value):
            raise ConfigError(f"deepspeed.{key}", value, problem, way_out)
    accumulates_fp32 = get(config, "data_types.grad_accum_dtype") == "fp32" and precision(config) == "bf16"
    if accumulates_fp32 and get(config, "zero_optimization.stage") == 1:
        raise ConfigError(
            "deepspeed.data_types.grad_accum_dtype",
            "fp32",
            "with bf16 and stage 1 DeepSpeed takes another optimizer",
            "use stage 2",
        )


def refuse_with_traffic(config: Mapping[str, Any], traffic: Traffic) -> None:
    """Raises ConfigError for what the vocabulary's own way, if it has one, cannot be combined with."""
    if not traffic.is_on:
        return
    stage, device = get(config, "zero_optimization.stage", 0), get(config, "zero_optimization.offload_optimizer.device")
    if stage not in (1, 2):
        raise ConfigError("deepspeed.zero_optimization.stage", stage, "traffic needs ZeRO stage 1 or 2", "leave traffic out")
    if device not in (None, "none"):
        problem = "traffic brings gradients to optimizers on the ranks' devices"
        raise ConfigError("deepspeed.zero_optimization.offload_optimizer.device", device, problem, "leave out this or traffic")
    if get(config, "zero_optimization.compute_grad_norm") is False:
        problem = "traffic needs to know which updates are skipped before gradients are sent"
        raise ConfigError("deepspeed.zero_optimization.compute_grad_norm", False, problem, "leave out this or traffic")
