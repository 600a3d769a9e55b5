"""Live bytes of tensors, counted at the dispatcher: exact, and the same on every machine."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts the storages that operations make while it is entered, until they are freed.

    What an operation allocates and frees inside itself is not seen; storages that were there before do not count.

    Attributes:
        live, peak: bytes now, and the most there were at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if _is_real(tensor)}
        for tensor in tree_leaves(result):
            if _is_real(tensor) and tensor.untyped_storage()._cdata not in known:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, num_bytes: int) -> None:
        self.live -= num_bytes


def _is_real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_meta
