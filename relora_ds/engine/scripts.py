"""``relora_ds.initialize``, for training loops of one's own: an engine that tells of its restarts, and whose checkpoints say what
they are (:mod:`relora_ds.models.script_checkpoint`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from relora_ds.console import say
from relora_ds.engine import initialize as engines
from relora_ds.models.script_checkpoint import describe
from relora_ds.optimizer.wrapper import ReLoRAOptimizer


@functools.wraps(engines.initialize)
def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """As :func:`relora_ds.engine.initialize`, whose words users see; rank 0 says a line at each restart."""
    engine, optimizer, loader, scheduler = engines.initialize(*args, **kwargs)
    if isinstance(engine.optimizer, ReLoRAOptimizer):
        engine.get_lr = engine.optimizer.get_last_lr
        engine.save_checkpoint = _describing(engine)
        if dist.get_rank() == 0:
            engine.optimizer.tell = say
    return engine, optimizer, loader, scheduler


def _describing(engine: Any) -> Callable[..., Any]:
    """The engine's ``save_checkpoint`` that leaves beside the tensors what they are."""
    save_checkpoint = engine.save_checkpoint

    @functools.wraps(save_checkpoint)
    def save(save_dir: str | Path, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
        done = save_checkpoint(str(save_dir), tag, *args, **kwargs)
        if dist.get_rank() == 0:
            describe(engine.module, Path(save_dir) / tag)
        return done

    return save
