"""The one place where checkpoints are unpickled, and what may come out of them.

A pickle can run anything when it is opened, and a manifest says that a file is whole, not who wrote it. So all are opened by torch's
weights_only reader: tensors, numbers, text and their containers, and the few classes of DeepSpeed's that are named here.
"""

from __future__ import annotations

import functools
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from relora_ds.errors import ConfigError

WAY_OUT = "pass --trust if you trust whoever wrote it"
WAY_OUT_OF_SCRIPTS = (
    "pass trust=True to relora_ds.initialize if you trust whoever wrote it, or name classes of your own in client_state to "
    "torch.serialization.add_safe_globals"
)


@functools.cache
def known() -> tuple[type, ...]:
    """What DeepSpeed puts into optimizer states beside tensors and numbers. Making any of these runs nothing but assignments.

    An enumeration, two classes of numbers (the second under fp16 alone), and where a parameter lies in its shard.
    """
    # Here: it takes seconds, and not every command that may open a file needs DeepSpeed.
    from deepspeed.runtime.config import ZeroStageEnum
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.utils.tensor_fragment import fragment_address

    return ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address


def read(path: Path, *, trust: bool = False, key: str = "CHECKPOINT", way_out: str = WAY_OUT) -> Any:
    """What ``torch.save`` wrote, on the CPU; tensors are mapped, not read, where the file's format allows it.

    Args:
        path: of the file.
        trust: whether the user trusts whoever wrote it: then whatever is in it is unpickled.
        key, way_out: of the error.

    Raises:
        ConfigError: something else would have to be made, and nothing of it was.
    """
    return _load(path, trust=trust, key=key, way_out=way_out, map_location="cpu", mmap=zipfile.is_zipfile(path))


def check(paths: Iterable[Path], *, trust: bool = False, key: str = "CHECKPOINT") -> None:
    """Raises ConfigError for the first of these files that :func:`read` would refuse; what is missing is told where it is read."""
    for path in () if trust else paths:
        with suppress(OSError):
            read(path, key=key)


@contextmanager
def guarded(*, trust: bool = False, key: str = "CHECKPOINT", way_out: str = WAY_OUT) -> Iterator[None]:
    """While it lasts, ``torch.load`` refuses what :func:`read` does, whoever in this process calls it: DeepSpeed opens anything."""
    original = torch.load

    def load(f: Any, map_location: Any = None, *_: Any, mmap: bool | None = None, **__: Any) -> Any:
        return _load(f, trust=trust, key=key, way_out=way_out, map_location=map_location, mmap=mmap)

    torch.load = load
    try:
        yield
    finally:
        torch.load = original


def _load(file: Any, *, trust: bool, key: str, way_out: str, **how: Any) -> Any:
    if trust:
        return torch.serialization.load(file, weights_only=False, **how)
    added = [one for one in known() if one not in torch.serialization.get_safe_globals()]  # what the user named stays named
    try:
        with torch.serialization.safe_globals(added):
            return torch.serialization.load(file, weights_only=True, **how)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a pickle that is made to harm, or torn, can fail in any way
        raise ConfigError(key, str(file), *_told(error, way_out)) from None


def _told(error: Exception, way_out: str) -> tuple[str, str]:
    """The problem and the way out."""
    text = str(error)
    wanted = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", text)
    if wanted:
        return f"is a pickle that wants {wanted[1]}, which could run anything", way_out
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in text:
        text = text.partition("WeightsUnpickler error:")[2].partition("Check the documentation")[0] or text
        return f"is a pickle that could run anything: {' '.join(text.split())[:200]}", way_out
    return f"cannot be read: {type(error).__name__}: {text}"[:400], "take another checkpoint"
