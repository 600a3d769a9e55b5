"""ReLoRA pre-training on DeepSpeed: high-rank training through restarted low-rank updates, on ZeRO stages 1 and 2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from relora_ds.errors import ConfigError, RestartError
from relora_ds.version import __version__

if TYPE_CHECKING:
    from relora_ds.engine.initialize import initialize
    from relora_ds.engine.release import release
    from relora_ds.optimizer.wrapper import ReLoRAOptimizer

__all__ = ["ConfigError", "ReLoRAOptimizer", "RestartError", "__version__", "initialize", "release"]


def __getattr__(name: str) -> Any:
    """torch and DeepSpeed take seconds to import: they are loaded when something needs them."""
    if name == "initialize":
        from relora_ds.engine.initialize import initialize

        return initialize
    if name == "ReLoRAOptimizer":
        from relora_ds.optimizer.wrapper import ReLoRAOptimizer

        return ReLoRAOptimizer
    if name == "release":
        from relora_ds.engine.release import release

        return release
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
