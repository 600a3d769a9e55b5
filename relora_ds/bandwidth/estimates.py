"""The formulas of traffic, filled in from a model and a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from relora_ds.bandwidth import formulas
from relora_ds.config import ReLoRA
from relora_ds.ds_config import fit as ds_config
from relora_ds.method.lora import ReLoRALayer, relora_layers
from relora_ds.zero import versions


def way(deepspeed: Mapping[str, Any]) -> formulas.Way:
    """How the gradients of an engine with this DeepSpeed configuration travel."""
    asked = ds_config.get(deepspeed, "zero_optimization.reduce_scatter", True)
    return "owner" if asked and versions.reduces_to_owners() else "all-reduce"


def restart(model: nn.Module, settings: ReLoRA, world_size: int) -> float:
    """Bytes that a rank sends in one restart of a wrapped model: :func:`relora_ds.bandwidth.formulas.restart_bytes`."""
    layers = [layer for _, layer in relora_layers(model)]
    factors = [factor for layer in layers for factor in layer.factors().values()]
    is_sharded = settings.frozen.master == "sharded"
    return formulas.restart_bytes(
        sum(factor.numel() for factor in factors),
        num_tensors=len(factors),
        choices=_choices(settings),
        world_size=world_size,
        gathered_bytes=sum(layer.weight.stored_bytes for layer in layers if layer.weight is not None) if is_sharded else 0,
        residual_bytes=sum(_residual_bytes(layer, world_size) for layer in layers) if settings.init == "residual" else 0,
    )


def _residual_bytes(layer: ReLoRALayer, world_size: int) -> int:
    rows = -(-layer.out_features // world_size)
    return formulas.MASTER_BYTES * (rows * layer.in_features + layer.lora_A.numel() + 2 * layer.lora_B.numel())


def _choices(settings: ReLoRA) -> int:
    """How often a restart ranks entries over all ranks; any rank can draw the keys of random masks of single tensors."""
    reset = settings.reset
    if reset.kind in ("full", "none") or reset.every is not None or (reset.kind == "random" and reset.scope == "tensor"):
        return 0
    return 1 if reset.mask == "joint" else 2
