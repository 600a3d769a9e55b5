"""What is asked of a machine when matrices are multiplied, seen at the dispatcher: the same on every machine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten
FACTORS = {aten.mm: 0, aten.bmm: 0, aten.mv: 0, aten.dot: 0, aten.addmm: 1, aten.baddbmm: 1, aten.addbmm: 1, aten.addmv: 1}
"""Operations that sum products, and where among their arguments the two factors begin."""


def counter() -> FlopCounterMode:
    """torch's counter of floating-point operations; it knows addmm, but not that in place."""
    return FlopCounterMode(display=False, custom_mapping={aten.addmm_: _added_product})


def _added_product(_into: tuple[int, int], left: tuple[int, int], right: tuple[int, int], **_: object) -> int:
    return 2 * left[0] * left[1] * right[1]


class Operations(TorchDispatchMode):
    """Counts what a GPU would be launched for: every operation but those that only look at a tensor in another way.

    Attributes:
        num: operations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += not func.is_view
        return func(*args, **(kwargs or {}))


class ExactProducts(TorchDispatchMode):
    """Fails where a product is asked for whose sums may round, so that its bits may depend on who forms it, and how.

    A sum in fp64 is exact in any order if its terms are whole numbers and their magnitudes come to 2**53 at most. Products in
    other dtypes may also be formed in TF32 or bf16, as the user's switches say.

    Attributes:
        num: products so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begin = FACTORS.get(func.overloadpacket)
        if begin is not None:
            self.num += 1
            _check(*args[begin : begin + 2])
        return func(*args, **(kwargs or {}))


def _check(left: Tensor, right: Tensor) -> None:
    for factor in (left, right):
        assert factor.dtype == torch.float64, f"a product of {factor.dtype}, {tuple(left.shape)} x {tuple(right.shape)}"
        assert torch.equal(factor, factor.round()), f"{tuple(left.shape)} x {tuple(right.shape)}: not of whole numbers"
    if left.numel() and right.numel():
        assert float((left.abs() @ right.abs()).max()) <= 2.0**53, f"{tuple(left.shape)} x {tuple(right.shape)}: sums may round"
