"""What is left of a sweep: updates, tokens, and how long they will take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta

from relora_ds.reports.tables import aligned
from relora_ds.sweeps.runs import Figures, Standing, figures
from relora_ds.sweeps.sweep_file import Sweep, SweepRun


class Pace:
    """Seconds of an update, by the runs that are done.

    Args:
        find: the figures of a run.
    """

    def __init__(self, find: Callable[[SweepRun], Figures] = figures) -> None:
        self.find = find
        self.by_run: dict[SweepRun, float] = {}

    def learn(self, run: SweepRun) -> None:
        """A run is done."""
        if not math.isnan(seconds := self.find(run).seconds_per_update):
            self.by_run[run] = seconds

    def of(self, run: SweepRun) -> float:
        """Seconds of an update of this run: the mean of the same arm's that are done, else of all; NaN without any."""
        same = [seconds for other, seconds in self.by_run.items() if other.arm == run.arm]
        found = same or list(self.by_run.values())
        return sum(found) / len(found) if found else math.nan


def seconds_left(left: Mapping[SweepRun, int], pace: Pace, jobs: int = 1) -> float:
    """How long the updates that are left take, ``jobs`` runs at once; NaN where no run is done."""
    return sum(updates * pace.of(run) for run, updates in left.items()) / jobs


def as_time(seconds: float) -> str:
    """0:12:30, or unknown."""
    return "unknown" if math.isnan(seconds) else str(timedelta(seconds=round(seconds)))


def outlook(sweep: Sweep, standings: Mapping[SweepRun, Standing], jobs: int) -> Iterator[str]:
    """The lines of ``relora-ds sweep --dry-run``."""
    pace = Pace()
    for run, at in standings.items():
        if at.state == "done":
            pace.learn(run)
    rows = [["run", "state", "updates left", "tokens left", "time in updates"]]
    left: dict[SweepRun, int] = {}
    tokens_left = 0
    for run, at in standings.items():
        updates = 0 if at.is_settled else max(0, run.config.total_updates - at.update)
        tokens = updates * run.config.train.global_batch * run.config.data.sequence_length
        if updates:
            left[run] = updates
        tokens_left += tokens
        rows.append([run.name, at.state, f"{updates:,}", f"{tokens:,}", as_time(updates * pace.of(run)) if updates else "–"])
    total = as_time(seconds_left(left, pace, jobs)) if left else "–"
    rows.append(["all", f"{len(left)} to train", f"{sum(left.values()):,}", f"{tokens_left:,}", total])
    yield from aligned(rows)
