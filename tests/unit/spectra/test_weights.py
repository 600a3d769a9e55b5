"""The parts of a weight, what a change of them is, and the rank that factors allow it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from relora_ds.errors import ConfigError
from relora_ds.method.lora import ReLoRALinear, relora_layers
from relora_ds.models.export import model_beside_base
from relora_ds.spectra.weights import CheckpointWeights, RunWeights, Weights, change


class Fixed(Weights):
    """Weights of one layer that are given."""

    def __init__(self, stored: Tensor | None, product: Tensor | None = None, spacing: float = 0.0, **more: Any) -> None:
        super().__init__(0, None)
        self.parts = None if stored is None else (stored, spacing), product
        self.__dict__.update(more)

    def stored(self, name: str) -> tuple[Tensor, float] | None:
        return self.parts[0]

    def product(self, name: str) -> Tensor | None:
        return self.parts[1]


def test_a_small_product_is_not_rounded_off_by_a_large_weight() -> None:
    weight, product = torch.full((3, 2), 1000.0), torch.full((3, 2), 1e-7)
    found, noise = change(Fixed(weight), Fixed(weight, product), "layer")
    assert torch.equal(found, product) and noise == 0.0
    assert torch.equal(weight, torch.full((3, 2), 1000.0)), "what was read may be the file itself"


def test_all_parts_of_a_change_count() -> None:
    parts = [torch.full((3, 2), value) for value in (1.0, 0.5, 4.0, 0.25)]
    found, _ = change(Fixed(*parts[:2]), Fixed(*parts[2:]), "layer")
    assert torch.equal(found, torch.full((3, 2), 2.75))
    alone, _ = change(Fixed(None, parts[1]), Fixed(None, parts[3]), "layer")
    assert torch.equal(alone, torch.full((3, 2), -0.25)), "without frozen weights"


def test_rounding_counts_once_a_restart_and_for_both_ends_at_full_rank() -> None:
    before, weight = Fixed(torch.ones(9, 16), spacing=0.1), torch.ones(9, 16)
    for more, roundings in (({"restarts": 3}, 3), ({"is_full": True}, 2), ({}, 0)):
        _, noise = change(before, Fixed(weight, spacing=0.2, **more), "layer")
        assert noise == pytest.approx(0.2 * (roundings / 12) ** 0.5 * (3 + 4))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "wrapped"])
def test_a_checkpoints_layer_is_read_out_in_fp32(kind: str) -> None:
    linear: nn.Module = Conv1D(5, 3) if kind == "conv1d" else nn.Linear(3, 5)
    layer = linear.to(torch.bfloat16)
    expected = layer.weight.detach().float().t() if kind == "conv1d" else layer.weight.detach().float()
    weights = CheckpointWeights.__new__(CheckpointWeights)
    weights.base, weights.has_factors = None, kind == "wrapped"
    weights.layers = {"layer": ReLoRALinear(layer, 2, 4.0) if kind == "wrapped" else layer}
    found = weights.stored("layer")
    assert found is not None and found[0].dtype == torch.float32 and torch.equal(found[0], expected)
    assert found[1] == pytest.approx(2**-7 * float(expected.square().mean().sqrt()))
    if kind == "wrapped":
        nn.init.ones_(weights.layers["layer"].lora_A)
        nn.init.ones_(weights.layers["layer"].lora_B)
        assert torch.equal(weights.product("layer"), torch.full((5, 3), 4.0)), "alpha / rank times the rank"
    else:
        assert weights.product("layer") is None


def test_the_rank_that_factors_allow(good: Path) -> None:
    """Of rank 4, from the start of the phase and from elsewhere."""
    run = RunWeights(good / "run")
    start = run.start()
    assert (start.update, start.restarts, start.has_factors, len(start.names())) == (0, 0, False, 14)
    later = Fixed(None, restarts=3)
    assert run.bound(start, run.at(2, "--to")) == 4
    assert run.bound(start, later) == 16
    assert run.bound(run.at(2, "--from"), later) == 20, "B·A then and B·A at the end of that interval are two products"
    assert run.bound(start, Fixed(None, is_full=True)) is None
    assert run.bound(Fixed(None, is_full=True, update=-1), later) is None
    residual = run.config.relora.model_copy(update={"init": "residual"})
    run.config = run.config.model_copy(update={"relora": residual})
    assert run.bound(start, later) == 32
    assert run.bound(run.at(2, "--from"), later) == 32, "such a product is one of twice the rank in any interval"


def test_factors_right_behind_a_restart_add_no_rank(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B is 0 in the checkpoint: what follows is one product, not the difference of two."""

    def restarted(*given: Any, **more: Any) -> nn.Module:
        model = model_beside_base(*given, **more)
        for _, layer in relora_layers(model):
            nn.init.zeros_(layer.lora_B)
        return model

    monkeypatch.setattr("relora_ds.spectra.weights.model_beside_base", restarted)
    run = RunWeights(good / "run")
    assert run.bound(run.at(2, "--from"), Fixed(None)) == 4


def test_without_frozen_weights_no_first_base_is_asked_for(place: Path) -> None:
    """B·A alone begins at random, and a base/ never holds it: what keeps such a start is a checkpoint."""
    run = RunWeights(place / "run")
    run.config = run.config.model_copy(update={"method": "low_rank"})
    assert list(run.updates) == [2]
    shutil.rmtree(place / "run" / "base")
    with pytest.raises(ConfigError, match=r"compare checkpoints with --from \(2\), and set train\.keep_every in the next run"):
        run.start()
