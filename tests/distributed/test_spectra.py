"""Changes of weights that two ranks trained, read from stores that round and from the sharded master behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from relora_ds.checkpoint import base as bases
from relora_ds.method.frozen_weights import FrozenWeight
from relora_ds.run.folder import RunFolder
from relora_ds.spectra.changes import RunChanges, changes_of
from relora_ds.spectra.weights import RunWeights
from tests.distributed.pool import run
from tests.distributed.test_training import at, train_here

RANK = 4
SIDE = 32


def trained(content: dict[str, Any], folder: Path, **sections: dict[str, Any]) -> RunChanges:
    """The changes from the start of the LoRA phase to the checkpoints after 6, 9, 12, 15 and 18 updates: 0, 1, 2, 2, 3 restarts."""
    for section, values in sections.items():
        content[section] = {**content.get(section, {}), **values}
    run(2, train_here, at(content, folder))
    return changes_of(RunWeights(folder), "run", before=None, now=None, every=True)


def numbers(changes: RunChanges) -> list[list[int]]:
    """Of each checkpoint, the different numbers of values above noise."""
    return [sorted({layer.spectrum.num_above_noise for layer in change.layers}) for change in changes.all]


@pytest.mark.parametrize("contained", [False, True])
def test_the_start_is_in_a_base_or_in_a_checkpoint_that_holds_all(
    content: dict[str, Any], tmp_path: Path, contained: bool
) -> None:
    content["train"]["checkpoint_every"] = 6
    found = trained(content, tmp_path / "run", checkpoint={"self_contained": contained})
    assert [(change.before, change.now, change.restarts) for change in found.all] == [(4, 6, 0), (4, 12, 2), (4, 18, 3)]
    # The restart after update 12 is in its checkpoint, and its fresh factors are still zero.
    assert numbers(found) == [[RANK], [2 * RANK], [4 * RANK]]
    assert [change.layers[0].bound for change in found.all] == [RANK, 3 * RANK, 4 * RANK]


def test_the_sharded_master_is_read_and_not_what_int8_leaves_of_it(content: dict[str, Any], tmp_path: Path) -> None:
    frozen = {"dtype": "int8", "group_size": 16, "master": "sharded"}
    found = trained(content, tmp_path / "run", relora={"frozen": frozen})
    assert numbers(found) == [[RANK], [RANK], [2 * RANK], [3 * RANK], [4 * RANK]], "the learning rate of update 9 is 0"
    base = bases.Base(bases.folder_of(RunFolder(tmp_path / "run"), 3))
    for name, layer in base.layers.items():
        master, step = base.exact(name)
        state = {key.rpartition(".")[2]: value for key, value in base.state().items() if key.startswith(f"{name}.")}
        rounded = FrozenWeight.exact(state["values"], state["scales"], 16)
        assert list(master.shape) == layer["shape"] and 0 < (master - rounded).abs().max() <= state["scales"].max()
        assert float(step) < 1e-4 * float(state["scales"].mean())


def test_residual_factors_count_from_where_they_began(content: dict[str, Any], tmp_path: Path) -> None:
    """Their first product is in the master already; each interval changes the weight by the product at its end less that.

    The first base comes with a checkpoint after update 5, whose learning rate is 0."""
    frozen = {"dtype": "int8", "group_size": 16, "master": "sharded"}
    found = trained(content, tmp_path / "run", relora={"frozen": frozen, "init": "residual"}, train={"keep_first_base": True})
    unchanged, *others = found.all
    assert unchanged.now == 5 and len(others) == 5
    weights = RunWeights(tmp_path / "run").at(5, "--to")
    for layer in unchanged.layers:
        assert weights.base is not None
        held = weights.base.held(layer.name)
        assert held is not None and layer.spectrum.norm < 1e-5 * float(held.norm())
    for change in others:
        bound = min(2 * RANK * (change.restarts + 1), SIDE)
        assert all(layer.bound == bound >= layer.spectrum.num_above_noise for layer in change.layers)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_what_rounding_adds_is_told_from_what_was_trained(content: dict[str, Any], tmp_path: Path, dtype: str) -> None:
    """A coarse store without a master: every merge leaves a matrix of full rank, which does not count."""
    found = trained(content, tmp_path / "run", relora={"frozen": {"dtype": dtype, "group_size": 16}})
    assert numbers(found)[0] == [RANK], "nothing is rounded before the first restart"
    for change in found.all[1:]:
        for layer in change.layers:
            assert layer.bound is not None and layer.spectrum.num_above_noise <= layer.bound
            assert float(layer.spectrum.values[-1]) > 0 and layer.spectrum.noise > 1e-4 * layer.spectrum.largest
