"""The recipes and DeepSpeed files of this project."""

from __future__ import annotations

from pathlib import Path

import pytest

from relora_ds import config
from relora_ds.ds_config import fit as ds_config
from relora_ds.sweeps.sweep_file import read_sweep
from tests.unit.test_config import judge

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda path: path.name)
def test_the_recipes_of_this_project_are_valid(path: Path) -> None:
    recipe = config.load(path)
    ds_config.refuse_unsupported(ds_config.read(recipe.deepspeed, path.parent, path.parent.parent))


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda path: path.name)
def test_the_last_interval_of_the_recipes_is_whole(path: Path) -> None:
    """A restart just before the end would only cost: its factors could learn nothing. The demo's last one has 160 of 180 updates."""
    recipe = config.load(path)
    updates = recipe.total_updates - recipe.full_updates
    last = recipe.relora.restarts.newest(updates)
    assert 0.88 * recipe.relora.restart_every <= updates - last <= recipe.relora.restart_every
    assert recipe.short_last_interval() is None


@pytest.mark.parametrize("path", sorted(ROOT.glob("ds_configs/*.json")), ids=lambda path: path.name)
def test_the_deepspeed_files_of_this_project_are_valid(path: Path, recipe: Path) -> None:
    checked = judge(recipe, f"deepspeed={path}", ranks=2)
    if "bf16" in path.name:
        assert ds_config.precision(checked.deepspeed) == "bf16"
        assert checked.deepspeed["bf16"]["check_grad_overflow"] is True


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/sweeps/*.yaml")), ids=lambda path: path.name)
def test_the_sweeps_of_this_project_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)  # the recipe is found from anywhere
    sweep = read_sweep(path)
    assert {recipe.resolve().parent for recipe in sweep.recipes} == {ROOT / "recipes"} and len(sweep.arms) > 1
    asks_when = path.stem == "when_small"  # its question is what a late restart costs
    for run in sweep.runs:
        assert asks_when or run.config.short_last_interval() is None
