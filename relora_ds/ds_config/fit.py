"""DeepSpeed's own configuration: reading it, fitting it to a recipe, and refusing in one line what ReLoRA cannot serve."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from relora_ds.config import Config
from relora_ds.ds_config.file import read
from relora_ds.ds_config.values import BATCH, get, normalise, precision, refuse_other_kinds, remove, without_effect
from relora_ds.errors import ConfigError

__all__ = [
    *("DTYPES", "adapt", "fit", "get", "idle", "normalise", "of_recipe", "precision", "precision_of", "read"),
    *(
        "refuse_other_kinds",
        "refuse_other_precision",
        "refuse_unrunnable",
        "refuse_unsupported",
        "sums_apart",
    ),
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def of_recipe(recipe: Config, *near: Path) -> dict[str, Any]:
    """What the recipe says of DeepSpeed, as DeepSpeed understands it; :func:`fit` makes it whole. Raises ConfigError."""
    content = read(recipe.deepspeed, *near)
    for section in ("optimizer", "scheduler"):
        if section in content:
            given = get(content, f"{section}.type")
            raise ConfigError(f"deepspeed.{section}", given, "the recipe's optimizer section decides this", "leave it out")
    content = normalise({key: value for key, value in content.items() if key not in (*BATCH, "gradient_clipping")})
    refuse_unsupported(content)
    _judge(content, _NEEDS_OF_RECIPES)
    refuse_other_kinds(content)
    return content


def precision_of(engine: Any) -> str:
    """``bf16``, ``fp16`` or ``fp32``: what a DeepSpeed engine says that it holds the model in."""
    return "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"


def refuse_other_precision(engine: Any, expected: str) -> None:
    """Raises ConfigError where an engine's precision is not what its configuration was read to say."""
    if precision_of(engine) != expected:
        raise ConfigError(
            f"deepspeed.{expected}.enabled" if expected != "fp32" else "deepspeed.bf16.enabled",
            expected,
            f"DeepSpeed made an engine in {precision_of(engine)} of it",
            "write true or false in the sections bf16 and fp16",
        )


def refuse_unrunnable(precision: str) -> None:
    """Raises ConfigError where this machine's device cannot compute in a precision, by DeepSpeed's own judgement."""
    accelerator = get_accelerator()
    can = {"bf16": accelerator.is_bf16_supported, "fp16": accelerator.is_fp16_supported}
    if precision in can and not can[precision]():
        others = "fp32" if precision == "bf16" else "bf16 or fp32"
        device = {"cpu": "CPU", "cuda": "GPU"}.get(accelerator.device_name(), accelerator.device_name())
        problem = f"DeepSpeed does not run {precision} on this machine's {device}"
        raise ConfigError(f"deepspeed.{precision}.enabled", True, problem, f"use {others}")


def idle(config: Mapping[str, Any]) -> str:
    """One line that names the settings without effect under stages 1 and 2; empty where there are none."""
    found = without_effect(config)
    return f"of DeepSpeed's JSON, these do nothing under ZeRO stage 1 or 2: {', '.join(found)}" if found else ""


def sums_apart(config: Mapping[str, Any]) -> bool:
    """Whether micro batches' gradients are summed in fp32 beside a model of 16 bits."""
    return get(config, "data_types.grad_accum_dtype") == "fp32" and precision(config) != "fp32"


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
            f"resume on {', '.join(sorted(nearest, key=int))}",
        )
    share = train.global_batch // world_size
    micro_batch = next(size for size in range(min(train.micro_batch, share), 0, -1) if share % size == 0)
    return recipe.model_copy(update={"train": train.model_copy(update={"micro_batch": micro_batch})})


def fit(config: Mapping[str, Any], recipe: Config, world_size: int) -> dict[str, Any]:
    """What :func:`of_recipe` gives, with the batch, the accumulation and the clipping of the recipe, and without idle settings.

    Raises:
        ConfigError: the global batch does not divide over ranks and micro batches.
    """
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
    fitted: dict[str, Any] = deepcopy(dict(config))
    for key in without_effect(config):
        remove(fitted, key)
    fitted.update(
        train_batch_size=train.global_batch,
        train_micro_batch_size_per_gpu=train.micro_batch,
        gradient_accumulation_steps=train.global_batch // share,
        gradient_clipping=recipe.optimizer.grad_clip,
    )
    # DeepSpeed's own measurement waits for the device twice in every micro batch; the trainer has its own.
    fitted.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
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
    ("zero_optimization.zenflow", lambda v: True, "ZenFlow's selective optimizer cannot be restarted", "leave it out"),
    (
        "zero_optimization.elastic_checkpoint",
        bool,
        "the factors have a step count of their own, which it cannot hold",
        "leave it out",
    ),
    ("zero_optimization.allgather_bucket_size", lambda v: v < 1, "DeepSpeed divides by it", "leave it out"),
    ("zero_optimization.load_from_fp32_weights", lambda v: v is False, "a resume would lose the fp32 masters", "leave it out"),
    ("zero_optimization.compute_grad_norm", lambda v: v is False, "non-finite updates could not be skipped", "leave it out"),
    (
        "checkpoint.load_universal",
        bool,
        "relora-ds train converts a checkpoint of another number of ranks by itself",
        "leave it out",
    ),
    ("tensor_parallel.autotp_size", lambda v: v not in (0, 1), "tensor parallelism is not supported", "leave it out"),
    ("sequence_parallel_size", lambda v: v not in (0, 1), "sequence parallelism is not supported", "leave it out"),
    ("expert_parallel.enabled", bool, "expert parallelism is not supported", "leave it out"),
    ("compile.deepcompile", bool, "DeepCompile is not supported", "leave it out"),
    ("autotuning.enabled", bool, "DeepSpeed would end the run after a few updates", "leave it out"),
    ("hybrid_engine.enabled", bool, "an engine for generation, whose weights ReLoRA does not know", "leave it out"),
    ("steps_per_print", lambda v: not isinstance(v, int) or v < 1, "is no number of updates", "use 10, or leave it out"),
    ("fp16.loss_scale_window", lambda v: v < 1, "is no number of updates", "use 1000, or leave it out"),
    ("fp16.fp16_master_weights_and_grads", bool, "ReLoRA needs fp32 master weights", "leave it out"),
    ("bf16.bf16_master_weights_and_grads", bool, "ReLoRA needs fp32 master weights", "leave it out"),
    ("bf16.bf16_optimizer_states", bool, "ReLoRA needs fp32 moments", "leave it out"),
    ("torch_autocast.enabled", bool, "frozen weights would be cast in every forward pass", "enable bf16 or fp16 instead"),
    ("data_types.buffer_dtype", lambda v: True, "it would cast the stores of the frozen weights", "use relora.frozen.dtype"),
    ("zero_optimization.legacy_stage1", bool, "DeepSpeed has it no more", "leave it out"),
)
_NEEDS_OF_RECIPES: tuple[Rule, ...] = (
    ("managed_gradient_accumulation", lambda v: v not in (True,), "every micro batch would be an optimizer step", "leave it out"),
    ("gradient_allreduce_op", lambda v: v != "mean", "an update is the mean over train.global_batch", "leave it out"),
    ("bf16.check_grad_overflow", lambda v: v is False, "non-finite updates could not be skipped", "leave it out"),
    ("data_efficiency.enabled", bool, "the recipe's data section decides what is trained on", "leave it out"),
)
"""Where a loop of the user's own may know better."""
_NEEDS_OF_REDUCE_SCATTER: tuple[Rule, ...] = (
    ("prescale_gradients", bool, "DeepSpeed divides after the sum, as long as it reduce-scatters", "leave it out"),
    (
        "gradient_predivide_factor",
        lambda v: v != 1,
        "DeepSpeed divides after the sum, as long as it reduce-scatters",
        "leave it out",
    ),
)


def refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Raises ConfigError, naming the key, for what ReLoRA would train wrongly or not at all, of what :func:`normalise` gives."""
    if get(config, "zero_optimization.stage") is None:
        raise ConfigError("deepspeed.zero_optimization.stage", None, "ReLoRA runs on ZeRO stage 1 or 2", "set it to 2")
    _judge(config, _NEEDS)
    if get(config, "zero_optimization.reduce_scatter") is not False:
        _judge(config, _NEEDS_OF_REDUCE_SCATTER)
    model, summed = precision(config), get(config, "data_types.grad_accum_dtype")
    if (dtype := get(config, "data_types.param_dtype")) not in (None, model):
        raise ConfigError("deepspeed.data_types.param_dtype", dtype, f"the sections bf16 and fp16 say {model}", "leave it out")
    if summed not in (None, "fp32", model):
        raise ConfigError(
            "deepspeed.data_types.grad_accum_dtype", summed, f"gradients come in {model}", "use fp32, or leave it out"
        )
    stage, offload = (get(config, f"zero_optimization.{key}") for key in ("stage", "offload_optimizer.device"))
    if sums_apart(config) and model == "bf16" and stage == 1 and offload != "cpu":
        problem = "with bf16 and stage 1 DeepSpeed takes another optimizer"
        raise ConfigError("deepspeed.data_types.grad_accum_dtype", summed, problem, "use stage 2")


def _judge(config: Mapping[str, Any], rules: tuple[Rule, ...]) -> None:
    for key, is_wrong, problem, way_out in rules:
        value = get(config, key)
        if value is not None and is_wrong(value):
            raise ConfigError(f"deepspeed.{key}", value, problem, way_out)
