"""What two configurations of one run may not differ in. PURE, and without torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from relora_ds.config import Config

MATTERS = ("run.seed", "method", "model", "data", "relora", "optimizer", "train.global_batch")
"""Settings that a resumed run must share with the run that it goes on with, unless the user insists …"""
HARMLESS = (
    "model.attention",
    "model.gradient_checkpointing",
    "model.compile",
    "model.loss",
    "relora.linear",
    "relora.keep_merged",
    "relora.frozen.verify_every",
    "relora.frozen.on_mismatch",
    "relora.frozen.master_device",
)
"""… but for these."""
RESTARTS = ("relora.restart_every", "relora.restart_growth", "relora.restart_warmup", "relora.rewarm", "relora.reset")
FACTORS = ("relora", "optimizer.lora_lr")
UNUSED = {
    "full": FACTORS,
    "control": FACTORS,
    "lora": RESTARTS,
    "low_rank": (*RESTARTS, "relora.warm_start", "relora.init", "relora.frozen"),
    "relora": (),
}
"""What a method has no use for."""
WIDTH = ("relora.rank", "relora.targets")
"""What the width of ``control`` is computed from."""


def differences(before: Config, now: Config) -> list[tuple[str, Any, Any]]:
    """The settings that matter and are not the same: (key, before, now)."""
    old, new = (dict(_flat(settings.model_dump(mode="json"))) for settings in (before, now))
    keys = [key for key in {**old, **new} if _matters(key, before) or _matters(key, now)]
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def _matters(key: str, config: Config) -> bool:
    if config.method == "control" and is_under(key, WIDTH):
        return True
    return is_under(key, MATTERS) and not is_under(key, HARMLESS) and not is_under(key, UNUSED[config.method])


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict) and prefix + name != "model.config":
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def is_under(key: str, sections: Sequence[str]) -> bool:
    """Whether a dotted key is one of the sections, or in one of them."""
    return any(key == section or key.startswith(f"{section}.") for section in sections)
