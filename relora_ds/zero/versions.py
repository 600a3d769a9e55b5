"""What differs between DeepSpeed's versions, in one place: asked of DeepSpeed's code by what it has, not by its number.

Numbers are in :data:`TESTED` alone, for people: ``make test-versions`` trains, resumes and changes ranks with each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import get_zero_config
from deepspeed.runtime.zero import stage_1_and_2
from packaging.version import InvalidVersion, Version
from pydantic import BaseModel, ConfigDict
from torch import Tensor

TESTED = ("0.16.9", "0.17.6", "0.18.9", "0.19.8")
"""Ascending. One for each minor version: others of the same are taken to be like it."""

Reader = Callable[[Mapping[str, Any]], Any]


def install() -> str:
    """What to install: the way out where an inside of DeepSpeed is not a known one."""
    return f"install deepspeed=={TESTED[-1]}"


def untried() -> str:
    """One line where the installed DeepSpeed is older or newer than all of :data:`TESTED`; empty otherwise."""
    try:
        release = Version(deepspeed.__version__).release
    except InvalidVersion:
        release = ()
    oldest, newest = Version(TESTED[0]).release, Version(TESTED[-1]).release
    if oldest <= release and release[:2] <= newest[:2]:
        return ""
    return f"DeepSpeed {deepspeed.__version__} was not tried with relora_ds: {', '.join(TESTED)} were"


def reduces_to_owners() -> bool:
    """Whether the installed DeepSpeed has what :class:`relora_ds.zero.gradient_reduction.GradientRoute` replaces; from 0.19 on."""
    return hasattr(stage_1_and_2.DeepSpeedZeroOptimizer, "_buffered_reduce_fallback_preserving_fp32")


# DeepSpeed's configuration


class _Bf16(BaseModel):
    """The section as DeepSpeed 0.16 reads it, key by key, plus what :func:`mend` does for it."""

    model_config = ConfigDict(extra="forbid")
    enabled: bool = False
    immediate_grad_update: bool = True
    check_grad_overflow: bool = True


class _Fp16(BaseModel):
    """The section as DeepSpeed 0.16 reads it, key by key."""

    model_config = ConfigDict(extra="forbid")
    enabled: bool = False
    auto_cast: bool = False
    loss_scale: float = 0
    initial_scale_power: int = 16
    loss_scale_window: int = 1000
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: float = 1
    fp16_master_weights_and_grads: bool = False


def section_readers() -> dict[str, Reader]:
    """What makes of DeepSpeed's configuration the values that it reads in the sections that decide the arithmetic, by section."""
    try:
        from deepspeed.runtime.precision_config import get_bfloat16_config, get_float16_config
    except ImportError:  # 0.16 has no classes for them, and takes what stands there as it stands: "false" would be true

        def get_bfloat16_config(config: Mapping[str, Any]) -> Any:
            return _Bf16(**config.get("bf16", {}))

        def get_float16_config(config: Mapping[str, Any]) -> Any:
            return _Fp16(**config.get("fp16", {}))

    return {"bf16": get_bfloat16_config, "fp16": get_float16_config, "zero_optimization": get_zero_config}


# DeepSpeed's engine and optimizer


def mend(engine: Any) -> None:
    """Makes a fresh engine of ZeRO stage 1 or 2 train as that of the newest version does; leaves any other as it is."""
    zero = engine.optimizer
    if type(zero) is not stage_1_and_2.DeepSpeedZeroOptimizer:
        return
    _leave_autograd(zero)
    if hasattr(engine, "_scale_wrt_gas"):
        _scale_once(engine)
    if not hasattr(zero, "compute_grad_norm"):
        _sum_all_micro_batches(zero)
        _skip_non_finite(zero)


def _leave_autograd(zero: Any) -> None:
    """Takes the flat weights and their partitions out of autograd's sight.

    They are made of parameters, with gradients on, and the partitions by split(), whose views must not be written to under autograd:
    in 0.18 the all-gather after a step does so.
    """
    zero.bit16_groups_flat[:] = [flat.detach() for flat in zero.bit16_groups_flat]
    partitions = zero.parallel_partitioned_bit16_groups
    partitions[:] = [[part.detach() for part in group] for group in partitions]


def _scale_once(engine: Any) -> None:
    """Has ``backward`` divide by the number of micro-batches once.

    0.18 divides the gradient of every tensor that the model returns: where it returns its logits beside the loss, as those of
    transformers do, gradients come out divided twice.
    """
    backward = engine.backward

    def divided(loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        share = loss / engine.gradient_accumulation_steps() if scale_wrt_gas else loss
        try:
            return backward(share, retain_graph=retain_graph, scale_wrt_gas=False)
        finally:
            engine._scale_wrt_gas = True  # for a backward() of the user's own, which it decides, too

    engine.backward = divided


def _sum_all_micro_batches(zero: Any) -> None:
    """Has stage 2 add up the gradients of all micro-batches, of which 0.17 keeps the last one's alone.

    To see whether a sum is begun it asks for the finished one, which is not there before the last micro-batch.
    """
    reduce = zero.independent_gradient_partition_epilogue

    def reduce_and_add() -> None:
        for group, begun in getattr(zero, "all_grad_tensors", {}).items():
            if begun is not None:
                zero.averaged_gradients[group] = begun
        reduce()

    zero.independent_gradient_partition_epilogue = reduce_and_add


def _skip_non_finite(zero: Any) -> None:
    """Has all ranks skip an update together in which a gradient is not finite, in any precision.

    0.17 asks the other ranks under stage 2 alone, fp32 is looked at from 0.19 on, and 0.16 looks at fp16 alone.
    """
    step, check = zero.step, zero.check_overflow

    def check_together(partition_gradients: bool = True) -> None:
        check(partition_gradients=True)

    def checked_step(closure: None = None) -> None:
        zero.check_overflow()  # the step looks at what it finds
        step(closure)

    zero.check_overflow = check_together
    if hasattr(zero, "check_grad_overflow"):
        zero.check_grad_overflow = zero.check_grad_overflow or zero.dtype == torch.float32
    elif zero.dtype != torch.float16:
        zero.step = checked_step
