"""The layer of ReLoRA's authors, imported from a checkout of their repository (Guitaricet/relora)."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

from torch import nn

from relora_ds.errors import ConfigError

FILE = "peft_pretraining/relora.py"
NOT_NEEDED = ("bitsandbytes", "bitsandbytes.functional", "loguru")
"""The file imports them for quantised layers and for log lines, of which there are none here: what is not installed is left out."""


def wrap(model: nn.Module, checkout: Path, *, targets: Sequence[str], rank: int, alpha: int) -> nn.Module:
    """``model`` with their layers, whose weights are frozen, in the place of its own.

    Raises:
        ConfigError: the checkout has no such layer, or it takes other arguments.
    """
    kind = load(checkout)
    signature = inspect.signature(kind)
    given = {"model": model, "target_modules": list(targets), "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0}
    given |= {name: True for name in ("keep_original_weights", "keep_original") if name in signature.parameters}
    try:
        signature.bind(**given)
    except TypeError as error:
        raise ConfigError("--authors", str(checkout), f"ReLoRaModel{signature} cannot be called: {error}") from None
    return kind(**given)


def load(checkout: Path) -> type[nn.Module]:
    """Their ``ReLoRaModel``.

    Raises:
        ConfigError: it is not there, or cannot be imported.
    """
    path = checkout / FILE
    if not path.is_file():
        raise ConfigError("--authors", str(checkout), f"has no {FILE}", "give a checkout of Guitaricet/relora")
    spec = importlib.util.spec_from_file_location("relora_authors", path)
    assert spec is not None and spec.loader is not None, "a Python file"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    try:
        with _left_out():
            spec.loader.exec_module(module)
    except ImportError as error:
        raise ConfigError("--authors", str(checkout), f"{FILE} cannot be imported: {error}") from None
    return _named(module, checkout)


def _named(module: ModuleType, checkout: Path) -> type[nn.Module]:
    kind = getattr(module, "ReLoRaModel", None)
    if not isinstance(kind, type):
        raise ConfigError("--authors", str(checkout), f"{FILE} has no class ReLoRaModel")
    return kind


@contextmanager
def _left_out() -> Iterator[None]:
    missing = [name for name in NOT_NEEDED if importlib.util.find_spec(name.partition(".")[0]) is None]
    sys.modules.update({name: MagicMock() for name in missing})
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]
