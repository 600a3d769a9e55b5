"""What a rank leaves for the batch script of its SLURM job, since launchers change exit codes on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from relora_ds import launch, train
from relora_ds.cli import main
from relora_ds.elastic import ConversionError
from relora_ds.errors import ConfigError
from relora_ds.run_folder import RunFolder
from relora_ds.saver import FencedError
from relora_ds.slurm_events import read_outcome


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the only rank of the first start of job 17, and joins no process group."""
    monkeypatch.setattr(launch, "discover", lambda: launch.single())
    monkeypatch.setattr(launch, "attempt", lambda: "17.0")
    monkeypatch.setattr(launch, "start_process_group", lambda *_, **__: None)
    monkeypatch.setattr(launch, "leave_process_group", lambda: None)


@pytest.mark.usefixtures("rank")
@pytest.mark.parametrize(
    ("end", "code", "told"),
    [
        (0, 0, 0),
        (75, 75, 75),
        (train.TrainingError("too many updates were skipped"), 1, 1),
        (ConfigError("run.dir", "a", "in use"), 2, 2),
        (ConversionError("no space left"), 1, None),  # the next start may convert
        (FencedError("taken over"), 1, None),  # what lies there is another start's
    ],
)
def test_what_the_script_is_told(
    end: Any, code: int, told: int | None, recipe: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(*_: object) -> int:
        if isinstance(end, Exception):
            raise end
        return int(end)

    monkeypatch.setattr(train, "train", ends)
    assert main(["train", str(recipe)]) == code
    assert read_outcome(run, "17.0") == told


@pytest.mark.usefixtures("rank")
def test_a_rank_that_refuses_its_recipe_says_so(recipe: Path, run: RunFolder) -> None:
    assert main(["train", str(recipe), "relora.rank=1000"]) == 2
    assert read_outcome(run, "17.0") == 2


@pytest.mark.usefixtures("rank")
def test_nothing_is_told_outside_of_jobs(recipe: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "attempt", lambda: "")
    monkeypatch.setattr(train, "train", lambda *_: 0)
    assert main(["train", str(recipe)]) == 0
    assert not run.path.exists()
