"""Weights that are no numbers are found, wherever they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from relora_ds.config import Frozen
from relora_ds.method import lora
from relora_ds.models.finite import not_finite


def model(dtype: torch.dtype = torch.float32, **how: object) -> nn.Module:
    layers = nn.ModuleDict({"proj": nn.Linear(8, 8, dtype=dtype), "norm": nn.LayerNorm(8, dtype=dtype)})
    layers.register_buffer("mask", torch.full((4, 4), float("-inf")))
    return lora.wrap(layers, rank=2, alpha=4, targets="proj", **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["proj.bias", "proj.lora_A", "norm.weight"])
def test_a_trained_weight(dtype: torch.dtype, value: float, name: str) -> None:
    layers = model(dtype)
    assert not_finite(layers) is None, "a mask may hold infinities"
    layers.get_parameter(name).data.view(-1)[3] = value
    assert not_finite(layers) == name


@pytest.mark.parametrize(
    ("dtype", "buffer", "name"), [("bf16", "values", "proj.weight"), ("int8", "scales", "proj.weight.scales")]
)
def test_a_frozen_weight(dtype: str, buffer: str, name: str) -> None:
    layers = model(frozen=Frozen(dtype=dtype, group_size=8))  # type: ignore[arg-type]
    assert not_finite(layers) is None
    getattr(layers["proj"].weight, buffer)[1, 0] = float("nan")  # type: ignore[index]
    assert not_finite(layers) == name
