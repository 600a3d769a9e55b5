"""The lock of a run's folder: one holder, whose death is seen at once on its own machine and by a silent heartbeat from elsewhere."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

import pytest

from relora_ds.errors import ConfigError
from relora_ds.run import lock as lock_module
from relora_ds.run.lock import LOCK_NAME, STALE_AFTER_S, RunLock

ROOT = Path(__file__).resolve().parents[3]
HOLDS = """
import sys
from pathlib import Path
from relora_ds.run.lock import RunLock
RunLock(Path(sys.argv[1]), job="4711").acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def settle_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "SETTLE_S", 0.01)
    monkeypatch.setattr(lock_module, "WATCH_S", 0.0)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of ``tmp_path``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def rewrite(path: Path, **changes: Any) -> None:
    """Changes fields of a lock file, which keeps its mtime."""
    stat = path.stat()
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def age(path: Path, seconds: float) -> None:
    """Makes the last heartbeat so long ago."""
    moment = time.time() - seconds
    os.utime(path, (moment, moment))


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < deadline, "waited for 5 s"
        time.sleep(0.005)


def left_by_elsewhere(folder: Path, seconds: float, **changes: Any) -> Path:
    """A lock file of a process that cannot be looked at from here, with its last heartbeat ``seconds`` ago."""
    lock = RunLock(folder)
    lock.acquire()
    text = lock.path.read_text()
    lock.release()
    lock.path.write_text(text)
    rewrite(lock.path, **({"host": "node7", "token": "theirs"} | changes))
    age(lock.path, seconds)
    return lock.path


def test_the_file_says_who_holds_it(tmp_path: Path) -> None:
    with RunLock(tmp_path, job="4711") as lock:
        assert lock.path == tmp_path / "lock.json"
        record = json.loads(lock.path.read_text())
        assert set(record) == {"host", "pid", "start_time", "boot_id", "pid_namespace", "token", "job", "since"}
        assert record["pid"] == os.getpid() and record["job"] == "4711"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", record["since"])
        assert lock.is_mine() and lock.holder() is None


def test_release_removes_the_file_and_may_be_called_again(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.release()
    assert lock.acquire() is None
    assert lock.acquire() is None, "held already"
    lock.release()
    assert list(tmp_path.iterdir()) == []
    assert not lock.is_mine()
    lock.release()
    with lock:
        lock.path.unlink()
    assert list(tmp_path.iterdir()) == []


def test_an_error_inside_the_block_releases(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_a_second_lock_in_one_process_is_refused(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        holder = RunLock(tmp_path).holder()
        assert holder is not None and holder.pid == os.getpid()
        with pytest.raises(ConfigError):
            RunLock(tmp_path).acquire()


def test_a_live_process_keeps_others_out_even_when_its_heartbeat_is_old(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    record = json.loads((tmp_path / LOCK_NAME).read_text())
    age(tmp_path / LOCK_NAME, 10 * STALE_AFTER_S)
    with pytest.raises(ConfigError) as error:
        RunLock(tmp_path).acquire()
    assert error.value.key == "run.dir"
    assert str(error.value) == (
        f"run.dir={str(tmp_path)!r}: in use by process {other.pid} on host {record['host']} (job 4711) since {record['since']}; "
        "wait for it or stop it, or name another run.dir"
    )
    assert json.loads((tmp_path / LOCK_NAME).read_text()) == record


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_process_is_stale_at_once(tmp_path: Path, other: subprocess.Popen[str], reaped: bool) -> None:
    other.send_signal(signal.SIGKILL)
    # a zombie has the pid and the start time of the process that it was
    os.waitid(os.P_PID, other.pid, os.WEXITED | (0 if reaped else os.WNOWAIT))
    lock = RunLock(tmp_path, job="4712")
    assert lock.holder() is None
    previous = lock.acquire()
    assert previous is not None
    assert previous.startswith(f"process {other.pid} on host ") and "(job 4711) since" in previous
    assert previous.endswith("(its process is gone)")
    assert lock.is_mine() and json.loads(lock.path.read_text())["job"] == "4712"
    assert list(tmp_path.iterdir()) == [lock.path]
    lock.release()


@pytest.mark.parametrize(("flags", "is_held"), [(0x400140, True), (0x400144, False)], ids=["runs", "is ending"])
def test_a_killed_process_that_still_gives_its_memory_back_is_stale(
    tmp_path: Path, other: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, flags: int, is_held: bool
) -> None:
    read_text = Path.read_text

    def read(path: Path, *arguments: Any, **options: Any) -> str:
        text = read_text(path, *arguments, **options)
        if path != Path(f"/proc/{other.pid}/stat"):
            return text
        command, bracket, rest = text.rpartition(")")
        fields = rest.split()
        fields[6] = str(flags)  # R or D all the while
        return f"{command}{bracket} {' '.join(fields)}\n"

    monkeypatch.setattr(Path, "read_text", read)
    assert (RunLock(tmp_path).holder() is not None) == is_held


def test_a_pid_that_another_process_has_now_is_stale(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    path = tmp_path / LOCK_NAME
    assert RunLock(tmp_path).holder() is not None
    rewrite(path, start_time=json.loads(path.read_text())["start_time"] - 1)
    with RunLock(tmp_path) as lock:
        assert lock.is_mine()


@pytest.mark.parametrize(
    "changes",
    [
        {"host": "node7"},
        {"boot_id": "of another boot"},
        {"boot_id": ""},
        {"pid_namespace": "pid:[1]"},
        {"host": "node7", "pid": 2**22 + 1},
        {"start_time": None, "host": "node7"},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_from_elsewhere_the_heartbeat_decides(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = left_by_elsewhere(tmp_path, STALE_AFTER_S - 15, **({"host": lock_module.socket.gethostname()} | changes))
    lock = RunLock(tmp_path)
    holder = lock.holder()
    assert holder is not None and holder.pid == json.loads(path.read_text())["pid"]
    with pytest.raises(ConfigError, match="in use by process"):
        lock.acquire()
    age(path, STALE_AFTER_S + 5)
    assert lock.holder() is None
    previous = lock.acquire()
    assert previous is not None and re.search(r"\(no heartbeat for 6\d s\)$", previous)
    assert lock.is_mine()
    lock.release()


@pytest.mark.parametrize(("name", "unknown"), [("_state_and_start_time", None), ("boot_id", ""), ("_pid_namespace", "")])
def test_without_proc_the_heartbeat_decides(
    tmp_path: Path, other: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, name: str, unknown: Any
) -> None:
    monkeypatch.setattr(lock_module, name, lambda *args: unknown)
    if unknown == "":
        rewrite(tmp_path / LOCK_NAME, **{name.lstrip("_"): ""})  # two machines without /proc say the same
    assert RunLock(tmp_path).holder() is not None
    age(tmp_path / LOCK_NAME, STALE_AFTER_S + 5)
    assert RunLock(tmp_path).holder() is None


def test_a_live_lock_of_a_machine_whose_clock_is_behind_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its heartbeats look old, and come all the same."""
    path = left_by_elsewhere(tmp_path, STALE_AFTER_S + 600)
    monkeypatch.setattr(lock_module, "WATCH_S", 0.5)
    ends = threading.Event()

    def beat() -> None:
        while not ends.wait(0.1):
            age(path, STALE_AFTER_S + 600)  # by its clock at that time

    holder = threading.Thread(target=beat)
    holder.start()
    try:
        with pytest.raises(ConfigError, match="in use by"):
            RunLock(tmp_path).acquire()
    finally:
        ends.set()
        holder.join()


def test_a_lock_that_looks_stale_is_watched_for_a_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_by_elsewhere(tmp_path, STALE_AFTER_S + 5)
    monkeypatch.setattr(lock_module, "WATCH_S", 0.3)
    began, lock = time.monotonic(), RunLock(tmp_path)
    assert lock.acquire() is not None
    assert 0.3 <= time.monotonic() - began < 3
    lock.release()


def test_a_dead_lock_of_a_machine_whose_clock_is_ahead_is_stale_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_by_elsewhere(tmp_path, -3600.0)
    lock, clock = RunLock(tmp_path), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    assert lock.holder() is not None
    clock[0] += STALE_AFTER_S - 1
    assert lock.holder() is not None
    clock[0] += 2
    assert lock.holder() is None


def test_another_users_process_is_live(tmp_path: Path, other: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(pid: int, number: int) -> NoReturn:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    age(tmp_path / LOCK_NAME, 10 * STALE_AFTER_S)
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", kill)
        assert RunLock(tmp_path).holder() is not None


def test_the_file_systems_clock_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose clock is an hour behind stamps heartbeats, and the file that they are compared with, alike."""
    path = left_by_elsewhere(tmp_path, 3600 + STALE_AFTER_S - 15)

    def open_behind(path: Path, mode: str) -> IO[bytes]:
        if mode == "xb":
            path.touch(exist_ok=False)
            age(path, 3600)
        return open(path, "rb")

    monkeypatch.setattr(lock_module, "open", open_behind, raising=False)
    assert RunLock(tmp_path).holder() is not None
    age(path, 3600 + STALE_AFTER_S + 5)
    assert RunLock(tmp_path).holder() is None


@pytest.mark.parametrize(
    "text",
    ["", '{"host": "node7", "pi', "\0" * 200, "[1]", "{}", b"\xff\xfe"],
    ids=["empty", "half", "zeros", "list", "no fields", "bytes"],
)
def test_a_cut_off_file_is_live_while_it_is_fresh(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / LOCK_NAME
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    lock = RunLock(tmp_path)
    with pytest.raises(ConfigError, match=r"in use by a job that has not finished writing lock\.json; wait"):
        lock.acquire()
    age(path, STALE_AFTER_S + 5)
    assert lock.holder() is None
    previous = lock.acquire()
    assert previous is not None and previous.startswith("a cut-off lock.json (no heartbeat for 6")
    lock.release()


@pytest.mark.parametrize("pid", [0, -1, 2**70, "12", None])
def test_a_number_that_is_no_pid_is_a_cut_off_file(tmp_path: Path, pid: Any) -> None:
    left_by_elsewhere(tmp_path, 0, pid=pid, host=lock_module.socket.gethostname())
    holder = RunLock(tmp_path).holder()
    assert holder is not None and holder.pid == 0


def test_a_lock_that_cannot_be_written_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(number: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        RunLock(tmp_path).acquire()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_was_taken_over_is_not_mine_and_not_removed(tmp_path: Path) -> None:
    first = RunLock(tmp_path)
    first.acquire()
    rewrite(first.path, host="node7")
    age(first.path, 2 * STALE_AFTER_S)
    second = RunLock(tmp_path)
    assert second.acquire() is not None
    assert second.is_mine() and not first.is_mine()
    assert first.holder() is not None and second.holder() is None
    with pytest.raises(ConfigError):
        first.acquire()
    first.release()
    assert second.is_mine()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_someone_removed_is_not_mine(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        lock.path.unlink()
        assert not lock.is_mine()
        with RunLock(tmp_path) as another:
            assert another.is_mine() and not lock.is_mine()


def test_a_forked_child_does_not_hold_the_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                holder = lock.holder()
                seen = not lock.is_mine() and holder is not None and holder.pid == os.getppid()
                lock.release()
                try:
                    lock.acquire()
                except ConfigError:
                    code = 0 if seen else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert lock.is_mine()


def test_the_heartbeat_moves_the_mtime_until_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "BEAT_S", 0.01)
    before = set(threading.enumerate())
    with RunLock(tmp_path) as lock:
        for _ in range(2):
            age(lock.path, 1000)
            wait_until(lambda: lock.path.stat().st_mtime > time.time() - 500)
        (thread,) = set(threading.enumerate()) - before
        assert thread.daemon
    wait_until(lambda: not thread.is_alive())


def test_the_heartbeat_outlives_a_folder_that_vanishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "BEAT_S", 0.01)
    folder, away = tmp_path / "run", tmp_path / "away"
    folder.mkdir()
    with RunLock(folder) as lock:
        folder.rename(away)
        with pytest.raises(FileNotFoundError):
            lock.is_mine()
        time.sleep(0.05)  # some heartbeats
        age(away / LOCK_NAME, 1000)
        away.rename(folder)
        assert lock.is_mine()
        wait_until(lambda: lock.path.stat().st_mtime > time.time() - 500)
    assert list(folder.iterdir()) == []


def test_the_heartbeat_leaves_the_lock_of_another_job_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "BEAT_S", 0.01)
    with RunLock(tmp_path) as lock:
        taken = lock.path.with_name("taken")
        taken.write_text(json.dumps(json.loads(lock.path.read_text()) | {"token": "theirs"}))
        age(taken, 1000)
        taken.replace(lock.path)
        wait_until(lambda: lock.is_lost)  # a heartbeat finds it
        assert lock.path.stat().st_mtime < time.time() - 500
    assert lock.path.exists()


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    lock = RunLock(tmp_path)
    lock.acquire()
    with monkeypatch.context() as patch:
        patch.setattr(lock_module, "open", failing, raising=False)
        for ask in (lock.is_mine, lock.holder, RunLock(tmp_path).acquire):
            with pytest.raises(OSError, match="Input/output error"):
                ask()
        lock.release()
    assert not lock.is_mine() and lock.path.exists(), "released, though the file could not be removed"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run")
    assert lock.holder() is None and not lock.is_mine()
    with pytest.raises(FileNotFoundError):
        lock.acquire()


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, relora_ds.run.lock; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
