"""The lock between the starts of one SLURM job: the later one has the folder, whatever the earlier one still does."""

from __future__ import annotations

from pathlib import Path

import pytest

from relora_ds.errors import ConfigError
from relora_ds.run import lock as lock_module
from relora_ds.run.lock import LOCK_NAME, RunLock, supersedes
from tests.unit.run.test_lock import left_by_elsewhere, rewrite


@pytest.fixture(autouse=True)
def settle_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "SETTLE_S", 0.01)
    monkeypatch.setattr(lock_module, "WATCH_S", 0.0)


@pytest.mark.parametrize(
    ("mine", "other", "is_later"),
    [
        ("17.1", "17.0", True), ("17.10", "17.9", True), ("17.0", "17.0", False), ("17.0", "17.1", False), ("18.1", "17.0", False),
        ("17", "17.0", False), ("", "", False), ("a job", "another", False),
    ],
)  # fmt: skip
def test_which_start_is_later(mine: str, other: str, is_later: bool) -> None:
    assert supersedes(mine, other) is is_later


def test_a_later_start_takes_over_from_a_live_one(tmp_path: Path) -> None:
    """A node that was cut off lives on: its heartbeat is fresh."""
    earlier, later = RunLock(tmp_path, job="17.0"), RunLock(tmp_path, job="17.1")
    earlier.acquire()
    assert later.holder() is None
    taken_over = later.acquire()
    assert taken_over is not None and "job 17.0" in taken_over and "an earlier start of this job" in taken_over
    assert later.is_mine() and not earlier.is_mine()
    earlier.check()
    later.check()
    assert earlier.is_lost and not later.is_lost
    earlier.release()
    assert later.is_mine(), "what is left of the earlier start removes nothing"
    later.release()


@pytest.mark.parametrize("age_s", [0.0, 1000.0])
def test_an_earlier_start_never_takes_it_back(tmp_path: Path, age_s: float) -> None:
    rewrite(left_by_elsewhere(tmp_path, age_s), job="17.1")
    with pytest.raises(ConfigError, match=r"in use by .*\(job 17.1\)"):
        RunLock(tmp_path, job="17.0").acquire()


def test_another_jobs_lock_is_respected(tmp_path: Path) -> None:
    with RunLock(tmp_path, job="17.0"), pytest.raises(ConfigError, match="in use"):
        RunLock(tmp_path, job="18.1").acquire()


def test_a_check_that_cannot_read_changes_nothing(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, job="17.0")
    lock.check()
    lock.acquire()
    (tmp_path / LOCK_NAME).unlink()
    lock.check()
    assert not lock.is_lost
    lock.release()
