"""A report on one run or several: ``report.md`` with a table, three pictures and what happened around every restart.

It reads only what a run leaves in its folder (``config.yaml``, ``metrics.jsonl``, ``restarts.jsonl``), so it works on a machine
without a GPU, on a run that is still going and on one that was killed.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from relora_ds.errors import ConfigError

Record = dict[str, Any]
Around = tuple[float | None, float | None, int]

WINDOW = 50  # updates that a mean of the loss covers: one update's loss is too noisy to compare
REACH = 100  # how far behind a restart its "after" window may end: the re-warmed learning rate needs some updates to act
LOG_RATIO = 10  # perplexities that differ by more than this factor are drawn on a log axis
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito: for any colour vision
AXES = {
    "loss": f"nats per token (line: mean of {WINDOW})",
    "lr": "lr (full-rank weights)",
    "lora_lr": "lora_lr (LoRA factors)",
    "eval_perplexity": "held-out perplexity",
}
PICTURES = {"loss": "Training loss", "learning_rate": "Learning rate", "perplexity": "Held-out perplexity"}
RUN_HEADER = (
    "run, method, updates, tokens, restarts, final loss, best held-out perplexity, last held-out perplexity, "
    "perplexity at the end of the warm start, median tokens/s, skipped updates"
)
RESTART_HEADER = "update, restart, loss before, loss after, change, pruned fraction, merge error, seconds, bytes"


@dataclass(frozen=True)
class Run:
    """What one run folder holds; ``label`` tells it from the other runs of the same report."""

    label: str
    method: str
    updates: list[Record]
    evals: list[Record]
    restarts: list[Record]

    @property
    def phase_changes(self) -> list[int]:
        """The updates that are the first of a new phase (not the first of the run)."""
        pairs = zip(self.updates, self.updates[1:], strict=False)
        return [after["update"] for before, after in pairs if before.get("phase") != after.get("phase")]


@dataclass(frozen=True)
class RestartRow:
    """One restart with the mean loss on its two sides; ``None`` stands for what the run folder does not tell."""

    update: int
    restart: int
    loss_before: float | None
    loss_after: float | None
    after_updates: int
    pruned_fraction: float | None
    merge_error: float | None
    seconds: float | None
    bytes: float | None

    @property
    def change(self) -> float | None:
        """Loss after minus loss before: negative where the loss went on falling."""
        return None if self.loss_before is None or self.loss_after is None else self.loss_after - self.loss_before


def finite(value: object) -> float | None:
    """``value`` as a float, or ``None`` for null, NaN, infinities and what is no number."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def column(records: Iterable[Record], key: str) -> list[float]:
    """One field of every record, with NaN (which plots as a gap) where it is missing or not finite."""
    numbers = (finite(record.get(key)) for record in records)
    return [math.nan if number is None else number for number in numbers]


def mean(values: Iterable[float]) -> float | None:
    """Mean of the finite values, ``None`` without any."""
    found = [value for value in values if math.isfinite(value)]
    return statistics.fmean(found) if found else None


def running_mean(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """Mean of each value and the ``window - 1`` before it (fewer at the start); NaN values do not count."""
    means = (mean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1))
    return [math.nan if one is None else one for one in means]


def loss_around_restarts(updates: Sequence[Record], restart_updates: Sequence[int]) -> list[Around]:
    """For each restart: the mean loss before it, the mean loss after it, and how many losses the second mean covers.

    A restart happens at the end of its update. *Before* is the mean of the ``WINDOW`` updates up to and including that one;
    *after* is the mean of the ``WINDOW`` updates that end at the next restart, at the last update or ``REACH`` updates on,
    whichever comes first. No update from before the restart counts as one after it, so the second mean may cover fewer.
    """
    losses = {record["update"]: loss for record in updates if (loss := finite(record.get("loss"))) is not None}
    last = max((record["update"] for record in updates), default=0)
    around = []
    for update, following in zip(restart_updates, [*restart_updates[1:], last], strict=False):
        end = min(following, last, update + REACH)
        before = [losses[at] for at in range(update - WINDOW + 1, update + 1) if at in losses]
        after = [losses[at] for at in range(max(update, end - WINDOW) + 1, end + 1) if at in losses]
        around.append((mean(before), mean(after), len(after)))
    return around


def restart_table(updates: Sequence[Record], restarts: Sequence[Record]) -> list[RestartRow]:
    """One row per restart, from the update records of ``metrics.jsonl`` and the records of ``restarts.jsonl``."""
    around = loss_around_restarts(updates, [record["update"] for record in restarts])
    measured = ("pruned_fraction", "merge_error", "seconds", "bytes")
    return [
        RestartRow(record["update"], record.get("restart", number), *losses, *(finite(record.get(key)) for key in measured))
        for number, (record, losses) in enumerate(zip(restarts, around, strict=True), start=1)
    ]


def verdict(rows: Sequence[RestartRow]) -> str:
    """Says in words whether the loss went on falling after the restarts."""
    if not rows:
        return "The run made no restart."
    changes = {str(row.restart): row.change for row in rows if row.change is not None}
    worse = [number for number, change in changes.items() if change >= 0]
    sentences = []
    if worse:
        sentences.append(f"The loss did **not** go on falling after restart {', '.join(worse)} ({len(worse)} of {len(changes)}).")
    elif changes:
        scope = "every restart" if len(changes) == len(rows) else "every restart that can be judged"
        sentences.append(f"The loss went on falling after {scope} ({len(changes)} of {len(rows)}).")
    if unknown := [str(row.restart) for row in rows if row.change is None]:
        sentences.append(f"Nothing can be said about restart {', '.join(unknown)}: no loss is recorded on both sides of it.")
    if short := [str(row.restart) for row in rows if 0 < row.after_updates < WINDOW]:
        sentences.append(f"The loss after restart {', '.join(short)} is a mean of fewer than {WINDOW} updates.")
    return " ".join(sentences)


def read_jsonl(path: Path) -> list[Record]:
    """The records of a file with one JSON object a line; a last line that a kill cut off is left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            int(record["update"])
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                problem = f"line {number} of {path} is no JSON object with an update number"
                raise ConfigError("RUN_DIR", str(path.parent), problem, "mend or remove that line") from None
        else:
            records.append(record)
    return records


def without_redone(records: Iterable[Record]) -> list[Record]:
    """The records without those that a resumed run wrote again.

    A run that goes on from a checkpoint repeats the updates since that checkpoint: where the update number steps back, what stood
    from there on is history that the weights no longer have.
    """
    kept: list[Record] = []
    for record in records:
        while kept and kept[-1]["update"] >= record["update"]:
            kept.pop()
        kept.append(record)
    return kept


def read_run(folder: Path, label: str | None = None) -> Run:
    """Reads one run folder; raises :class:`ConfigError` where it holds no update or a file of it is damaged."""
    metrics, restarts, config = (folder / name for name in ("metrics.jsonl", "restarts.jsonl", "config.yaml"))
    if not metrics.is_file():
        raise ConfigError("RUN_DIR", str(folder), "the folder has no metrics.jsonl", "name the folder that a training run wrote")
    records = read_jsonl(metrics)
    updates = without_redone(record for record in records if "loss" in record)
    if not updates:
        raise ConfigError("RUN_DIR", str(folder), "metrics.jsonl holds no update", "wait for the run's first update")
    settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    evals = without_redone(record for record in records if "eval_loss" in record)
    made = without_redone(read_jsonl(restarts)) if restarts.is_file() else []
    return Run(label or folder.resolve().name, str(settings.get("method", "–")), updates, evals, made)


def unique_labels(folders: Sequence[Path]) -> list[str]:
    """Folder names, with as many parent folders in front as it takes to tell them apart (the folders must differ)."""
    parts, depth = [folder.resolve().parts for folder in folders], 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _draw(axis: Axes, run: Run, key: str, colour: str, mark_colour: str) -> None:
    records = run.evals if key == "eval_perplexity" else run.updates
    at, values = column(records, "update"), column(records, key)
    if key == "loss":
        axis.plot(at, values, color=colour, linewidth=0.6, alpha=0.25)
        values = running_mean(values)
    axis.plot(at, values, color=colour, linewidth=1.7, marker="o" if key == "eval_perplexity" else None, markersize=3.5)
    for record in run.restarts:
        axis.axvline(record["update"], color=mark_colour, linestyle="--", linewidth=0.8, alpha=0.6, zorder=1)
    for update in run.phase_changes:
        axis.axvline(update, color=mark_colour, linestyle=":", linewidth=2, zorder=1)


def _plot(path: Path, runs: Sequence[Run], *keys: str) -> None:
    """Draws one panel per key, below each other over one axis of updates, and writes the picture."""
    figure = Figure(figsize=(9, 2 + 2.6 * len(keys)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes: list[Axes] = list(figure.subplots(len(keys), 1, sharex=True, squeeze=False)[:, 0])
    marks = {"restart": "--", "phase change": ":"}
    handles = [Line2D([], [], color="0.45", linestyle=style, label=name) for name, style in marks.items()]
    for position, run in enumerate(runs):
        colour = COLOURS[position % len(COLOURS)]
        # A dollar sign in a folder name would start a formula.
        handles.insert(position, Line2D([], [], color=colour, linewidth=2, label=run.label.replace("$", r"\$")))
        for axis, key in zip(axes, keys, strict=True):
            # One run's marks are grey: in the curve's own colour they would compete with it.
            _draw(axis, run, key, colour, "0.45" if len(runs) == 1 else colour)
    for axis, key in zip(axes, keys, strict=True):
        axis.set_ylabel(AXES[key])
        axis.grid(color="0.93")
    known = [value for run in runs for value in column(run.evals, "eval_perplexity") if value > 0]
    if "eval_perplexity" in keys and known and max(known) > LOG_RATIO * min(known):
        axes[0].set_yscale("log")
    axes[0].set_title(PICTURES[path.stem], loc="left", fontweight="bold")
    axes[-1].set_xlabel("update")
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def _table(header: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; a bar in a cell (a folder may have one in its name) would start another column."""
    names = [name.strip() for name in header.split(",")]
    lines = [names, ["---"] * len(names), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def _text(value: float | None, pattern: str) -> str:
    return "–" if value is None or not math.isfinite(value) else format(value, pattern)


def _run_row(run: Run) -> list[str]:
    last, perplexities = run.updates[-1], column(run.evals, "eval_perplexity")
    # Only a run that goes on with LoRA has a warm start: every evaluation of a full-rank run is of the "full" phase.
    warm = [record for record in run.evals if record.get("phase") == "full"] if run.phase_changes else []
    numbers = (
        (column([last], "tokens")[0], ",.0f"),
        (len(run.restarts), "d"),
        (mean(column(run.updates[-WINDOW:], "loss")), ".4f"),
        (min(filter(math.isfinite, perplexities), default=None), ",.2f"),
        ([math.nan, *perplexities][-1], ",.2f"),
        ([math.nan, *column(warm, "eval_perplexity")][-1], ",.2f"),
        (statistics.median(list(filter(math.isfinite, column(run.updates, "tokens_per_s"))) or [math.nan]), ",.0f"),
        (sum(bool(record.get("skipped")) for record in run.updates), "d"),
    )
    return [run.label, run.method, f"{last['update']:,}", *(_text(value, pattern) for value, pattern in numbers)]


def _restart_row(row: RestartRow) -> list[str]:
    losses = [_text(row.loss_before, ".4f"), _text(row.loss_after, ".4f"), _text(row.change, "+.4f")]
    merge = [
        _text(row.pruned_fraction, ".4f"),
        _text(row.merge_error, ".1e"),
        _text(row.seconds, ".2f"),
        _text(row.bytes, ",.0f"),
    ]
    return [f"{row.update:,}", str(row.restart), *losses, *merge]


def _markdown(runs: Sequence[Run]) -> str:
    names = ", ".join(run.label for run in runs)
    lines = [f"# Report on {names}", "", *_table(RUN_HEADER, map(_run_row, runs)), ""]
    lines += [f"Losses are nats per token; the final loss is the mean of the last {WINDOW} updates."]
    for stem, title in PICTURES.items():
        lines += ["", f"## {title}", "", f"![{title}](plots/{stem}.png)"]
    for run in runs:
        rows = restart_table(run.updates, run.restarts)
        lines += ["", f"## Restarts of {run.label}", "", verdict(rows)]
        lines += ["", *_table(RESTART_HEADER, map(_restart_row, rows))] if rows else []
    return "\n".join(lines) + "\n"


def report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Writes ``report.md`` and ``plots/*.png``, and returns the path of ``report.md``.

    Args:
        run_dirs: run folders; several are overlaid in the same pictures.
        out: where to write; the run folder itself by default, ``report/`` for several runs.
    """
    folders = list({folder.resolve(): folder for folder in map(Path, run_dirs)}.values())
    if not folders:
        raise ConfigError("RUN_DIR", "", "no run folder is given", "name at least one")
    runs = [read_run(folder, label) for folder, label in zip(folders, unique_labels(folders), strict=True)]
    target = out or (folders[0] if len(folders) == 1 else Path("report"))
    (target / "plots").mkdir(parents=True, exist_ok=True)
    has_lora = any("lora_lr" in record for run in runs for record in run.updates)
    for stem, keys in zip(PICTURES, (("loss",), ("lora_lr", "lr") if has_lora else ("lr",), ("eval_perplexity",)), strict=True):
        _plot(target / "plots" / f"{stem}.png", runs, *keys)
    (target / "report.md").write_text(_markdown(runs), encoding="utf-8")
    return target / "report.md"
