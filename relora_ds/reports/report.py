"""A report on one run or several: ``report.md`` with a table, three pictures and what happened around every restart.

It reads only what a run leaves in its folder, so it works without a GPU, on a run that is still going and on one that was killed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from relora_ds.errors import ConfigError
from relora_ds.paths import make_folder
from relora_ds.reports.tables import markdown
from relora_ds.run.folder import read_jsonl, read_traffic
from relora_ds.text.yaml_text import read_yaml_file
from relora_ds.units import human_bytes

Record = dict[str, Any]

WINDOW = 50  # updates that a mean of the loss covers: one update's loss is too noisy to compare
REACH = 100  # how far behind a restart its "after" window may end: the re-warmed learning rate needs some updates to act
LOG_RATIO = 10  # perplexities that differ by more than this factor are drawn on a log axis
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito: for any colour vision
UNITS = {"loss": f"nats per token (line: mean of {WINDOW})", "lr": "lr (full-rank weights)", "lora_lr": "lora_lr (LoRA factors)"}
LAGS = 0.1  # a rank whose own work takes longer than the median rank's by this share is said to lag
PICTURES = {"loss": "Training loss", "learning_rate": "Learning rate", "perplexity": "Validation perplexity"}
# The columns of the two tables, with the format of their cells.
RUN_COLUMNS = {"run": "", "method": "", "updates": ",d", "tokens": ",.0f", "restarts": "d", "final loss": ".4f"}
RUN_COLUMNS |= {
    "best PPL": ",.2f",
    "last PPL": ",.2f",
    "warm-start PPL": ",.2f",
    "median tokens/s": ",.0f",
    "skipped updates": "d",
}
RESTART_COLUMNS = {"update": ",d", "restart": "d", "loss_before": ".4f", "loss_after": ".4f", "change": "+.4f"}
RESTART_COLUMNS |= {"pruned_fraction": ".4f", "merge_error": ".1e", "seconds": ".2f", "bytes": ",.0f"}
TRAFFIC_COLUMNS = {"updates": "", "ranks": "d", "nodes": "d", "per update": "", "gradients": "", "parameters": "", "restarts": ""}
TRAFFIC_COLUMNS |= {"evaluation, checkpoints": "", "counted": "", "on the wire": ""}
OF_A_START = ("first_update", "last_update", "world_size", "wire_bytes_per_update", "wire_bytes", "nodes")
TRAFFIC_NOTE = """One line for each start of the run. Bytes that rank 0 sent, as rings send them; counted and on the wire: those of
all ranks, and of all nodes' interfaces (headers and other programs' included, without what stays inside a node). ≥: there were other
ways than the interfaces that could be read (`unseen` in traffic.json)."""
NOTE = f"""Losses are nats per token; the final loss is the mean of the last {WINDOW} updates. PPL is the perplexity on validation
text, the warm-start one that of the last evaluation before LoRA. The loss axis fits all but the first 5 % of the updates."""


@dataclass(frozen=True)
class Run:
    """What one run folder holds; ``label`` tells it from the other runs of the same report."""

    label: str
    method: str
    updates: list[Record]
    evals: list[Record]
    restarts: list[Record]
    ranks: list[Record]
    starts: list[Record] = field(default_factory=list)

    @property
    def phase_changes(self) -> list[int]:
        """The updates that are the first of a new phase (not the first of the run)."""
        pairs = zip(self.updates, self.updates[1:], strict=False)
        return [after["update"] for before, after in pairs if before.get("phase") != after.get("phase")]


@dataclass(frozen=True)
class RestartRow:
    """One restart with the mean loss on its two sides; NaN stands for what the run folder does not tell."""

    update: int
    restart: int
    loss_before: float
    loss_after: float
    after_updates: int
    pruned_fraction: float
    merge_error: float
    seconds: float
    bytes: float

    @property
    def change(self) -> float:
        """Loss after minus loss before: negative where the loss went on falling."""
        return self.loss_after - self.loss_before


def column(records: Iterable[Record], key: str) -> list[float]:
    """One field of every record, with NaN (which plots as a gap) where it is missing, null or not finite."""
    values = (record.get(key) for record in records)
    return [float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan for value in values]


def known(values: Iterable[float]) -> list[float]:
    """The values that are not NaN."""
    return [value for value in values if not math.isnan(value)]


def mean(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN without any."""
    return statistics.fmean(known(values) or [math.nan])


def running_mean(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """Mean of each value and the ``window - 1`` before it (fewer at the start); NaN values do not count."""
    return [mean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def loss_around_restarts(updates: Sequence[Record], restart_updates: Sequence[int]) -> list[tuple[float, float, int]]:
    """For each restart: the mean loss before it, the mean loss after it, and how many losses the second mean covers.

    A restart happens at the end of its update. *Before* is the mean of the ``WINDOW`` updates up to and including that one;
    *after* is the mean of the ``WINDOW`` updates that end at the next restart, at the last update or ``REACH`` updates on,
    whichever comes first. No update from before the restart counts as one after it, so the second mean may cover fewer.
    """
    losses = dict(zip(column(updates, "update"), column(updates, "loss"), strict=True))
    last = int(max(losses, default=0))
    around = []
    for update, following in zip(restart_updates, [*restart_updates[1:], last], strict=False):
        end = min(following, last, update + REACH)
        before = mean(losses.get(at, math.nan) for at in range(update - WINDOW + 1, update + 1))
        after = known(losses.get(at, math.nan) for at in range(max(update, end - WINDOW) + 1, end + 1))
        around.append((before, mean(after), len(after)))
    return around


def restart_table(updates: Sequence[Record], restarts: Sequence[Record]) -> list[RestartRow]:
    """One row per restart, from the update records of ``metrics.jsonl`` and the records of ``restarts.jsonl``."""
    around = loss_around_restarts(updates, [record["update"] for record in restarts])
    measured = [column(restarts, key) for key in ("pruned_fraction", "merge_error", "seconds", "bytes")]
    rows = enumerate(zip(restarts, around, zip(*measured, strict=True), strict=True), start=1)
    return [RestartRow(record["update"], record.get("restart", at), *losses, *more) for at, (record, losses, more) in rows]


def verdict(rows: Sequence[RestartRow]) -> str:
    """Says in words whether the loss went on falling after the restarts."""
    if not rows:
        return "The run made no restart."
    changes = {str(row.restart): row.change for row in rows if not math.isnan(row.change)}
    worse = [number for number, change in changes.items() if change >= 0]
    sentences = []
    if worse:
        sentences.append(f"The loss did **not** go on falling after restart {', '.join(worse)} ({len(worse)} of {len(changes)}).")
    elif changes:
        scope = "every restart" if len(changes) == len(rows) else "every restart that can be judged"
        sentences.append(f"The loss went on falling after {scope} ({len(changes)} of {len(rows)}).")
    if unknown := [str(row.restart) for row in rows if math.isnan(row.change)]:
        sentences.append(f"Nothing can be said about restart {', '.join(unknown)}: no loss is recorded on both sides of it.")
    if short := [str(row.restart) for row in rows if 0 < row.after_updates < WINDOW]:
        sentences.append(f"The loss after restart {', '.join(short)} is a mean of fewer than {WINDOW} updates.")
    return " ".join(sentences)


def slowest_rank(ranks: Sequence[Record]) -> str:
    """Says which rank's own work (batches and forward passes) takes longest; empty where no two ranks were timed.

    Every record is compared with its own median, and a rank on another node (after a resume) counts as another one.
    """
    slower: dict[tuple[int, str], list[float]] = {}
    for record in ranks:
        median = statistics.median_low(record["forward_s"])  # a rank's own: of two ranks, the faster one
        for rank, (host, seconds) in enumerate(zip(record["hosts"], record["forward_s"], strict=True)):
            slower.setdefault((rank, host), []).append(seconds / median - 1)
    if not slower or max(slower)[0] == 0:
        return ""
    rank, host = max(slower, key=lambda who: mean(slower[who]))
    share = mean(slower[rank, host])
    if share < LAGS:
        return f"No rank lags: the slowest, rank {rank} on {host}, takes {share:.0%} longer than the median rank."
    return f"Rank {rank} on {host} **lags**: its batches and forward passes take {share:.0%} longer than the median rank's."


def traffic_row(start: Record) -> list[object]:
    """One start of a run, from an entry of traffic.json."""
    by_purpose, nodes = start["wire_bytes"], start["nodes"]
    rest = by_purpose.get("evaluation", 0) + by_purpose.get("checkpoint", 0)
    sums = [sum(node[key] for node in nodes) for key in ("counted_bytes", "sent_bytes")]
    restarts = by_purpose.get("restart", 0) + by_purpose.get("verify", 0)
    parts = [by_purpose.get("gradient", 0), by_purpose.get("parameters", 0), restarts, rest, *sums]
    span = f"{start['first_update']:,} to {start['last_update']:,}"
    *cells, wire = map(human_bytes, (start["wire_bytes_per_update"], *parts))
    return [span, start["world_size"], len(nodes), *cells, f"≥ {wire}" if start.get("unseen") else wire]


def without_redone(records: Iterable[Record], last: float = math.inf) -> list[Record]:
    """The records up to update ``last``, less those that a resumed run wrote a second time: the later ones count."""
    kept: list[Record] = []
    for record in records:
        while kept and kept[-1]["update"] >= record["update"]:
            kept.pop()
        kept.append(record)
    return [record for record in kept if record["update"] <= last]


def _is_of_ranks(record: Record) -> bool:
    hosts, seconds = record.get("hosts"), record.get("forward_s")
    if not isinstance(hosts, list) or not isinstance(seconds, list) or not hosts or len(hosts) != len(seconds):
        return False
    return all(isinstance(value, (int, float)) and value > 0 for value in seconds)


def read_run(folder: Path, label: str | None = None) -> Run:
    """Reads one run folder; raises :class:`ConfigError` where it holds no update or a file of it is damaged."""
    metrics, config = folder / "metrics.jsonl", folder / "config.yaml"
    if not metrics.is_file():
        raise ConfigError("RUN_DIR", str(folder), "the folder has no metrics.jsonl", "name the folder that a training run wrote")
    records = read_jsonl(metrics)
    updates = without_redone(record for record in records if "loss" in record)
    if not updates:
        raise ConfigError("RUN_DIR", str(folder), "metrics.jsonl holds no update", "wait for the run's first update")
    last = updates[-1]["update"]
    evals = without_redone((record for record in records if "eval_loss" in record), last)
    logs = (folder / name for name in ("restarts.jsonl", "ranks.jsonl"))
    restarts, ranks = (without_redone(read_jsonl(log), last) if log.is_file() else [] for log in logs)
    for record in ranks:
        if not _is_of_ranks(record):
            problem = f"ranks.jsonl tells of update {record['update']} without hosts and their seconds"
            raise ConfigError("RUN_DIR", str(folder), problem, "mend or remove that line")
    starts = [start for start in read_traffic(folder / "traffic.json") if start.keys() >= set(OF_A_START)]
    settings = read_yaml_file(config, "RUN_DIR") if config.is_file() else {}
    method = settings.get("method", "–") if isinstance(settings, dict) else "–"
    return Run(label or folder.resolve().name, str(method), updates, evals, restarts, ranks, starts)


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
    # The marks lie above the grid and below the curves.
    for record in run.restarts:
        axis.axvline(record["update"], color=mark_colour, linestyle="--", linewidth=0.8, alpha=0.6, zorder=1.8)
    for update in run.phase_changes:
        axis.axvline(update, color=mark_colour, linestyle=":", linewidth=2, zorder=1.8)


def _plot(path: Path, runs: Sequence[Run], *keys: str) -> None:
    """Draws one panel per key, below each other over one axis of updates, and writes the picture."""
    figure = Figure(figsize=(9, 2 + 2.6 * len(keys)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes: list[Axes] = list(figure.subplots(len(keys), 1, sharex=True, squeeze=False)[:, 0])
    for axis, key in zip(axes, keys, strict=True):
        axis.set_ylabel(UNITS.get(key, "perplexity"))
        axis.grid(color="0.93")
        for run, colour in zip(runs, cycle(COLOURS), strict=False):
            # One run's marks are grey: in the curve's own colour they would compete with it.
            _draw(axis, run, key, colour, "0.45" if len(runs) == 1 else colour)
        _scale(axis, runs, key)
    axes[0].set_title(PICTURES[path.stem], loc="left", fontweight="bold")
    axes[-1].set_xlabel("update")
    # A dollar sign in a folder name would start a formula.
    names = [run.label.replace("$", r"\$") for run in runs]
    handles = [Line2D([], [], linewidth=2, color=colour, label=name) for name, colour in zip(names, cycle(COLOURS), strict=False)]
    handles.append(Line2D([], [], color="0.45", linestyle="--", label="restart"))
    handles.append(Line2D([], [], color="0.45", linestyle=":", label="phase change"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def _scale(axis: Axes, runs: Sequence[Run], key: str) -> None:
    if key == "loss":
        # The steep fall of the first updates may leave the picture: it would flatten all that follows.
        shown = known(loss for run in runs for loss in column(run.updates[len(run.updates) // 20 :], key)) or [0.0]
        margin = 0.05 * (max(shown) - min(shown)) or 0.1
        axis.set_ylim(min(shown) - margin, max(shown) + margin)
    elif key == "eval_perplexity":
        shown = known(value for run in runs for value in column(run.evals, key)) or [1.0]
        axis.set_yscale("log" if max(shown) > LOG_RATIO * min(shown) else "linear")


def _table(columns: dict[str, str], rows: Iterable[Sequence[object]]) -> list[str]:
    cells = [[_text(value, pattern) for value, pattern in zip(row, columns.values(), strict=True)] for row in rows]
    return markdown([[name.replace("_", " ") for name in columns], *cells])


def _text(value: object, pattern: str) -> str:
    return "–" if isinstance(value, float) and math.isnan(value) else format(value, pattern)


def _run_row(run: Run) -> list[object]:
    perplexities, speeds = column(run.evals, "eval_perplexity"), column(run.updates, "tokens_per_s")
    # Only a run that goes on with LoRA has a warm start: every evaluation of a full-rank run is of the "full" phase.
    warm = [record for record in run.evals if record.get("phase") == "full"] if run.phase_changes else []
    progress = [run.updates[-1]["update"], column(run.updates, "tokens")[-1], len(run.restarts)]
    best, last = min(known(perplexities), default=math.nan), (perplexities or [math.nan])[-1]
    quality = [mean(column(run.updates[-WINDOW:], "loss")), best, last, (column(warm, "eval_perplexity") or [math.nan])[-1]]
    skipped = sum(bool(record.get("skipped")) for record in run.updates)
    return [run.label, run.method, *progress, *quality, statistics.median(known(speeds) or [math.nan]), skipped]


def _markdown(runs: Sequence[Run]) -> str:
    lines = ["# Report on " + ", ".join(run.label for run in runs), "", *_table(RUN_COLUMNS, map(_run_row, runs)), "", NOTE]
    for stem, title in PICTURES.items():
        lines += ["", f"## {title}", "", f"![{title}](plots/{stem}.png)"]
    for run in runs:
        rows = restart_table(run.updates, run.restarts)
        lines += ["", f"## Restarts of {run.label}", "", verdict(rows)]
        cells = ([getattr(row, name) for name in RESTART_COLUMNS] for row in rows)
        lines += ["", *_table(RESTART_COLUMNS, cells)] if rows else []
        if run.starts:
            rows_of_traffic = _table(TRAFFIC_COLUMNS, map(traffic_row, run.starts))
            lines += ["", f"## Traffic of {run.label}", "", *rows_of_traffic, "", TRAFFIC_NOTE]
        if sentence := slowest_rank(run.ranks):
            lines += ["", f"## Ranks of {run.label}", "", sentence]
    return "\n".join(lines) + "\n"


def report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Writes ``report.md`` and ``plots/*.png``, and returns the path of ``report.md``.

    Several runs are overlaid. Without ``out``, one run's report goes to its own folder and that of several to ``report/``.
    """
    folders = list({folder.resolve(): folder for folder in map(Path, run_dirs)}.values())
    if not folders:
        raise ConfigError("RUN_DIR", "", "no run folder is given", "name at least one")
    runs = [read_run(folder, label) for folder, label in zip(folders, unique_labels(folders), strict=True)]
    target = out or (folders[0] if len(folders) == 1 else Path("report"))
    make_folder("--out", target / "plots")
    has_lora = any("lora_lr" in record for run in runs for record in run.updates)
    for stem, keys in zip(PICTURES, (("loss",), ("lora_lr", "lr") if has_lora else ("lr",), ("eval_perplexity",)), strict=True):
        _plot(target / "plots" / f"{stem}.png", runs, *keys)
    (target / "report.md").write_text(_markdown(runs), encoding="utf-8")
    return target / "report.md"
