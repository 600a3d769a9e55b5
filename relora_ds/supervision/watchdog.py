"""The watch over a rank: where nothing moves any more, every rank writes its stacks, one names the slowest, all end.

A hang has no error: the ranks wait in a collective for one that never comes. Each rank's thread looks at its own heartbeat alone.
When that has stood still for ``train.hang_timeout`` seconds the ranks meet in the file system, because nothing else can be trusted.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from relora_ds.errors import EXIT_FAILED
from relora_ds.run import mounts
from relora_ds.supervision import faults

POLL_S = 1.0
"""How often the thread looks; more often where the time is short."""
GRACE_S = 5.0
"""How long a rank that wrote its stacks waits at least for those of the others, and the others for the one that speaks."""
SAVE_S = 1800.0
"""How long a checkpoint that is waited for may take, however short the run's own limit is."""
STDERR = 2


@dataclass(frozen=True)
class Heading:
    """The first line of a rank's stacks.

    Attributes:
        rank, host: who.
        update: the one in progress, 0 before the first.
        beats: so many things were done since the watch began; comparable over ranks, where clocks are not.
        where: what was done last.
    """

    rank: int
    host: str
    update: int
    beats: int
    where: str

    @property
    def place(self) -> str:
        return f"after {self.where!r} in update {self.update} ({self.beats} beats)"


class Watchdog:
    """Ends a rank's process when its heartbeat stands still.

    The second line of defence is a timer in C that writes the stacks to stderr and ends the process: for a hang that holds Python's
    lock, so that no thread runs, and for a disk that hangs the thread itself.

    Args:
        run_dir: the run's folder.
        stacks: the folder of this attempt's stacks; not there yet.
        timeout_s: so many seconds without a beat are a hang; None: never.
        rank: of this process.
        hosts: one a rank.
        attempt: of the SLURM job; empty outside of one.

    Attributes:
        update: the one in progress; the trainer sets it.
    """

    def __init__(
        self, run_dir: Path, stacks: Path, *, timeout_s: float | None, rank: int, hosts: Sequence[str], attempt: str = ""
    ) -> None:
        self.run_dir, self.stacks, self.rank, self.hosts, self.attempt = run_dir, stacks, rank, hosts, attempt
        self.update = 0
        self._timeout_s = math.inf if timeout_s is None else timeout_s
        self._grace_s = 0.0 if timeout_s is None else max(grace_s(timeout_s), mounts.remembered_s(run_dir))
        self._beats, self._where = 0, "start"
        self._moved_s = self._deadline_s = math.inf  # by the monotonic clock
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to watch, where there is a limit."""
        self.beat("start")
        if math.isfinite(self._timeout_s):
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def beat(self, where: str, allow_s: float = 0.0) -> None:
        """Something is done. All ranks beat for the same things, so that the numbers of their beats can be compared.

        Args:
            where: what.
            allow_s: what follows may take so long, if that is more than the run's limit.
        """
        self._where = where
        self._beats += 1
        self._moved_s = time.monotonic()
        self._deadline_s = self._moved_s + max(self._timeout_s, allow_s)

    def stop(self) -> None:
        """Ends the watch: no thread and no timer is left. Does not return when the process is being ended already."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            faulthandler.cancel_dump_traceback_later()

    # In the thread

    def _watch(self) -> None:
        pause_s, armed_for, looked = min(POLL_S, self._timeout_s / 10), None, time.monotonic()
        while not self._stopping.wait(pause_s):
            now, late_s = time.monotonic(), time.monotonic() - looked - pause_s
            looked = now
            if (
                late_s > POLL_S
            ):  # this process was stopped (scontrol suspend, a machine that was paused): no time of its own went by
                self._moved_s, self._deadline_s = self._moved_s + late_s, self._deadline_s + late_s
            deadline = self._deadline_s
            if deadline != armed_for:
                # After the rank that speaks, which an earlier end would take along, and before a launcher kills this one for it.
                # Twice that, since time in which the process is stopped goes by for the timer.
                later_s = max(deadline - now, 0.0) + self._grace_s + GRACE_S
                faulthandler.dump_traceback_later(2 * later_s, exit=True, file=STDERR)
                armed_for = deadline
            if now > deadline or self._others_hang(now):
                self._end()

    def _others_hang(self, now: float) -> bool:
        """Whether another rank found the hang: those that wait for the same thing began to wait up to an update apart.

        The folder is looked for in its parent's list: asked for by its name, NFS may remember that it was not there.
        """
        if now - self._moved_s <= self._timeout_s / 2:
            return False
        with suppress(OSError):
            return any(path.name == self.stacks.name for path in self.stacks.parent.iterdir())
        return False

    def _end(self) -> None:
        faulthandler.dump_traceback_later(4 * self._grace_s, exit=True, file=STDERR)
        try:
            self._write_stacks()
            time.sleep(self._grace_s)
            found = self._read_headings()
            if self.rank == min(found, default=None):
                self._speak(found)
            else:
                time.sleep(self._grace_s)  # a launcher that sees one rank end kills the others: the one that speaks must be first
        finally:
            os._exit(EXIT_FAILED)  # the main thread may never come back

    def _write_stacks(self) -> None:
        """This rank's stacks, under their name when they are whole; to stderr where the folder cannot be written."""
        heading = Heading(self.rank, self.hosts[self.rank], self.update, self._beats, self._where)
        path = self._path(self.rank)
        temporary = path.with_suffix(".tmp")
        try:
            self.stacks.mkdir(parents=True, exist_ok=True)
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(json.dumps(asdict(heading)) + "\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            os.replace(temporary, path)
        except OSError as error:
            _tell(f"rank {self.rank} on {heading.host} hangs {heading.place}; its stacks cannot be written ({error.strerror}):")
            faulthandler.dump_traceback(STDERR, all_threads=True)

    def _path(self, rank: int) -> Path:
        return self.stacks / f"rank_{rank:05d}.txt"

    def _read_headings(self) -> dict[int, Heading]:
        """Of the ranks that wrote their stacks. Listed first, and asked for once: NFS may remember what was not there."""
        found = {}
        with suppress(OSError):
            list(self.stacks.iterdir())
        for rank in range(len(self.hosts)):
            with suppress(OSError, ValueError, TypeError), open(self._path(rank), encoding="utf-8") as file:
                found[rank] = Heading(**json.loads(file.readline()))
        return found

    def _speak(self, found: Mapping[int, Heading]) -> None:
        rank, sentence = judge(found, self.hosts)
        text = f"nothing moved for {self._timeout_s:g} s: {sentence}; stacks: {self.stacks}"
        host = None if rank is None else self.hosts[rank]
        faults.record(self.run_dir, kind="hang", attempt=self.attempt, rank=rank, host=host, update=self.update, detail=text)
        _tell(text)


def grace_s(timeout_s: float) -> float:
    """The ranks find a hang up to an update apart: a share of what the run allows. (Some file systems show files later still.)"""
    return max(GRACE_S, timeout_s / 30)


def collective_timeout_s(timeout_s: float | None) -> float:
    """How long a collective may take in a run with this limit: the watch must have ended the job before it fails by itself."""
    return SAVE_S if timeout_s is None else max(timeout_s, SAVE_S) + 5 * max(grace_s(timeout_s), mounts.REMEMBERED_S)


def judge(found: Mapping[int, Heading], hosts: Sequence[str]) -> tuple[int | None, str]:
    """Which rank the others wait for, None when none stands out; and a sentence on it.

    Args:
        found: the headings of the ranks that wrote their stacks.
        hosts: one a rank, of all ranks.
    """
    silent = [rank for rank in range(len(hosts)) if rank not in found]
    furthest = max(found.values(), key=lambda heading: heading.beats, default=None)
    if silent:
        others = f"; the others hang {furthest.place}" if furthest else ""
        return silent[0], f"{_named(silent, hosts)} wrote no stacks: its process is stopped or stuck, or its node is gone{others}"
    assert furthest is not None, "a job has a rank"
    fewest = min(heading.beats for heading in found.values())
    behind = [rank for rank, heading in sorted(found.items()) if heading.beats == fewest]
    if len(hosts) > 1 and fewest == furthest.beats:
        return None, f"all {len(hosts)} ranks wait at the same place, {furthest.place}"
    first = found[behind[0]]
    ahead = f", the furthest {furthest.place}" if len(hosts) > 1 else ""
    return first.rank, f"{_named(behind, hosts)} hangs {first.place}{ahead}"


def _named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    more = f" (and {len(ranks) - 1} more)" if len(ranks) > 1 else ""
    return f"rank {ranks[0]} on {hosts[ranks[0]]}{more}"


def _tell(text: str) -> None:
    with suppress(OSError, ValueError):
        print(f"relora-ds: error: {text}", file=sys.stderr, flush=True)


def stacks_folder(parent: Path, attempt: str) -> Path:
    """Where an attempt's stacks go: a folder that is not there yet, because one that is there says that a rank hangs."""
    name = attempt or time.strftime("%Y%m%d_%H%M%S")
    path, number = parent / name, 1
    while path.exists():
        number += 1
        path = parent / f"{name}_{number}"
    return path
