"""PURE: which modules multiply by the weight of a layer in them by themselves, past its forward pass, in which alone factors are."""

from __future__ import annotations

import functools
import inspect
import re

from torch import nn


def multiplies_itself(owner: nn.Module, layer: nn.Module) -> bool:
    """Whether ``owner`` forms a product with the weight of a linear layer in it, as Mamba does with its dt_proj.

    Told by the source of its class: a forward pass cannot be tried without knowing what goes in.
    """
    if isinstance(owner, nn.MultiheadAttention):  # whose one linear layer goes into a function with all its other weights
        return True
    names = "|".join(re.escape(name) for name, child in owner.named_children() if child is layer)
    weight = rf"\bself\.({names})\.weight\b"
    product = re.compile(rf"@\s*{weight}|{weight}\s*@|\blinear\(.*{weight}(?!\[|\.dtype|\.device)")
    return bool(names) and any(product.search(_source(kind)) for kind in type(owner).__mro__ if kind not in nn.Module.__mro__)


@functools.cache
def _source(kind: type) -> str:
    """Of a class; empty where there is none, as of one that was typed into an interpreter."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""
