"""torch.compile, block by block: what every pass does beside matrix products comes in fewer and larger pieces.

A block is a member of a model's outermost module lists. All blocks of one class share what was compiled for the first: their weights
are inputs of it, so neither restarts, which change weights in place, nor checkpoints, whose names stay, know of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn
from torch.utils._triton import has_triton

Compile = bool | Literal["auto"]


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost module lists of ``model``."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from blocks(child)


def is_wanted(choice: Compile, device: torch.device) -> bool:
    """``auto``: on CUDA, where Triton is there to compile for it."""
    return device.type == "cuda" and has_triton() if choice == "auto" else choice


def compile_blocks(model: nn.Module, backend: str = "inductor") -> int:
    """Compiles the blocks of ``model`` when they are first called; returns how many there are.

    What was compiled before, for blocks that are other ones now, is forgotten first.
    """
    torch.compiler.reset()
    found = list(blocks(model))
    for block in found:
        block.compile(backend=backend)
    return len(found)
