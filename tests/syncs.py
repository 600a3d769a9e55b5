"""What makes the host wait for a GPU, seen on a CPU: wherever it reads the values of a tensor."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.masked_select, aten.nonzero, aten._unique2, aten.unique_dim,
    aten.unique_consecutive, aten.repeat_interleave,
}  # fmt: skip
"""Operations that end on the host, or whose result has a size that only the values tell. All of float(), int(), bool() and item()
are the first one."""
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
METHODS = ("tolist", "numpy", "cpu", "__array__")
"""Of a tensor, which may go by the dispatcher."""


class Syncs(TorchDispatchMode):
    """Counts them while it is entered. Batches on their way to a GPU are not among them: tests/unit/data/test_prefetch.py.

    Attributes:
        moment: what is being done.
        found: how often the host waited, by moment and by who made it wait, as ``module.function``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moment = ""
        self.found: dict[str, Counter[str]] = {}
        self._methods = ExitStack()

    def __enter__(self) -> Syncs:
        for name in METHODS:
            self._methods.enter_context(mock.patch.object(Tensor, name, self._noting(getattr(Tensor, name))))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._methods.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        masks = (leaf for leaf in tree_leaves(args[1:2]) if isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8))
        if packet in READS or (packet in INDEXING and any(True for _ in masks)):
            self._note()
        return func(*args, **(kwargs or {}))

    def _noting(self, method: Any) -> Any:
        def noted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._note()
            return method(tensor, *args, **kwargs)

        return noted

    def _note(self) -> None:
        self.found.setdefault(self.moment, Counter())[_who()] += 1


def _who() -> str:
    """The innermost function that is neither torch's nor a test's."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] in ("relora_ds", "transformers", "deepspeed"):
            return f"{module}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "nobody known"
