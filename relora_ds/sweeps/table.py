"""A sweep as tables: a row an arm in sweep.md and sweep.csv, a row a run in runs.csv; the curves over each other."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from relora_ds.errors import ConfigError
from relora_ds.paths import make_folder
from relora_ds.reports.contents import Section, Table
from relora_ds.reports.figures import Picture
from relora_ds.reports.report import report
from relora_ds.reports.run_records import known
from relora_ds.reports.tables import markdown
from relora_ds.run.folder import write_atomically
from relora_ds.sweeps import pictures
from relora_ds.sweeps.events import Events
from relora_ds.sweeps.pictures import Evaluations
from relora_ds.sweeps.runs import Figures, Standing, figures, standing
from relora_ds.sweeps.sweep_file import Sweep, SweepRun
from relora_ds.units import human_bytes

MEASURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "perplexity": ("validation perplexity", "{:,.2f}".format),
    "trainable_parameters": ("trainable parameters", "{:,.0f}".format),
    "tokens": ("tokens", "{:,.0f}".format),
    "seconds": ("seconds in updates", "{:,.1f}".format),
    "sent_bytes_per_update": ("sent per update", human_bytes),
    "sent_bytes": ("sent in all", human_bytes),
    "peak_memory_bytes": ("peak memory", human_bytes),
}
"""Fields of :class:`Figures`: what they are called, and how they are written."""
NOT_DONE = "Runs that are not done, or cannot be read"
NOTE = """Mean ± sample standard deviation over the seeds that are done. The perplexity is that of the last evaluation; with (1 of 2)
behind it, only so many of these seeds have one that is a number. Seconds are those of updates, restarts included, without starts
and evaluations. Bytes are what rank 0 sent for updates, as rings send them. Peak memory is what PyTorch had allocated on rank 0's
GPU; without one, the resident memory of its whole process."""


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation of the values that are known; NaN where there are none, or only one."""
    numbers = known(values)
    mean = statistics.fmean(numbers) if numbers else math.nan
    return mean, statistics.stdev(numbers) if len(numbers) > 1 else math.nan


def summary(sweep: Sweep, standings: Mapping[SweepRun, Standing], found: Mapping[SweepRun, Figures]) -> list[dict[str, object]]:
    """A row for each arm, as sweep.csv has it: how many runs, how many of them are done, mean and spread of what these measured; how
    many of them have a perplexity."""
    rows = []
    for arm in sweep.arms:
        runs = sweep.of(arm)
        done = [run for run in runs if standings[run].state == "done"]
        row: dict[str, object] = {"arm": arm, "n": len(done), "runs": len(runs)}
        for measure in MEASURES:
            mean, spread = mean_and_spread([getattr(found[run], measure) for run in done])
            row |= {f"{measure}_mean": mean, f"{measure}_sd": spread}
        row["judged"] = sum(not math.isnan(found[run].perplexity) for run in done)
        rows.append(row)
    return rows


def each(standings: Mapping[SweepRun, Standing], found: Mapping[SweepRun, Figures]) -> list[dict[str, object]]:
    """A row for each run, as runs.csv has it."""
    return [
        {
            "arm": run.arm,
            "seed": run.seed,
            "state": at.state,
            "update": found[run].update,
            "updates": run.config.total_updates,
            **{measure: getattr(found[run], measure) for measure in MEASURES},
            "error": at.error,
            "folder": str(run.folder.path),
        }
        for run, at in standings.items()
    ]


def as_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """What is not known is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return file.getvalue()


def _cell(value: object) -> object:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else int(value) if value.is_integer() else value


def arm_table(rows: Sequence[Mapping[str, object]]) -> list[list[str]]:
    """The cells of the table of arms, its heading first. A measure that no run recorded has no column."""
    measures = [measure for measure in MEASURES if any(not math.isnan(_number(row[f"{measure}_mean"])) for row in rows)]
    cells = [["arm", "runs done", *(MEASURES[measure][0] for measure in measures)]]
    for row in rows:
        of = "" if row["n"] == row["runs"] else f" of {row['runs']}"
        cells.append([str(row["arm"]), f"{row['n']}{of}", *(_mean_cell(row, measure) for measure in measures)])
    return cells


def _mean_cell(row: Mapping[str, object], measure: str) -> str:
    write = MEASURES[measure][1]
    mean, spread = _number(row[f"{measure}_mean"]), _number(row[f"{measure}_sd"])
    if math.isnan(mean):
        return "–"
    cell = write(mean) if math.isnan(spread) or spread == 0 else f"{write(mean)} ± {write(spread)}"
    # a run whose perplexity is no number must not pass for one that is as good as the others
    return f"{cell} ({row['judged']} of {row['n']})" if measure == "perplexity" and row["judged"] != row["n"] else cell


def _number(value: object) -> float:
    return value if isinstance(value, float) else math.nan


def write(sweep: Sweep) -> tuple[Path, list[list[str]]]:
    """Writes sweep.md, sweep.csv, runs.csv and, as soon as a run has an update, report.md with its plots, and report.html.

    Returns:
        The path of sweep.md, and the cells of its table.

    Raises:
        ConfigError: the folder cannot be written.
    """
    make_folder("dir", sweep.folder)
    events = Events(sweep.folder)
    standings = {run: standing(run, events) for run in sweep.runs}
    found = {run: figures(run) for run in sweep.runs}
    for run, at in standings.items():
        if at.state == "done" and found[run].problem:
            standings[run] = replace(at, error=found[run].problem)
    rows = summary(sweep, standings, found)
    table = arm_table(rows)
    begun, drawn = [run.folder.path for run in sweep.runs if found[run].update], _pictures(sweep, standings, found)
    page = sweep.folder / "sweep.md"
    try:
        if begun:
            first = _sections(sweep, table, standings, drawn)
            report(begun, sweep.folder, title=f"Sweep {sweep.folder.name}", first=first, key="dir")
        write_atomically(sweep.folder / "sweep.csv", as_csv(rows))
        write_atomically(sweep.folder / "runs.csv", as_csv(each(standings, found)))
        write_atomically(page, "\n".join(_page(sweep, table, standings, drawn if begun else None)))
    except OSError as error:
        raise ConfigError("dir", str(sweep.folder), f"cannot be written: {error.strerror}", "name another folder") from None
    return page, table


def _page(
    sweep: Sweep, table: list[list[str]], standings: Mapping[SweepRun, Standing], drawn: Sequence[Picture] | None
) -> list[str]:
    """The lines of sweep.md; ``drawn``: None where there is no report to point at."""
    lines = [f"# Sweep {sweep.folder.name}", "", _recipes(sweep), "", *markdown(table), "", NOTE, ""]
    if rest := not_done(standings):
        lines += [f"## {NOT_DONE}", "", *markdown(rest), ""]
    if drawn is not None:
        for picture in drawn:
            lines += [f"## {picture.title}", "", f"![](plots/{picture.name}.png)", "", picture.caption, ""]
        lines += ["Every run: [report.html](report.html), [report.md](report.md).", ""]
    return lines


def _sections(
    sweep: Sweep, table: list[list[str]], standings: Mapping[SweepRun, Standing], drawn: Sequence[Picture]
) -> list[Section]:
    """What the pages of all runs say first: what this command has beyond a report."""
    sections = [Section("The arms of this sweep", [_recipes(sweep), Table(table), NOTE])]
    if rest := not_done(standings):
        sections.append(Section(NOT_DONE, [Table(rest)]))
    return sections + [Section(picture.title, [picture, picture.caption]) for picture in drawn]


def _pictures(sweep: Sweep, standings: Mapping[SweepRun, Standing], found: Mapping[SweepRun, Figures]) -> list[Picture]:
    """Where the arms ended, as soon as a run is done, and how they came there, as soon as one was evaluated.

    An arm's curve is that of its runs that are done, or while none is, of those that are under way.
    """
    ended: dict[str, list[float]] = {}
    evaluated: dict[str, list[Evaluations]] = {}
    for arm in sweep.arms:
        begun = [run for run in sweep.of(arm) if found[run].evaluations]
        done = [run for run in begun if standings[run].state == "done"]
        ended[arm] = [found[run].perplexity for run in done]
        if begun:
            evaluated[arm] = [found[run].evaluations for run in done or begun]
    drawn = [pictures.at_the_end(ended)] if any(map(known, ended.values())) else []
    return drawn + ([pictures.on_the_way(evaluated)] if evaluated else [])


def _recipes(sweep: Sweep) -> str:
    return f"Recipe: {', '.join(f'`{recipe}`' for recipe in sweep.recipes)}."


def not_done(standings: Mapping[SweepRun, Standing]) -> list[list[str]]:
    """The cells of the table of runs that are not done, or cannot be read, its heading first; nothing where there are none."""
    rest = [
        [run.name, at.state, f"{at.update:,}", at.error or "–"] for run, at in standings.items() if at.state != "done" or at.error
    ]
    return [["run", "state", "checkpoint at update", "error"], *rest] if rest else []
