"""The lock of a run's folder: two jobs never write into one run.dir at once."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO

from relora_ds.errors import ConfigError

LOCK_NAME = "lock.json"
BEAT_S = 10.0
"""How often the holder of a lock refreshes the file's mtime."""
STALE_AFTER_S = 60.0
"""Age of the last heartbeat after which a lock is stale, where the holder's process cannot be looked at from here."""
WATCH_S = 2.5 * BEAT_S
"""How long a lock that looks stale by its age is watched for a heartbeat all the same: clocks of two machines may differ."""
SETTLE_S = 1.0
"""How long a job that took a lock over waits before it reads back whose it is."""
RETRY_S = 0.1
"""Pause before the next try, when the file changed during a try."""
TRIES = 20
PF_EXITING = 0x4
"""Linux's flag of a process that is ending."""
WAY_OUT = "wait for it or stop it, or name another run.dir"


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        host: its host name; empty when the file is cut off.
        pid: its process id on that host; 0 when the file is cut off.
        since: when it took the lock, in ISO format, by its own clock.
        job: what it said about itself, e.g. a SLURM job id.
    """

    host: str
    pid: int
    since: str
    job: str

    def __str__(self) -> str:
        if not self.pid:
            return f"a job that has not finished writing {LOCK_NAME}"
        return f"process {self.pid} on host {self.host}{f' (job {self.job})' if self.job else ''} since {self.since}"


@dataclass(frozen=True)
class _Record:
    """What a lock file says. ``start_time`` is in clock ticks since boot; None, and empty strings, where there is no /proc."""

    host: str
    pid: int
    start_time: int | None
    boot_id: str
    pid_namespace: str
    token: str
    job: str
    since: str

    @property
    def holder(self) -> Holder:
        return Holder(self.host, self.pid, self.since, self.job)


class RunLock:
    """A lock on a run's folder, ``lock.json`` in it, held by one process: a child that it starts does not hold it.

    The holder refreshes the file's mtime every ``BEAT_S`` seconds from a thread. A lock is stale when its holder ran on this machine
    and is gone; from elsewhere, when no heartbeat came for ``STALE_AFTER_S``: by this machine's own clock, or by the age of the last
    one and ``WATCH_S`` more in which none comes, since its mtime may be stamped by the holder's clock (Lustre, GPFS) or by a server's
    (NFS); at once when its holder is an earlier start of the same SLURM job, which SLURM holds for dead, though a node that was cut
    off may live on. A holder that was cut off from the folder for longer may find it taken over: ask :meth:`is_mine` before anything
    is published there.

    Args:
        folder: the run's folder, which exists before :meth:`acquire`.
        job: free text that other jobs are shown; ``<SLURM job id>.<restart count>`` is understood as well.

    Attributes:
        is_lost: whether a heartbeat, or :meth:`check`, found the lock in another job's hands: this one must write no more.
    """

    def __init__(self, folder: Path, job: str = "") -> None:
        self.path = folder / LOCK_NAME
        self._job = job
        self._token: str | None = None
        self._pid = 0
        self._stop = threading.Event()
        self._seen: tuple[tuple[str, float], float] | None = None
        """The heartbeat that was seen last, and since when."""
        self._is_in_doubt = False
        self.is_lost = False

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.release()

    def holder(self) -> Holder | None:
        """Who else holds the lock and lives; None when nobody does: there is no lock, a stale one, or it is ours.

        Takes up to ``WATCH_S`` where a lock from elsewhere looks stale by its age.

        Raises:
            OSError: the folder cannot be read, or (to learn the file system's time) not be written.
        """
        other = self._look()
        first = self._seen
        while other is not None and self._is_in_doubt and self._seen == first:  # until a heartbeat comes
            time.sleep(WATCH_S / 25)
            other = self._look()
        return other

    def _look(self) -> Holder | None:
        """As :meth:`holder`, at once: a holder of whom no heartbeat came for long may live still, and is in doubt."""
        self._is_in_doubt = False
        try:
            with open(self.path, "rb") as file:
                record, modified_s = _read(file)
        except FileNotFoundError:
            return None
        if (record is not None and record.token == self._own_token()) or self._why_stale(record, modified_s):
            return None
        return record.holder if record is not None else Holder("", 0, "", "")

    def acquire(self) -> str | None:
        """Takes the lock and starts the heartbeat; does nothing when it is ours already.

        Returns:
            Whom a stale lock was taken over from and why it was stale; None when there was none.

        Raises:
            ConfigError: a live holder has it.
            OSError: the folder cannot be read or written.
        """
        if self.is_mine():
            return None
        self._forget()
        mine = _this_process(self._job)
        for _ in range(TRIES):
            if _create(self.path, mine):
                self._hold(mine)
                return None
            try:
                other = self.holder()
                if other is not None:
                    raise ConfigError("run.dir", str(self.path.parent), f"in use by {other}", WAY_OUT)
                previous = self._take_over(mine)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ESTALE):
                    raise
                previous = None  # the file was removed or replaced since it was looked at
            if previous is not None:
                self._hold(mine)
                return previous
            time.sleep(RETRY_S)
        raise ConfigError("run.dir", str(self.path.parent), "other jobs are taking it over at this moment", WAY_OUT)

    def is_mine(self) -> bool:
        """Whether this process holds the lock still. False when another job took it over, or someone removed the file.

        Raises:
            OSError: the file cannot be read, or the folder is not there (a mount that vanished): nobody knows whose the lock is, and
                nothing may be published until a later call answers True.
        """
        token = self._own_token()
        return token is not None and self._read_token() == token

    def check(self) -> None:
        """Brings :attr:`is_lost` up to date, by one small read; where the file cannot be read, nobody knows, and it stays."""
        token = self._own_token()
        if token is not None:
            with suppress(OSError):
                self.is_lost = self.is_lost or self._read_token() not in (token, None)

    def release(self) -> None:
        """Ends the heartbeat and removes the file if it is ours still.

        A file that cannot be removed (a mount that vanished) stays, and is stale for others on this machine once this process ends,
        for others elsewhere after ``STALE_AFTER_S``. It raises nothing: a run's exit code must not depend on this.
        """
        token = self._own_token()
        if token is None:
            return
        self._forget()
        with suppress(OSError), _exclusive(self.path) as file:
            if file is None:
                return
            record, _ = _read(file)
            if record is not None and record.token == token and _is_at(file, self.path):
                self.path.unlink()

    def _own_token(self) -> str | None:
        """The token that this process wrote; None in a child that was forked from it."""
        return self._token if os.getpid() == self._pid else None

    def _hold(self, mine: _Record) -> None:
        self._token, self._pid, self._stop = mine.token, mine.pid, threading.Event()
        self.is_lost = False
        threading.Thread(target=self._beat, args=(mine.token, self._stop), name="run-lock", daemon=True).start()

    def _forget(self) -> None:
        """Ends the heartbeat without waiting for it: its thread may hang in a call to a mount that vanished."""
        self._token = None
        if os.getpid() == self._pid:  # in a forked child the event may be locked for ever, and there is no thread to end
            self._stop.set()

    def _beat(self, token: str, stop: threading.Event) -> None:
        while not stop.wait(BEAT_S):
            # by descriptor and only on our own file: a lock that another job took over must not be kept fresh from here
            with suppress(OSError), open(self.path, "rb") as file:
                record, _ = _read(file)
                if record is not None and record.token == token:
                    os.utime(file.fileno())
                elif record is not None and not stop.is_set():
                    self.is_lost = True

    def _read_token(self) -> str | None:
        """The token in the file; None when there is no file, or a cut-off one."""
        try:
            with open(self.path, "rb") as file:
                record, _ = _read(file)
        except FileNotFoundError:
            self.path.parent.stat()  # raises where the folder is gone, too
            return None
        return record.token if record is not None else None

    def _take_over(self, mine: _Record) -> str | None:
        """Replaces a stale file; None when another job was faster or the file is not stale any more."""
        with _exclusive(self.path) as file:
            if file is None:
                return None
            record, modified_s = _read(file)
            reason = self._why_stale(record, modified_s)
            if reason is None or not _is_at(file, self.path):
                return None
            temporary = self._temporary(mine.token)
            try:
                _create(temporary, mine)
                os.replace(temporary, self.path)
            finally:
                temporary.unlink(missing_ok=True)
        # where the file system knows no flock, two jobs may both get here: the last one to replace the file has it
        time.sleep(SETTLE_S)
        if self._read_token() != mine.token:
            return None
        return f"{record.holder if record is not None else f'a cut-off {LOCK_NAME}'} ({reason})"

    def _why_stale(self, record: _Record | None, modified_s: float) -> str | None:
        """Why the lock is stale; None while it is live."""
        if record is not None and supersedes(record.job, self._job):
            return None  # this process is what is left of an earlier start
        if record is not None and supersedes(self._job, record.job):
            return "an earlier start of this job"
        running = _is_running(record) if record is not None else None
        if running is not None:
            return None if running else "its process is gone"
        age_s, watched_s = self._now_s() - modified_s, self._watched_s(record, modified_s)
        if watched_s > STALE_AFTER_S or (age_s > STALE_AFTER_S and watched_s >= WATCH_S):
            return f"no heartbeat for {max(age_s, watched_s):.0f} s"
        self._is_in_doubt = age_s > STALE_AFTER_S
        return None

    def _watched_s(self, record: _Record | None, modified_s: float) -> float:
        """For how long, by this machine's clock, the lock has been seen with the heartbeat that it has now."""
        beat = (record.token if record is not None else "", modified_s)
        if self._seen is None or self._seen[0] != beat:
            self._seen = (beat, time.monotonic())
        return time.monotonic() - self._seen[1]

    def _now_s(self) -> float:
        """The time by the clock that stamps files made from here: this machine's, or on NFS the server's."""
        temporary = self._temporary(secrets.token_hex(8))
        try:
            with open(temporary, "xb") as file:
                return os.fstat(file.fileno()).st_mtime
        finally:
            temporary.unlink(missing_ok=True)

    def _temporary(self, name: str) -> Path:
        return self.path.with_name(f".{LOCK_NAME}.{name}.tmp")


def supersedes(mine: str, other: str) -> bool:
    """Whether ``mine`` is a later start of the same SLURM job: ``17.2`` of ``17.1``."""
    (job, _, restart), (its_job, _, its_restart) = mine.partition("."), other.partition(".")
    return job == its_job and restart.isdecimal() and its_restart.isdecimal() and int(restart) > int(its_restart)


def _create(path: Path, record: _Record) -> bool:
    """Writes a new file; False when it exists already. The mode leaves it readable for the group, as the umask says."""
    try:
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        with open(number, "w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return True


def _read(file: IO[bytes]) -> tuple[_Record | None, float]:
    """What a lock file says, None when it is cut off or no lock file; and its mtime in seconds.

    The mtime is asked of the open file: on NFS an answer by name may be an old one.
    """
    modified_s = os.fstat(file.fileno()).st_mtime
    try:
        record = _Record(**json.loads(file.read()))
    except (ValueError, TypeError):
        return None, modified_s
    numbers_hold = isinstance(record.pid, int) and 0 < record.pid < 2**31
    return (record if numbers_hold and isinstance(record.token, str) else None), modified_s


@contextmanager
def _exclusive(path: Path) -> Iterator[IO[bytes] | None]:
    """The open file, under a flock that keeps other takers of the same file out; None when another one has that.

    The flock is on the file that is to be replaced or removed: who gets it later finds another file at ``path`` and begins anew.
    It ends with its process. A file system without flock is served without.
    """
    mode = "r+b" if os.access(path, os.W_OK) else "rb"  # NFS grants an exclusive flock to writers only
    with open(path, mode) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            busy = False
        except BlockingIOError:
            busy = True
        except OSError:
            busy = False
        yield None if busy else file


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is still the one at ``path``."""
    return os.path.samestat(os.fstat(file.fileno()), path.stat())


def _this_process(job: str) -> _Record:
    pid = os.getpid()
    found = _state_and_start_time(pid)
    return _Record(
        host=socket.gethostname(),
        pid=pid,
        start_time=found[1] if found else None,
        boot_id=boot_id(),
        pid_namespace=_pid_namespace(),
        token=secrets.token_hex(16),
        job=job,
        since=datetime.now().astimezone().isoformat(timespec="seconds"),
    )


def _is_running(record: _Record) -> bool | None:
    """Whether the process that wrote a record runs; None when that cannot be told from here.

    Containers may share a host name and a boot id, and number their processes each for itself: hence the namespace.
    """
    here = (socket.gethostname(), boot_id(), _pid_namespace())
    if "" in here or here != (record.host, record.boot_id, record.pid_namespace):
        return None
    try:
        os.kill(record.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    found = _state_and_start_time(record.pid)
    if found is None or record.start_time is None:
        return None
    state, start_time = found
    return state not in "ZX" and start_time == record.start_time  # Z: ended, and its parent has not asked how


def _state_and_start_time(pid: int) -> tuple[str, int] | None:
    """Fields 3 and 22 of /proc/<pid>/stat: the state, one letter, and the start in clock ticks since boot. None where unreadable.

    X, dead, is also one that is ending (field 9): a killed rank runs no more, but its memory may take seconds to be given back.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # field 2, the command, may hold spaces and brackets
    return "X" if int(fields[6]) & PF_EXITING else fields[0], int(fields[19])


def boot_id() -> str:
    """What tells this machine, since it was started, from others; empty where the kernel does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
