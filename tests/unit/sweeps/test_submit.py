"""What is submitted to SLURM, and what is not."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

from relora_ds.slurm import client
from relora_ds.slurm.events import Events as JobEvents
from relora_ds.sweeps import submit
from relora_ds.sweeps.submit import submit_all
from relora_ds.sweeps.sweep_file import Sweep
from tests.unit.slurm.test_commands import RUNNING
from tests.unit.sweeps.conftest import make_done


def test_what_is_done_or_queued_is_not_submitted(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    done, queued, first, second = sweep.runs
    make_done(done, 20.0)
    JobEvents(queued.folder).add("submitted", job=17)
    monkeypatch.setattr(client, "job", lambda number, cluster: RUNNING)
    calls: list[list[str]] = []

    def run(words: list[str], **_: object) -> SimpleNamespace:
        calls.append(words)
        return SimpleNamespace(returncode=2 if len(calls) == 1 else 0)

    monkeypatch.setattr(submit.subprocess, "run", run)
    told: list[str] = []
    code = submit_all(sweep, ["--nodes", "2", "--tasks-per-node", "1"], insisted=["--trust"], say=told.append)
    assert code == 1, "one was refused, and the other submitted all the same"
    assert told == ["lora/seed-1 is done", "relora/seed-1 is running", "lora/seed-2 is not submitted"]
    assert subprocess.run is run
    for run_, words in zip((first, second), calls, strict=True):
        assert words[1:6] == ["-m", "relora_ds", "slurm", "submit", str(sweep.recipes[0])]
        assert set(run_.words) < set(words)
        assert words[-6:] == [f"--job-name=sweep.{run_.arm}.2", "--nodes", "2", "--tasks-per-node", "1", "--trust"]
