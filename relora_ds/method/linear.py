"""Two forms of one linear layer, y = x Wᵀ + s·(x Aᵀ) Bᵀ: two products beside W's, or one product with W + s·B·A. PURE.

With b tokens, i inputs, o outputs and rank r, forward and backward:

=======  =======================================  ==============================================================
form     multiplications and additions            beside x, kept for backward
=======  =======================================  ==============================================================
split    4bio + 6br(i + o)                        x Aᵀ, (b, r)
merged   4bio + 4br(i + o) + 4ior, since W + s·B·A  nothing: W + s·B·A and x Aᵀ are formed again
         is formed in each direction
kept     4bio + 4br(i + o), and 2ior once an        nothing, but there is W + s·B·A beside W from the
         update                                     first pass of an update to its end
=======  =======================================  ==============================================================

(RunLoRA, arXiv 2312.03415, counts such forms.) Both write what is as wide as x or y once: the second product is added to the first
one where that stands. No copy of W in another dtype outlives its product.

In fp32 they differ by rounding alone. In 16 bits they do not: W + s·B·A is rounded to the dtype, and half a unit in W's last place
(2⁻⁹ of it in bf16) is more than B·A is worth after a restart. See :func:`choose`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from relora_ds.method.frozen_weights import convert

Form = Literal["split", "merged"]
MARGIN = 1.5
"""So much dearer than its multiplications is forming W + s·B·A: it also reads W and writes as much."""


def choose(dtype: torch.dtype, *, tokens: int, inputs: int, outputs: int, formed: float = 2.0) -> Form:
    """The faster of the forms that lose nothing: ``merged`` in fp32 where enough tokens share W + s·B·A, ``split`` otherwise.

    ``formed`` says how often W + s·B·A is formed for so many tokens: once in each direction, unless it is kept.
    """
    saved, spent = tokens * (inputs + outputs), formed * inputs * outputs
    return "merged" if dtype in (torch.float32, torch.float64) and saved > MARGIN * spent else "split"


def refuse_second_derivatives(way_out: str) -> None:
    """Called in a backward pass that is written out. What it saves is taken for constant: differentiated again, it would be wrong.

    Raises:
        RuntimeError: it runs with ``create_graph=True``. A compiled pass refuses by itself.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"create_graph=True: second derivatives are not formed here; {way_out}")


class Split(torch.autograd.Function):
    """x (b, i), the input of A where dropout makes it another, stored W or None, A (r, i), B (o, r), s, bias (o,) or None -> (b, o).

    ``scale`` is a number, or a tensor of one entry, which is trained.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lowered: Tensor | None, values: Tensor | None, scales: Tensor | None, group_size: int,
        lora_A: Tensor, lora_B: Tensor, scale: Tensor | float, bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        own = x if lowered is None else lowered
        middle = own @ lora_A.t()
        scaled = middle * scale
        if values is None:
            y = F.linear(scaled, lora_B, bias)
        else:
            y = F.linear(x, convert(values, scales, group_size, x.dtype), bias).addmm_(scaled, lora_B.t())
        learns = isinstance(scale, Tensor)
        ctx.save_for_backward(own, middle if learns else scaled, values, scales, lora_A, lora_B, scale if learns else None)
        ctx.group_size, ctx.is_apart, ctx.scale = group_size, lowered is not None, None if learns else scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        refuse_second_derivatives("relora_ds.method.lora.ReLoRALayer.plain gives an ordinary layer")
        own, middle, values, scales, lora_A, lora_B, trained = ctx.saved_tensors
        scale = ctx.scale if trained is None else trained
        narrow = grad @ lora_B
        grad_scale = None if trained is None else (narrow * middle).sum().view_as(trained)
        narrow = narrow * scale
        grad_x = grad_own = None
        if values is not None and ctx.needs_input_grad[0]:
            grad_x = grad @ convert(values, scales, ctx.group_size, grad.dtype)
        if ctx.is_apart:
            grad_own = narrow @ lora_A if ctx.needs_input_grad[1] else None
        elif ctx.needs_input_grad[0]:
            grad_x = narrow @ lora_A if grad_x is None else grad_x.addmm_(narrow, lora_A)
        scaled = middle if trained is None else middle * scale
        grad_bias = grad.sum(0) if ctx.needs_input_grad[8] else None
        return grad_x, grad_own, None, None, None, narrow.t() @ own, grad.t() @ scaled, grad_scale, grad_bias


class Merged(torch.autograd.Function):
    """x (b, i), W + s·B·A or None, stored W, A (r, i), B (o, r), s, bias (o,) or None -> (b, o): one product with W + s·B·A.

    It is formed in the dtype of A, in each direction, where it is not given.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kept: Tensor | None, values: Tensor, scales: Tensor | None, group_size: int,
        lora_A: Tensor, lora_B: Tensor, scale: float, bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, kept, values, scales, lora_A, lora_B)
        ctx.group_size, ctx.scale = group_size, scale
        return F.linear(x, merged_weight(values, scales, group_size, lora_A, lora_B, scale) if kept is None else kept, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        refuse_second_derivatives("relora_ds.method.lora.ReLoRALayer.plain gives an ordinary layer")
        x, kept, values, scales, lora_A, lora_B = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ (merged_weight(values, scales, ctx.group_size, lora_A, lora_B, ctx.scale) if kept is None else kept)
        narrow = (grad @ lora_B).mul_(ctx.scale)
        middle = (x @ lora_A.t()).mul_(ctx.scale)
        grad_bias = grad.sum(0) if ctx.needs_input_grad[8] else None
        return grad_x, None, None, None, None, narrow.t() @ x, grad.t() @ middle, None, grad_bias


def merged_weight(
    values: Tensor,
    scales: Tensor | None,
    group_size: int,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """W + s·B·A, (o, i) in the dtype of A; into ``out`` where one is given."""
    return torch.addmm(convert(values, scales, group_size, lora_A.dtype), lora_B, lora_A, alpha=scale, out=out)


class Kept:
    """W + s·B·A of one layer, formed once for all passes of an update.

    Whoever changes the factors or W, other than by an operation of torch on these very tensors, says so by :meth:`forget`.

    Args:
        passes: of an update, that share it; 0: it is not kept.
    """

    def __init__(self, passes: int = 0) -> None:
        self.passes = passes
        self._whole: Tensor | None = None
        self._versions: tuple[int, ...] | None = None

    @property
    def formed(self) -> float:
        """How often W + s·B·A is formed in a pass; see :func:`choose`."""
        return 1 / self.passes if self._is_kept() else 2.0

    def _is_kept(self) -> bool:
        """A compiled block keeps nothing: it is no part of a graph."""
        return self.passes > 0 and not torch.compiler.is_compiling()

    def get(
        self, values: Tensor, scales: Tensor | None, group_size: int, lora_A: Tensor, lora_B: Tensor, scale: float
    ) -> Tensor | None:
        """(o, i) in the dtype of A; None where a pass is to form its own: passes that do not train keep nothing."""
        if not self._is_kept() or not torch.is_grad_enabled():
            return None
        versions = tuple(tensor._version for tensor in (values, scales, lora_A, lora_B) if tensor is not None)
        if self._whole is None or self._versions != versions:
            with torch.no_grad():
                self._whole = merged_weight(values, scales, group_size, lora_A, lora_B, scale, out=self._whole)
            self._versions = versions
        return self._whole

    def forget(self) -> None:
        """The next pass that trains forms it anew, in its place."""
        self._versions = None
