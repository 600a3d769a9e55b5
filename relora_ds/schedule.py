"""Learning-rate curves and the updates that are restarts. Pure: plain numbers in, plain numbers out.

Updates are counted from 1. The learning rate of update ``u`` is taken at step ``s = u - 1``, as Hugging Face's schedulers do, so the
first update of a warmup, and the first update after a restart, have learning rate 0 (Lialin et al., arXiv 2307.05695, section 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ScheduleName = Literal["jagged", "cosine", "linear", "constant"]


def warmup_factor(step: int, warmup: int) -> float:
    """Linear ramp: 0 at step 0, 1 from step ``warmup`` on; 1 everywhere when ``warmup`` is 0."""
    return min(1.0, step / warmup) if warmup > 0 else 1.0


def decay_factor(name: ScheduleName, step: int, total: int, warmup: int, min_lr_ratio: float) -> float:
    """The smooth part of a schedule: 1 until ``warmup``, then down to ``min_lr_ratio`` at step ``total``.

    ``jagged`` and ``cosine`` share the cosine; the teeth of the jagged one are :func:`warmup_factor` after each restart.
    """
    if name == "constant":
        return 1.0
    progress = min(1.0, max(0.0, (step - warmup) / max(1, total - warmup)))
    falling = 0.5 * (1.0 + math.cos(math.pi * progress)) if name in ("jagged", "cosine") else 1.0 - progress
    return min_lr_ratio + (1.0 - min_lr_ratio) * falling


def lr_factor(name: ScheduleName, update: int, *, total: int, warmup: int, min_lr_ratio: float, phase_start: int = 0) -> float:
    """What the learning rate of ``update`` is multiplied with, re-warmups after restarts apart.

    One decay runs over the whole run of ``total`` updates; every phase (the LoRA phase begins after update ``phase_start``) warms up
    anew, since its optimizer is new.

    Args:
        name: the curve.
        update: 1-based.
        total: updates of the whole run.
        warmup: updates of the ramp at the start of each phase.
        min_lr_ratio: floor of the decay, as a share of the peak.
        phase_start: updates done before this phase began.
    """
    step = update - 1
    return warmup_factor(step - phase_start, warmup) * decay_factor(name, step, total, warmup, min_lr_ratio)


@dataclass(frozen=True)
class Interval:
    """Something that recurs, counted in updates from the start of the LoRA phase.

    Args:
        every: updates before the first time; 0 for never.
        growth: each interval is so many times the one before, rounded to whole updates.
    """

    every: int
    growth: float = 1.0

    def newest(self, update: int) -> int:
        """The last update, at or before ``update``, that it followed; 0 when there was none."""
        if self.every <= 0:
            return 0
        if self.growth == 1.0:
            return update - update % self.every
        at, length = 0, float(self.every)
        while at + round(length) <= update:
            at, length = at + round(length), length * self.growth
        return at

    def follows(self, update: int) -> bool:
        """Whether it follows ``update`` (1-based)."""
        return update > 0 and self.newest(update) == update

    def count(self, updates: int) -> int:
        """How often it comes within so many updates, with one of them to follow."""
        times, at = 0, self.newest(updates - 1)
        while at > 0:
            times, at = times + 1, self.newest(at - 1)
        return times


def rewarmup_factor(update: int, resets: Interval, restart_warmup: int) -> float:
    """The tooth of the jagged schedule: 0 for the first update after a reset, 1 from ``restart_warmup`` updates after it.

    Args:
        update: 1-based, counted from the start of the LoRA phase; the factor is 1 before the first reset.
        resets: when the optimizer is reset: at every restart, or on its own interval.
        restart_warmup: updates of the ramp.
    """
    newest = resets.newest(update - 1)
    return warmup_factor(update - 1 - newest, restart_warmup) if newest else 1.0
