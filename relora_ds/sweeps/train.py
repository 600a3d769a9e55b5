"""Trains the runs of a sweep on this machine, each by ``relora-ds train`` in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relora_ds.environment import attempt, process_environment
from relora_ds.errors import DIVERGED, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, ConfigError
from relora_ds.launch import cores
from relora_ds.launch.launcher import tied
from relora_ds.paths import make_folder
from relora_ds.run import manifest as manifests
from relora_ds.run.lock import RunLock
from relora_ds.supervision import stop
from relora_ds.sweeps.events import Events
from relora_ds.sweeps.outlook import Pace, as_time, seconds_left
from relora_ds.sweeps.runs import Standing, refuse_longer, standing
from relora_ds.sweeps.share import shares
from relora_ds.sweeps.sweep_file import Sweep, SweepRun

POLL_S = 0.2
ERROR = "relora-ds: error: "


def train_all(sweep: Sweep, *, jobs: int, insisted: Sequence[str], say: Callable[[str], None]) -> int:
    """Trains what is not done yet; returns the exit code of the sweep.

    Args:
        sweep: its runs.
        jobs: how many of them at once.
        insisted: more words for ``relora-ds train``.
        say: tells the user.

    Raises:
        ConfigError: an arm cannot be trained, or another sweep works in the folder; nothing was started.
    """
    make_folder("dir", sweep.folder)
    environment = process_environment()  # before the libraries of check() add to it
    with _alone(sweep.folder):
        events = Events(sweep.folder)
        standings = {run: standing(run, events) for run in sweep.runs}
        waiting = [run for run, at in standings.items() if not at.is_settled]
        check(sweep, waiting)
        shared = shares(jobs, sweep.nproc, cores=cores.usable(), gpus=_gpus() if jobs > 1 else [], environment=environment)
        places = [{**environment, **share} for share in shared]
        return _Training(sweep, standings, waiting, places, insisted, events, say).work()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    lock = RunLock(folder, job=attempt())
    try:
        lock.acquire()
    except ConfigError as error:
        raise ConfigError("dir", str(folder), error.problem, "wait for that sweep or stop it, or name another dir") from None
    try:
        yield
    finally:
        lock.release()


def check(sweep: Sweep, waiting: Sequence[SweepRun]) -> None:
    """Judges each arm that has a run to begin, as ``relora-ds train`` will: rather now than after hours of other arms.

    One that goes on is left to its run, since it depends on its checkpoint.

    Raises:
        ConfigError: with the arm and the key.
    """
    for run in waiting:
        refuse_longer(run)
    fresh = {run.arm: run for run in reversed(waiting) if manifests.newest(run.folder.checkpoints) is None}
    if not fresh:
        return
    from relora_ds.launch import launcher, libraries

    libraries.quiet_libraries()
    from relora_ds.training import preflight

    nproc = sweep.nproc or launcher.default_num_processes()
    launcher.check_devices(nproc)
    for run in reversed(fresh.values()):
        try:
            preflight.check(run.config, run.recipe, nproc)
        except ConfigError as error:
            raise error.within(f"arms.{run.arm}") from None


def _gpus() -> list[str]:
    """Of this machine, as CUDA_VISIBLE_DEVICES names them."""
    named = process_environment().get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


@dataclass
class _Process:
    """A run that trains.

    Attributes:
        process: ``relora-ds train``.
        place: which share of the machine it has.
        offset: where its output begins in the file.
        began: by the monotonic clock.
    """

    process: subprocess.Popen[Any]
    place: int
    offset: int
    began: float


class _Training:
    """The runs of a sweep on their way."""

    def __init__(
        self,
        sweep: Sweep,
        standings: Mapping[SweepRun, Standing],
        waiting: Sequence[SweepRun],
        places: Sequence[Mapping[str, str]],
        insisted: Sequence[str],
        events: Events,
        say: Callable[[str], None],
    ) -> None:
        self.sweep, self.standings, self.waiting = sweep, dict(standings), deque(waiting)
        self.places, self.insisted, self.events, self.say = places, insisted, events, say
        self.running: dict[SweepRun, _Process] = {}
        self.signals = 0
        """How often a signal asked to stop."""
        self.pace = Pace()
        for run, at in self.standings.items():
            if at.state == "done":
                self.pace.learn(run)

    def work(self) -> int:
        """Until all runs are over, or a signal; returns the exit code."""
        previous = {number: signal.signal(number, self._hear) for number in stop.signals()}
        try:
            told = 0
            while self.running or (self.waiting and not self.signals):
                while self.waiting and len(self.running) < len(self.places) and not self.signals:
                    self._begin(self.waiting.popleft())
                if self.signals > told:
                    told = self.signals
                    self._pass_on()
                time.sleep(POLL_S)
                for run, its in list(self.running.items()):
                    if its.process.poll() is not None:
                        self._end(run, self.running.pop(run))
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            for its in self.running.values():  # an error of our own: nothing may go on behind the user's back
                its.process.kill()
        return self._exit_code()

    def _hear(self, _number: int, _frame: Any) -> None:
        self.signals += 1

    def _pass_on(self) -> None:
        self.say(f"stopping: {len(self.running)} run(s) write a checkpoint")
        for its in self.running.values():
            its.process.send_signal(signal.SIGTERM)

    def _exit_code(self) -> int:
        for run, at in self.standings.items():
            if at.state in ("running", "queued"):  # in another process, or as a job, since before this sweep began
                now = self.standings[run] = standing(run, self.events)
                self.say(f"{run.name} was at work elsewhere, and is {now.state}")
        states = [at.state for at in self.standings.values()]
        if self.signals:
            self.say("stopped by a signal: run the same command to go on")
            return EXIT_STOPPED
        if "failed" in states:
            return EXIT_FAILED
        if {*states} <= {"done", "diverged"}:
            return EXIT_DONE
        self.say("not all runs are done: run the same command to go on")
        return EXIT_STOPPED

    def _begin(self, run: SweepRun) -> None:
        place = next(number for number in range(len(self.places)) if number not in {its.place for its in self.running.values()})
        self.events.add(run.name, "running")
        try:
            self.running[run] = self._start(run, place)
        except OSError as error:
            self.events.add(run.name, "failed", code=EXIT_FAILED, error=f"{error.filename}: {error.strerror}")
            self.standings[run] = standing(run, self.events)
            self.say(f"{run.name} cannot be started: {error.filename}: {error.strerror}; {self._counts()}")
        else:
            self.standings[run] = Standing("running", self.standings[run].update)
            self.say(f"{run.name} begins ({run.output}); {self._counts()}")

    def _start(self, run: SweepRun, place: int) -> _Process:
        """Raises OSError."""
        run.output.parent.mkdir(parents=True, exist_ok=True)
        nproc = [] if self.sweep.nproc is None else ["--nproc", str(self.sweep.nproc)]
        words = ["train", str(run.recipe), *run.words, *nproc, *self.insisted]
        with open(run.output, "ab") as output:
            offset = output.tell()
            # Dies with this process. Own session: a Ctrl-C of the terminal reaches this process alone, which passes it on once.
            process = subprocess.Popen(
                tied([sys.executable, "-m", "relora_ds", *words]), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=self.places[place], start_new_session=True,
            )  # fmt: skip
        return _Process(process, place, offset, time.monotonic())

    def _end(self, run: SweepRun, its: _Process) -> None:
        code, error = its.process.returncode, last_error(run.output, its.offset)
        if code != EXIT_DONE:
            state = ending(code, error, was_asked=self.signals > 0)
            self.events.add(
                run.name, state, code=code, error=error.removeprefix(ERROR) if state in ("failed", "diverged") else ""
            )
        else:
            self.events.add(run.name, "done", code=code)
        at = self.standings[run] = standing(run, self.events)
        if at.state == "done":
            self.pace.learn(run)
        why = f": {at.error}" if at.error else ""
        self.say(f"{run.name} {at.state} after {as_time(time.monotonic() - its.began)}{why}; {self._counts()}")

    def _counts(self) -> str:
        over = [
            at.state for run, at in self.standings.items() if run not in self.waiting
        ]  # one that failed before may be tried again
        counts = [f"{over.count('done')} of {len(self.standings)} done", f"{len(self.running)} running"]
        counts += [f"{over.count('failed')} failed"] + [f"{over.count('diverged')} diverged"] * ("diverged" in over)
        left = {run: run.config.total_updates - self.standings[run].update for run in (*self.running, *self.waiting)}
        time_left = as_time(seconds_left(left, self.pace, max(1, len(self.places)))) if left else "0:00:00"
        return ", ".join([*counts, f"{len(self.waiting)} left", f"time left {time_left}"])


def ending(code: int, error: str, *, was_asked: bool) -> str:
    """What became of a run that ended before its last update, by its exit code and the line that it ended with.

    A run that was asked to stop before it could hear of signals has no checkpoint and no error to tell of: it is stopped, too.
    """
    says_why = error.startswith(ERROR)
    if code == EXIT_STOPPED or (was_asked and not says_why):
        return "stopped"
    return "diverged" if error.startswith(f"{ERROR}{DIVERGED}") else "failed"


def last_error(output: Path, offset: int) -> str:
    """The last line in which a run says what is wrong, else its last line."""
    try:
        with open(output, "rb") as file:
            file.seek(offset)
            lines = [line.strip() for line in file.read().decode("utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line.startswith(ERROR)), next(reversed(lines), ""))
