"""The loop over runs, with a script in the place of ``relora-ds train``."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from relora_ds.errors import ConfigError, DivergedError
from relora_ds.run.lock import RunLock
from relora_ds.sweeps import train
from relora_ds.sweeps.events import Events
from relora_ds.sweeps.runs import standing
from relora_ds.sweeps.sweep_file import Sweep
from relora_ds.sweeps.train import ending, last_error, train_all
from tests.unit.sweeps.conftest import make_done

FAKE = """
import pathlib, shutil, sys, time
words = sys.argv[1:]
place = next(word for word in words if word.startswith("run.dir=")).partition("=")[2]
print("training", place, flush=True)
{what}
shutil.copytree({done!r}, place, dirs_exist_ok=True)
"""
Fake = Callable[[str], None]


@pytest.fixture
def fake(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Has runs be a script, which does something and leaves a folder in which all updates are done."""
    done = tmp_path / "done"
    make_done(sweep.runs[0], 20.0)
    sweep.runs[0].folder.path.rename(done)
    (done / "config.yaml").unlink()  # it is that of one run
    for left in (sweep.runs[0].folder.path.parent, sweep.folder):
        left.rmdir()
    monkeypatch.setattr(train, "check", lambda sweep, waiting: None)
    monkeypatch.setattr(train, "POLL_S", 0.02)

    def install(what: str) -> None:
        script = tmp_path / "fake.py"
        script.write_text(FAKE.format(what=what, done=str(done)))
        monkeypatch.setattr(train, "tied", lambda command: [sys.executable, str(script), *command[3:]])

    return install


def states(sweep: Sweep) -> dict[str, str]:
    return {run.name: standing(run, Events(sweep.folder)).state for run in sweep.runs}


def test_runs_one_after_the_other_and_none_twice(sweep: Sweep, fake: Fake) -> None:
    fake("")
    told: list[str] = []
    assert train_all(sweep, jobs=1, insisted=["--trust"], say=told.append) == 0
    assert set(states(sweep).values()) == {"done"}
    starts = [line.split(" ")[0] for line in told if " begins " in line]
    assert starts == [run.name for run in sweep.runs]
    assert told[-1].endswith("4 of 4 done, 0 running, 0 failed, 0 left, time left 0:00:00")
    assert "1 of 4 done, 0 running, 0 failed, 3 left, time left 0:01:17" in told[1], "60 updates of 1.28 s"
    told.clear()
    assert train_all(sweep, jobs=1, insisted=[], say=told.append) == 0
    assert told == [], "nothing is left"


def test_a_failure_does_not_end_the_others(sweep: Sweep, fake: Fake) -> None:
    fake('if "/lora/seed-1" in place: print("relora-ds: error: no disk", file=sys.stderr); print("a rest"); sys.exit(1)')
    told: list[str] = []
    assert train_all(sweep, jobs=1, insisted=[], say=told.append) == 1
    assert list(states(sweep).values()) == ["failed", "done", "done", "done"]
    (line,) = [line for line in told if " failed after " in line]
    assert ": no disk; " in line and line.endswith("0 of 4 done, 0 running, 1 failed, 3 left, time left unknown")
    fake("")
    assert train_all(sweep, jobs=1, insisted=[], say=told.append) == 0, "it is tried again"


def test_notes_that_cannot_be_written_end_no_run(sweep: Sweep, fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    """As on a full disk: they wait in memory."""
    fake('if "/lora/seed-1" in place: print("relora-ds: error: no disk"); sys.exit(1)')
    sweep.folder.mkdir()
    (sweep.folder / "events.jsonl").symlink_to(sweep.folder / "gone" / "events.jsonl")
    told: list[str] = []
    assert train_all(sweep, jobs=1, insisted=[], say=told.append) == 1
    assert [word for line in told for word in ("failed", "done") if f" {word} after " in line] == [
        "failed",
        "done",
        "done",
        "done",
    ]
    assert capsys.readouterr().err.count("events.jsonl cannot be written (No such file") == 1


def test_a_run_that_cannot_be_started_does_not_end_the_others(sweep: Sweep, fake: Fake) -> None:
    fake("")
    sweep.folder.mkdir()
    (sweep.folder / "lora").touch()
    told: list[str] = []
    assert train_all(sweep, jobs=2, insisted=[], say=told.append) == 1
    assert list(states(sweep).values()) == ["failed", "done", "failed", "done"]
    assert any("lora/seed-1 cannot be started: " in line and "File exists" in line for line in told)


def test_two_at_once(sweep: Sweep, fake: Fake, tmp_path: Path) -> None:
    """Each waits for the other to have begun."""
    fake(
        f'mine = pathlib.Path({str(tmp_path)!r}, "begun" + place.replace("/", "_")); mine.touch()\n'
        f'while len(list(mine.parent.glob("begun*"))) < 2: time.sleep(0.01)'
    )
    assert train_all(sweep, jobs=2, insisted=[], say=lambda line: None) == 0
    assert set(states(sweep).values()) == {"done"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_passed_on_and_the_sweep_goes_on_later(sweep: Sweep, fake: Fake, number: signal.Signals) -> None:
    fake('import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print("ready", flush=True); time.sleep(60)')

    def interrupt() -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            output = sweep.runs[0].output
            if output.is_file() and "ready" in output.read_text():
                break
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    told: list[str] = []
    before = signal.getsignal(number)
    thread = threading.Thread(target=interrupt)
    thread.start()
    assert train_all(sweep, jobs=1, insisted=[], say=told.append) == 75
    thread.join()
    assert signal.getsignal(number) is before
    assert told[-1] == "stopped by a signal: run the same command to go on"
    assert len([line for line in told if " begins " in line]) == 1, "no other was started"
    assert Events(sweep.folder).newest[sweep.runs[0].name]["state"] == "stopped"
    fake("")
    assert train_all(sweep, jobs=1, insisted=[], say=told.append) == 0


def test_two_sweeps_in_one_folder(sweep: Sweep, fake: Fake) -> None:
    sweep.folder.mkdir()
    other = RunLock(sweep.folder)
    other.acquire()
    try:
        with pytest.raises(ConfigError, match=r"^dir=.*in use by .*; wait for that sweep"):
            train_all(sweep, jobs=1, insisted=[], say=lambda line: None)
    finally:
        other.release()


def test_an_arm_is_judged_before_any_is_trained(read: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch) -> None:
    """As train would judge it: by the model, the data and the number of processes."""
    monkeypatch.setattr(train, "tied", lambda command: ["false"])
    sweep = read(arms={"small": {"relora.rank": 2}, "large": {"relora.rank": 1000}})
    with pytest.raises(ConfigError, match=r"^arms\.large: relora\.rank=1000: larger than layer"):
        train_all(sweep, jobs=1, insisted=[], say=lambda line: None)
    assert not (sweep.folder / "small").exists()


@pytest.mark.parametrize(
    ("code", "error", "was_asked", "state"),
    [
        (75, "a checkpoint is written", False, "stopped"),
        (-15, "training", True, "stopped"),
        (1, "relora-ds: error: no disk", True, "failed"),
        (1, f"relora-ds: error: {DivergedError('the weights are not finite')}", False, "diverged"),
        (2, "relora-ds: error: relora.rank=8: the run has 4", False, "failed"),
        (-15, f"relora-ds: error: {DivergedError('2 updates in a row had a non-finite gradient')}", True, "diverged"),
        (-9, "training", False, "failed"),
    ],
)
def test_how_a_run_ended(code: int, error: str, was_asked: bool, state: str) -> None:
    assert ending(code, error, was_asked=was_asked) == state


def test_a_failure_after_a_skipped_update_is_none_of_the_runs_own(sweep: Sweep, fake: Fake) -> None:
    """fp16 skips updates while it finds its loss scale: what ended the run is what it says, and it is tried again."""
    record = '{"update": 1, "loss": null, "skipped": true}'
    fake(
        f"here = pathlib.Path(place); here.mkdir(parents=True); (here / 'metrics.jsonl').write_text('{record}' + chr(10))\n"
        'print("relora-ds: error: 3 checkpoints in a row could not be written"); sys.exit(1)'
    )
    assert train_all(sweep, jobs=1, insisted=[], say=lambda line: None) == 1
    assert set(states(sweep).values()) == {"failed"}


def test_a_run_at_work_elsewhere_is_not_done(sweep: Sweep, fake: Fake) -> None:
    """Neither is the sweep, until it is."""
    fake("")
    elsewhere = sweep.runs[1].folder
    elsewhere.path.mkdir(parents=True)
    told: list[str] = []
    with RunLock(elsewhere.path):
        assert train_all(sweep, jobs=1, insisted=[], say=told.append) == 75
    assert list(states(sweep).values()).count("done") == 3
    assert told[-2:] == [
        "relora/seed-1 was at work elsewhere, and is running", "not all runs are done: run the same command to go on"
    ]  # fmt: skip
    assert train_all(sweep, jobs=1, insisted=[], say=told.append) == 0


def test_the_line_that_says_what_is_wrong(tmp_path: Path) -> None:
    output = tmp_path / "out.log"
    output.write_text("relora-ds: error: an earlier start\n")
    offset = output.stat().st_size
    assert last_error(output, offset) == ""
    with output.open("a") as file:
        file.write("update 1\n  Segmentation fault \n\n")
    assert last_error(output, offset) == "Segmentation fault"
    with output.open("a") as file:
        file.write("relora-ds: error: x\nbye\n")
    assert last_error(output, offset) == "relora-ds: error: x"
