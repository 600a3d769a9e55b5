"""Means over layers, kinds of layers, and the picture of a kind."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import pytest
import torch

from relora_ds.errors import ConfigError
from relora_ds.reports.drawing import svg
from relora_ds.spectra import drawing
from relora_ds.spectra.changes import Change, Figures, LayerChange, RunChanges, changes_of
from relora_ds.spectra.spectrum import Spectrum
from tests.unit.spectra.test_weights import Fixed


def layer(name: str, values: list[float], bound: int | None = None, side: int | None = None, error: float = 0.0) -> LayerChange:
    tensor = torch.tensor(values)
    spectrum = Spectrum(tensor, side or len(values), float(tensor.norm()), error, noise=1e-3)
    return LayerChange(f"model.layers.{name}", (len(values), 9), bound, spectrum)


@pytest.fixture
def change() -> Change:
    layers = [
        layer("0.self_attn.q_proj", [1.0, 1.0, 0.05, 0.0], bound=2),
        layer("0.mlp.up_proj", [0.5, 0.0], bound=2),
        layer("1.self_attn.q_proj", [4.0, 0.0], bound=4, side=8, error=0.2),
    ]
    return Change(before=5, now=20, restarts=1, layers=layers)


def test_kinds_are_the_last_parts_of_the_names_in_model_order(change: Change) -> None:
    assert change.kinds() == ["q_proj", "up_proj"]
    assert [one.name for one in change.of_kind("q_proj")] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    ]


def test_figures_are_means_and_the_error_is_the_largest(change: Change) -> None:
    found = Figures.of(change.of_kind("q_proj"))
    assert (found.num_layers, found.bound, found.above_noise, found.largest, found.error) == (2, 3.0, 2.0, 2.5, 0.2)
    assert found.below_small == pytest.approx((2 / 4 + 7 / 8) / 2), "the values that a sketch left out are small"
    assert found.stable_rank == pytest.approx((2.0025 + 1) / 2)
    assert Figures.of([layer("0.q_proj", [1.0])]).bound is None


@pytest.mark.parametrize("with_earlier", [False, True])
def test_a_picture_of_runs_of_other_sizes_and_of_no_change(change: Change, tmp_path: Path, with_earlier: bool) -> None:
    none = Change(5, 10, 0, [layer("0.self_attn.q_proj", [0.0, 0.0], bound=2)])
    full = Change(5, 20, 0, [layer("0.self_attn.q_proj", [2.0, 1.0, 0.5])])
    runs = [RunChanges("a", "relora", change, [none] * with_earlier), RunChanges("$b", "full", full)]
    block = drawing.panels(1, "q_proj", runs)
    drawing.draw(tmp_path / "picture.png", block)
    pixels = matplotlib.image.imread(tmp_path / "picture.png")
    assert pixels.std() > 0 and pixels.shape[1] == (1950 if with_earlier else 1300)
    assert len({picture.name for picture in block.pictures}) == len(block.pictures) == 2 + with_earlier
    assert all("<svg" in svg(picture) for picture in block.pictures)
    drawing.draw(tmp_path / "none.png", drawing.panels(1, "q_proj", [RunChanges("none", "lora", none)]))
    assert matplotlib.image.imread(tmp_path / "none.png").std() > 0


def test_weights_of_a_run_that_diverged_are_refused_in_one_line() -> None:
    whole = torch.ones(3, 2)
    spoilt = whole.clone()
    spoilt[1, 1] = torch.nan
    run: Any = SimpleNamespace(
        config=SimpleNamespace(has_lora_phase=True, full_updates=1, method="relora"), updates={5: None}, bound=lambda *_: None,
        start=lambda: Fixed(whole), at=lambda update, option: Fixed(spoilt, names=lambda: ["model.layers.0.q_proj"]),
    )  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"^--to=0: bad had diverged: what model.layers.0.q_proj changed by .* earlier checkpoint$"
    ):
        changes_of(run, "bad", before=None, now=None)
