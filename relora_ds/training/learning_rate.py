"""The learning rate of every group of a recipe's optimizer, before each update.

After a restart :class:`~relora_ds.optimizer.wrapper.ReLoRAOptimizer` multiplies these by the re-warmup for the duration of a step
(:func:`relora_ds.schedule.rewarmup_factor`).
"""

from __future__ import annotations

from typing import Any

from relora_ds.config import Config
from relora_ds.method.lora import LORA_GROUP
from relora_ds.schedule import lr_factor


def set_learning_rates(groups: list[dict[str, Any]], config: Config, update: int) -> None:
    """Writes the rates of ``update`` (1-based) into an optimizer's parameter groups.

    The factors, whose group is called :data:`~relora_ds.method.lora.LORA_GROUP`, have a peak of their own where the recipe gives
    ``optimizer.lora_lr``.
    """
    settings = config.optimizer
    factor = lr_factor(
        settings.schedule, update, total=config.total_updates, warmup=settings.warmup, min_lr_ratio=settings.min_lr_ratio,
        phase_start=config.full_updates if config.phase_of(update) == "lora" else 0,
    )  # fmt: skip
    for group in groups:
        group["lr"] = settings.peak_lr(lora=group["name"] == LORA_GROUP) * factor
