"""Live bytes of tensors: the most at one time, counted at the dispatcher, the same on every machine; and those there are."""

from __future__ import annotations

import gc
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


def live_bytes() -> int:
    """Of all storages that Python's tensors refer to now, whoever made them: what a checkpoint brought counts, too."""
    gc.collect()
    storages = {}
    for value in gc.get_objects():
        if issubclass(type(value), torch.Tensor) and value.device.type == "cpu" and not torch._is_functional_tensor(value):
            storage = value.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _is_real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_meta
