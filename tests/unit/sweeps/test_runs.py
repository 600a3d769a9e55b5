"""Where runs stand, by folders made by hand, and their figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from relora_ds.errors import ConfigError, DivergedError
from relora_ds.run.lock import RunLock
from relora_ds.slurm import client
from relora_ds.slurm.events import Events as JobEvents
from relora_ds.slurm.events import write_outcome
from relora_ds.sweeps.events import Events
from relora_ds.sweeps.outlook import outlook
from relora_ds.sweeps.runs import figures, standing
from relora_ds.sweeps.submit import submit_all
from relora_ds.sweeps.sweep_file import Sweep
from relora_ds.sweeps.train import check
from tests.unit.slurm.test_commands import RUNNING
from tests.unit.sweeps.conftest import make_done, make_run


def test_a_run_without_a_folder_is_not_begun_or_failed(sweep: Sweep) -> None:
    run, events = sweep.runs[0], Events(sweep.folder)
    assert standing(run, events).state == "not begun"
    sweep.folder.mkdir()
    events.add(run.name, "failed", code=2, error="refused")
    at = standing(run, events)
    assert (at.state, at.error, at.is_settled) == ("failed", "refused", False), "it is tried again"


def test_done_by_the_last_checkpoint(sweep: Sweep, read: Callable[..., Sweep]) -> None:
    run, events = sweep.runs[0], Events(sweep.folder)
    make_done(run, 20.0)
    at = standing(run, events)
    assert (at.state, at.update, at.is_settled) == ("done", 20, True)
    longer = read(overrides={"train.updates": 40}).runs[0]
    assert standing(longer, events).state == "stopped", "and goes on"
    other = read(overrides={"relora.rank": 2}).runs[0]
    at = standing(other, events)
    assert (at.state, at.is_settled) == ("changed", False), "train refuses it, and says why"
    events.add(run.name, "failed", code=2, error="relora.rank=2: the run has 4")
    assert standing(other, events).error == "relora.rank=2: the run has 4"


def test_a_run_of_more_updates_than_the_file_asks_for_is_not_done(sweep: Sweep, read: Callable[..., Sweep]) -> None:
    make_done(sweep.runs[0], 20.0)
    shorter = read(overrides={"train.updates": 18})
    events = Events(sweep.folder)
    at = standing(shorter.runs[0], events)
    assert (at.state, at.update) == ("changed", 20) and at.error.startswith("lora/seed-1 was trained for 20 updates")
    assert list(outlook(shorter, {shorter.runs[0]: at}, 1))[1].split()[2:4] == ["0", "0"], "no fewer than none are left"
    for start in (
        lambda: check(shorter, shorter.runs),
        lambda: submit_all(shorter, [], insisted=[], say=lambda line: None),
    ):
        with pytest.raises(
            ConfigError, match=r"^arms\.lora: updates=18: .* 20 updates .*; remove .*seed-1, or name another arm$"
        ):
            start()


def test_killed_and_stopped_runs_go_on(sweep: Sweep) -> None:
    run = sweep.runs[0]
    make_run(run, update=5, losses=[3.0] * 7)
    events = Events(sweep.folder)
    for state in ("running", "stopped"):
        events.add(run.name, state)
        at = standing(run, events)
        assert (at.state, at.update, at.is_settled) == ("stopped", 5, False)


def test_a_run_whose_folder_is_in_use_runs(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    run = sweep.runs[0]
    make_run(run, update=0, losses=[3.0])
    monkeypatch.setattr(RunLock, "holder", lambda self: "someone")
    at = standing(run, Events(sweep.folder))
    assert at.state == "running" and at.is_settled


def test_what_diverged_is_settled(sweep: Sweep) -> None:
    first, events = sweep.runs[0], Events(sweep.folder)
    make_run(first, update=0, losses=[3.0, 2.9])
    events.add(first.name, "diverged", code=1, error="the weights are not finite")
    assert standing(first, events).is_settled, "it would diverge once more"
    first.folder.path.rename(sweep.folder / "aside")
    assert standing(first, events).state == "not begun", "its folder was removed, to begin anew"


def test_jobs_of_slurm(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    run, events = sweep.runs[0], Events(sweep.folder)
    there = {"job": replace(RUNNING, state="PENDING")}
    monkeypatch.setattr(client, "job", lambda number, cluster: there["job"])
    jobs = JobEvents(run.folder)
    jobs.add("submitted", job=17)
    assert standing(run, events).state == "queued" and standing(run, events).is_settled
    there["job"] = RUNNING
    assert standing(run, events).state == "running"
    there["job"] = None
    assert standing(run, events).state == "not begun", "cancelled before it began"
    make_run(run, update=5, losses=[3.0] * 6)
    assert standing(run, events).state == "stopped"
    jobs.add("ended", job=17, attempt="17.0", code=1, decision="stop")
    at = standing(run, events)
    assert at.state == "failed" and at.error.startswith("job 17 ended with code 1")
    write_outcome(run.folder, "17.0", 1, str(DivergedError("the weights are not finite since update 5")))
    assert standing(run, events).state == "diverged", "by the ranks' own word"
    jobs.add("ended", job=17, attempt="17.1", code=75, decision="slurm")
    assert standing(run, events).state == "stopped"


def test_what_a_run_did_here_since_its_job_counts(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose job was cancelled was trained here, and failed: it is not stopped, and its error is told."""
    run, events = sweep.runs[0], Events(sweep.folder)
    monkeypatch.setattr(client, "job", lambda number, cluster: None)
    make_run(run, update=5, losses=[3.0] * 6)
    jobs = JobEvents(run.folder)
    jobs.add("submitted", job=17)
    jobs.add("cancelled", job=17)
    assert standing(run, events).state == "stopped"
    events.add(run.name, "failed", code=1, error="no disk")
    at = standing(run, events)
    assert (at.state, at.error) == ("failed", "no disk")
    later = jobs.path.read_text() + json.dumps({"event": "submitted", "time": "2999-01-01T00:00:00+00:00", "job": 18}) + "\n"
    jobs.path.write_text(later)
    assert standing(run, events).state == "stopped", "by a job that came later"


def test_figures_of_a_folder(sweep: Sweep) -> None:
    run, other = sweep.runs[:2]
    make_run(run, update=4, losses=[3.0] * 4, perplexity=21.5)
    found = figures(run)
    assert (found.update, found.perplexity, found.trainable_parameters) == (4, 21.5, 640), "of the newest start"
    assert (found.tokens, found.seconds) == (4 * 128, 4 * 1.28)
    assert (found.sent_bytes, found.sent_bytes_per_update) == (4010, 1002.5)
    assert found.seconds_per_update == pytest.approx(1.28)
    nothing = figures(other)
    assert nothing.update == 0 and nothing.perplexity != nothing.perplexity, "not known"
