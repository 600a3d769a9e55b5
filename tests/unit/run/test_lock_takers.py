"""Several that want the lock of a run's folder at once: one gets it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
from pathlib import Path
from typing import IO, Any, NoReturn

import pytest

from relora_ds.errors import ConfigError
from relora_ds.run import lock as lock_module
from relora_ds.run.lock import STALE_AFTER_S, RunLock
from tests.unit.run.test_lock import left_by_elsewhere, settle_at_once  # noqa: F401


def take_at_once(folder: Path, num_takers: int) -> list[RunLock]:
    """The takers that got the lock."""
    start = threading.Barrier(num_takers)
    winners: list[RunLock] = []
    errors: list[BaseException] = []

    def take() -> None:
        lock = RunLock(folder)
        start.wait(10)
        try:
            lock.acquire()
            winners.append(lock)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=take) for _ in range(num_takers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(error) for error in errors] == [ConfigError] * (num_takers - len(winners)), errors
    return winners


def test_of_two_that_create_at_once_one_wins(tmp_path: Path) -> None:
    (winner,) = take_at_once(tmp_path, 4)
    assert winner.is_mine()
    winner.release()


def test_of_two_that_take_over_at_once_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The takers are slow: without the flock each would replace the file after another one had read its own token back."""
    left_by_elsewhere(tmp_path, 2 * STALE_AFTER_S)
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        time.sleep(0.05 * next(delays))
        real(source, target)

    delays = iter(range(4, 40, 4))
    monkeypatch.setattr(os, "replace", replace)
    (winner,) = take_at_once(tmp_path, 4)
    assert winner.is_mine() and list(tmp_path.iterdir()) == [winner.path]
    winner.release()


def test_a_taker_that_comes_late_leaves_the_new_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at a stale file and the flock on it another job takes it over: neither taking nor releasing may undo that."""
    path = left_by_elsewhere(tmp_path, 2 * STALE_AFTER_S)
    new = json.dumps(json.loads(path.read_text()) | {"token": "new"})
    real = fcntl.flock

    def flock(file: IO[bytes], operation: int) -> None:
        (tmp_path / "new").write_text(new)
        (tmp_path / "new").replace(path)
        real(file, operation)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        with pytest.raises(ConfigError, match="in use by process"):
            RunLock(tmp_path).acquire()
        assert path.read_text() == new
        path.unlink()
        lock = RunLock(tmp_path)
        lock.acquire()
        lock.release()
        assert path.read_text() == new


def test_without_flock_the_token_that_is_read_back_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_by_elsewhere(tmp_path, 2 * STALE_AFTER_S)
    real = os.replace
    both = threading.Barrier(2)

    def flock(file: IO[bytes], operation: int) -> NoReturn:
        raise OSError(errno.ENOLCK, "No locks available")

    def replace(source: Any, target: Any) -> None:
        both.wait(10)  # both have found the same file stale
        real(source, target)
        both.wait(10)

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(os, "replace", replace)
    (winner,) = take_at_once(tmp_path, 2)
    assert winner.is_mine()
    winner.release()


def test_a_taker_that_hangs_over_the_file_keeps_others_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = left_by_elsewhere(tmp_path, 2 * STALE_AFTER_S)
    monkeypatch.setattr(lock_module, "RETRY_S", 0.001)
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="other jobs are taking it over at this moment; wait"):
            RunLock(tmp_path).acquire()
    with RunLock(tmp_path) as lock:
        assert lock.is_mine()
