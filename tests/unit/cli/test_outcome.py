"""What a rank leaves for the batch script of its SLURM job, since launchers change exit codes on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest

from relora_ds import environment
from relora_ds.checkpoint.universal import ConversionError
from relora_ds.checkpoint.writer import FencedError
from relora_ds.cli.main import main
from relora_ds.errors import AllError, ConfigError, RankError, StartError
from relora_ds.launch import places, process_group
from relora_ds.run.folder import RunFolder
from relora_ds.slurm.events import read_outcome
from relora_ds.supervision import faults
from relora_ds.training import loop as train


def start(place: places.Place, timeout_s: float = 0.0, refusal: ConfigError | None = None) -> tuple[places.Place, None]:
    """Stands where the ranks meet: what this one refuses, all do."""
    if refusal is not None:
        raise AllError(str(refusal))
    return place, None


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the only rank of the first start of job 17, and joins no process group."""
    monkeypatch.setattr(places, "discover", lambda: places.single())
    monkeypatch.setattr(environment, "attempt", lambda: "17.0")
    monkeypatch.setattr(process_group, "start", start)
    monkeypatch.setattr(process_group, "leave", lambda: None)


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
    monkeypatch.setattr(environment, "attempt", lambda: "")
    monkeypatch.setattr(train, "train", lambda *_: 0)
    assert main(["train", str(recipe)]) == 0
    assert not run.path.exists()


FAULT = "rank 3 on node2: data.path='/data': is not there"


def ends_the_start(error: Exception, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is one of four ranks, of which the start raises this."""

    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr(places, "discover", lambda: places.Place(number, 4, 0, 1, "node1", 29500, "srun"))
    monkeypatch.setattr(process_group, "start", fail)


@pytest.mark.usefixtures("rank")
@pytest.mark.parametrize(("number", "num_faults"), [(0, 1), (3, 0)], ids=["rank 0", "another"])
def test_what_some_ranks_refuse_is_a_fault_and_no_outcome(
    recipe: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch, number: int, num_faults: int
) -> None:
    run.path.mkdir()
    ends_the_start(RankError(3, "node2", "data.path='/data': is not there"), number, monkeypatch)
    assert main(["train", str(recipe)]) == 2
    assert read_outcome(run, "17.0") is None
    told = [(f["kind"], f["rank"], f["host"], f["detail"]) for f in faults.read(run.path, "17.0")]
    assert told == [("refusal", 3, "node2", FAULT)] * num_faults


@pytest.mark.usefixtures("rank")
def test_ranks_that_do_not_come_together_are_a_fault(
    recipe: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run.path.mkdir()
    ends_the_start(StartError("ranks 2, 3 of 4 did not come to the start", "node2"), 0, monkeypatch)
    assert main(["train", str(recipe)]) == 1
    assert capfd.readouterr().err.endswith("relora-ds: error: ranks 2, 3 of 4 did not come to the start\n")
    ends_the_start(RuntimeError("The client socket has timed out"), 1, monkeypatch)
    monkeypatch.setattr(environment, "node_name", lambda: "node1")
    with pytest.raises(RuntimeError):
        main(["train", str(recipe)])
    told = [(f["kind"], f["rank"], f["host"], f["detail"]) for f in faults.read(run.path, "17.0")]
    assert told == [
        ("error", None, "node2", "ranks 2, 3 of 4 did not come to the start"),
        ("error", 1, "node1", "RuntimeError: The client socket has timed out"),
    ]
    assert read_outcome(run, "17.0") is None


@pytest.mark.usefixtures("rank")
def test_what_one_rank_refuses_in_the_middle_is_its_own(
    recipe: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run.path.mkdir()
    monkeypatch.setattr(places, "discover", lambda: places.Place(3, 4, 0, 1, "node1", 29500, "srun"))
    monkeypatch.setattr(process_group, "node_name", lambda: "node2")

    def ends(*_: object) -> NoReturn:
        raise ConfigError("data.path", "/data", "is not there")

    monkeypatch.setattr(train, "train", ends)
    assert main(["train", str(recipe)]) == 2
    assert capfd.readouterr().err.endswith(f"relora-ds: error: {FAULT}\n")
    assert read_outcome(run, "17.0") is None
    assert [(f["kind"], f["host"], f["detail"]) for f in faults.read(run.path)] == [("refusal", "node2", FAULT)]
