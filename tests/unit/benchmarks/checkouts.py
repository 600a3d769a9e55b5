"""Repositories that offer a layer under the names that those of ReLoRA's authors have."""

from __future__ import annotations

from pathlib import Path

from benchmarks import authors

LAYER = """
import torch
from torch import nn
{imports}

class Layer(nn.Module):
    def __init__(self, base, r, alpha):
        super().__init__()
        self.weight = nn.Parameter(base.weight.detach(), requires_grad=False)
        self.lora_A = nn.Linear(base.in_features, r, bias=False)
        self.lora_B = nn.Linear(r, base.out_features, bias=False)
        self.scaling = alpha / r

    def forward(self, x):
        return x @ self.weight.t() + self.lora_B(self.lora_A(x)) * self.scaling

class {name}(nn.Module):
    def __init__(self, model, *, target_modules, r, lora_alpha, lora_dropout=0.1, {more}):
        super().__init__()
        self.wrapped_model = model
        self.forward = model.forward
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and any(target in path for target in target_modules):
                parent, _, own = path.rpartition(".")
                setattr(model.get_submodule(parent), own, Layer(module, r, lora_alpha))
"""


def checkout(
    folder: Path, *, imports: str = "from loguru import logger", name: str = "ReLoRaModel", more: str = "keep_original_weights"
) -> Path:
    """One whose file has these import lines, this class, and these further arguments."""
    path = folder / authors.FILE
    path.parent.mkdir(parents=True)
    path.write_text(LAYER.format(imports=imports, name=name, more=more))
    return folder
