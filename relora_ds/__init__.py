"""ReLoRA pre-training on DeepSpeed: high-rank training through restarted low-rank updates, on ZeRO stages 1 and 2."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from relora_ds.errors import ConfigError, RestartError

if TYPE_CHECKING:
    from relora_ds.export import export_adapter, export_model, merge_and_unload
    from relora_ds.optimizer import ReLoRAOptimizer
    from relora_ds.scripts import initialize
    from relora_ds.teardown import release

__version__ = "0.1.0"
__all__ = [
    "ConfigError", "ReLoRAOptimizer", "RestartError", "__version__", "export_adapter", "export_model", "initialize",
    "merge_and_unload", "release",
]  # fmt: skip
HOMES = {
    "ReLoRAOptimizer": "optimizer", "export_adapter": "export", "export_model": "export", "initialize": "scripts",
    "merge_and_unload": "export", "release": "teardown",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """torch and DeepSpeed take seconds to import: they are loaded when something needs them."""
    if name in HOMES:
        return getattr(importlib.import_module(f"relora_ds.{HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
