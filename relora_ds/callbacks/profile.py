"""Where an update's time goes: traces of some updates, and tables. Whatever the profiler does, the run goes on."""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from relora_ds.callbacks.callback import Callback, RunState
from relora_ds.callbacks.costs import Costs
from relora_ds.comm.counter import COUNTER, Kind, Tally, by_purpose
from relora_ds.reports.tables import aligned, markdown
from relora_ds.run.folder import write_atomically
from relora_ds.supervision import parts

WARM_UP = 2
"""Updates of a start that are left out: they allocate memory, compile, and fill caches."""
COMPRESSION = 3
"""Of the traces. gzip's own choice, 9, takes several times as long, and other ranks wait."""


class Profile(Callback):
    """Profiles updates of this start, on rank 0 alone. Behind all other callbacks, whose work is then part of an update.

    The first two updates warm up. Each profiled one leaves a trace in the run's folder. As many updates again are timed without the
    profiler; then the tables are told and written.

    Args:
        num_updates: to be profiled; fewer where the run has no more.
    """

    def __init__(self, num_updates: int) -> None:
        self.num_updates = num_updates
        self.profiled = self.compared = range(0)
        self.costs = Costs()
        self.run: RunState | None = None
        self.profiler: Any = None
        self._rest: Any = None
        self._counted: dict[Kind, Tally] = {}
        self._started = 0.0

    def begin(self, run: RunState) -> None:
        self.run = run
        first, end = run.done.update + 1 + WARM_UP, run.config.total_updates + 1
        then = min(first + self.num_updates, end)
        self.profiled, self.compared = range(first, then), range(then, min(then + self.num_updates, end))
        if not self.profiled:
            run.tell(f"nothing is profiled: {WARM_UP} updates warm up, and no other is left")
            return
        run.tell(f"the profiler runs in {_named(self.profiled)}")
        self._guarded("does not start", _try)

    def begin_update(self, run: RunState) -> None:
        if run.update_in_progress in self.profiled:
            self._guarded("does not start", self._begin)
        self._started = time.perf_counter()

    def update(self, run: RunState, record: dict[str, Any]) -> None:
        update, seconds = run.done.update, time.perf_counter() - self._started
        if self.profiler is not None:
            self._guarded("tells nothing", lambda: self._end(run, update, seconds))
        elif update in self.compared:
            self.costs.without.append(seconds)
        if self.costs.updates and update + 1 not in self.profiled and len(self.costs.without) == len(self.compared):
            self._guarded("tells nothing", self._report)

    def end(self, exit_code: int) -> None:
        """A run that ends before its time tells what is there."""
        self._guarded("does not stop", self._stop)
        if self.costs.updates:
            self._guarded("tells nothing", self._report)

    def _begin(self) -> None:
        profiler = _profiler()
        profiler.start()
        self.profiler, self._counted = profiler, COUNTER.snapshot()
        self._rest = record_function(parts.PREFIX + parts.REST)
        self._rest.__enter__()

    def _stop(self) -> None:
        profiler, self.profiler = self.profiler, None
        if profiler is not None:
            self._rest.__exit__(None, None, None)
            profiler.stop()

    def _end(self, run: RunState, update: int, seconds: float) -> None:
        """``update`` is done: adds what it cost, and writes its trace."""
        profiler, sent = self.profiler, by_purpose(COUNTER.since(self._counted))
        self._stop()
        self.costs.add(update, run.phase, seconds, profiler.events(), sent)
        if run.device.type == "cuda":
            self.costs.peak_bytes = torch.cuda.max_memory_allocated(run.device)
        self._write(f"update_{update:07d}.json.gz", lambda path: write_trace(profiler, path))

    def _report(self) -> None:
        """Tells the tables, and writes them."""
        costs, self.costs, self.profiled = self.costs, Costs(), range(0)
        title = f"where the time goes: {_named(costs.updates)}, phase {' and '.join(costs.phases)}"
        tables, remarks = (costs.by_part(), costs.by_operator()), costs.remarks()
        lines = [f"# {title.capitalize()}"]
        for table in tables:
            lines += ["", *markdown(table)]
        lines += ["", *(f"- {remark}" for remark in remarks), ""]
        name = f"updates_{costs.updates[0]:07d}_{costs.updates[-1]:07d}.md"
        written = self._write(name, lambda path: write_atomically(path, "\n".join(lines)))
        for line in (title, *aligned(tables[0]), *aligned(tables[1]), *remarks):
            self._tell(line)
        if written:
            self._tell(f"these tables are in {written}; ui.perfetto.dev opens the traces beside it")

    def _write(self, name: str, write: Callable[[Path], None]) -> Path | None:
        """Writes a file under a name that none has yet. Returns where; or None, which is told."""
        assert self.run is not None, "it has begun"
        path = unused(self.run.folder.profile / name)
        try:
            path.parent.mkdir(exist_ok=True)
            write(path)
        except OSError as error:
            self._tell(f"{path} could not be written ({error.strerror or error}): the run goes on without it")
            return None
        return path

    def _guarded(self, what: str, work: Callable[[], Any]) -> None:
        """There is no profiler any more where ``work`` fails."""
        try:
            work()
        except Exception as error:
            self.profiled, self.profiler = range(0), None
            self._tell(f"the profiler {what} ({str(error) or type(error).__name__}): the run goes on without it")

    def _tell(self, text: str) -> None:
        if self.run is not None:
            self.run.tell(text)


def _profiler() -> Any:
    devices = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
    return profile(activities=devices, profile_memory=True)


def _try() -> None:
    """The first start of a process takes seconds, which would be an update's."""
    with _profiler():
        pass


def write_trace(profiler: Any, path: Path) -> None:
    """Writes the trace of a profiler that was stopped: packed, and whole or not at all.

    Raises:
        OSError: there is no room for it.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        plain, packed = Path(folder) / "trace.json", Path(folder) / path.name
        profiler.export_chrome_trace(str(plain))
        if not plain.exists():  # torch says nothing, and keeps open what it has begun, with all that is in it
            for begun in Path(folder).iterdir():
                os.truncate(begun, 0)
            raise OSError("torch left no trace; is the disk full?")
        with open(plain, "rb") as source, gzip.open(packed, "wb", compresslevel=COMPRESSION) as target:
            shutil.copyfileobj(source, target)
        os.replace(packed, path)


def unused(path: Path) -> Path:
    """``path``; where there is such a file already, name_2, name_3 and so on."""
    stem, _, ending = path.name.partition(".")
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{stem}_{number}.{ending}")
    return free


def _named(updates: Sequence[int]) -> str:
    return f"update {updates[0]}" if len(updates) == 1 else f"updates {updates[0]} to {updates[-1]}"
