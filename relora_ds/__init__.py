"""ReLoRA pre-training on DeepSpeed: high-rank training through restarted low-rank updates, on ZeRO stages 1 and 2."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from relora_ds.errors import ConfigError, RestartError
from relora_ds.version import __version__

if TYPE_CHECKING:
    from relora_ds.engine.release import release
    from relora_ds.engine.scripts import initialize
    from relora_ds.models.export import export_adapter, export_model, merge_and_unload
    from relora_ds.optimizer.wrapper import ReLoRAOptimizer

__all__ = [
    "ConfigError", "ReLoRAOptimizer", "RestartError", "__version__", "export_adapter", "export_model", "initialize",
    "merge_and_unload", "release",
]  # fmt: skip
HOMES = {
    "ReLoRAOptimizer": "optimizer.wrapper", "export_adapter": "models.export", "export_model": "models.export",
    "initialize": "engine.scripts", "merge_and_unload": "models.export", "release": "engine.release",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """torch and DeepSpeed take seconds to import: they are loaded when something needs them."""
    if name in HOMES:
        return getattr(importlib.import_module(f"relora_ds.{HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
