"""torch.compile, block by block: what every pass does beside matrix products comes in fewer and larger pieces.

A block is a member of a model's outermost module lists. All blocks of one class share what was compiled for the first: their weights
are inputs of it, so neither restarts, which change weights in place, nor checkpoints, whose names stay, know of it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._triton import has_triton, has_triton_package

from relora_ds.config import Switch
from relora_ds.models.weights import blocks


def obstacle(device: torch.device) -> str | None:
    """What torch.compile lacks for a kind of device; None where it has all. Starts no CUDA."""
    if device.type == "cuda":
        return None if has_triton_package() else "Triton is not installed"
    from torch._inductor.cpp_builder import get_cpp_compiler  # half of the compiler comes with it
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler"
    return None


def is_wanted(choice: Switch, device: torch.device) -> bool:
    """``auto``: on CUDA, where Triton is there to compile for it."""
    return device.type == "cuda" and has_triton() if choice == "auto" else choice


def compile_blocks(model: nn.Module, backend: str = "inductor") -> int:
    """Compiles the blocks of ``model`` when they are first called; returns how many there are.

    What was compiled before, for blocks that are other ones now, is forgotten first.
    """
    torch.compiler.reset()
    found = blocks(model)
    for _, block in found:
        block.compile(backend=backend)
    return len(found)
