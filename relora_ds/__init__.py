"""ReLoRA pre-training on DeepSpeed: high-rank training through restarted low-rank updates, on ZeRO stages 1 and 2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from relora_ds.errors import ConfigError, RestartError

if TYPE_CHECKING:
    from relora_ds.engine import initialize
    from relora_ds.optimizer import ReLoRAOptimizer
    from relora_ds.teardown import release

__version__ = "0.1.0"
__all__ = ["ConfigError", "ReLoRAOptimizer", "RestartError", "__version__", "initialize", "release"]


def __getattr__(name: str) -> Any:
    """torch and DeepSpeed take seconds to import: they are loaded when something needs them."""
    if name == "initialize":
        from relora_ds.engine import initialize

        return initialize
    if name == "ReLoRAOptimizer":
        from relora_ds.optimizer import ReLoRAOptimizer

        return ReLoRAOptimizer
    if name == "release":
        from relora_ds.teardown import release

        return release
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
