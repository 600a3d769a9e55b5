"""What stands in a report, in order: sections of sentences, tables, pictures and recipes. Markdown and HTML are both made of it.

Sentences are Markdown of three marks: ``**strong**``, ``*new word*`` and `` `code` ``.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from relora_ds.reports import facts, speed, traffic
from relora_ds.reports.figures import Picture
from relora_ds.reports.restarts import NEAR, REACH, WINDOW, RestartRow, evaluations_around, merge_remark, restart_table, verdict
from relora_ds.reports.run_records import Run, column, known, last, mean, median
from relora_ds.text.masking import masked
from relora_ds.units import human_bytes

INTRODUCTION = """ReLoRA trains a language model with less memory and less network traffic than training all of its weights
does. It keeps the large weight matrices W frozen, and trains beside each of them two thin matrices A and B, the *factors*: the
layer multiplies by W + s·B·A. Every so often a **restart** adds s·B·A to W and begins with fresh factors, so that many small
changes can add up to a large one. A **warm start** of ordinary training, of all weights at full rank, may come first."""
WORDS = """An **update** is one step of the optimizer. The **loss** is in nats per token: how badly the model predicts the next
token. Training loss is that of the text just trained on. Validation loss is that of text that it never trains on, and judges a
model better. **Perplexity** is exp of the validation loss."""
METHODS = {
    "relora": "ReLoRA",
    "lora": "LoRA, which is ReLoRA without restarts",
    "full": "ordinary training of all weights",
    "control": "ordinary training of a model with as few weights as ReLoRA trains",
    "low_rank": "training of the factors alone, without the matrices W",
}
RUN_COLUMNS = {
    "run": "",
    "method": "",
    "updates": ",d",
    "tokens": ",.0f",
    "restarts": "d",
    f"training loss (mean of the last {WINDOW})": ".4f",
}
RUN_COLUMNS |= {
    "validation loss (last)": ".4f",
    "validation perplexity (last)": ",.2f",
    "validation perplexity (best)": ",.2f",
    "validation perplexity (end of the warm start)": ",.2f",
    "median tokens/s": ",.0f",
    "skipped updates": "d",
}
"""Headings of the table of runs, with the format of their cells."""
RESTART_COLUMNS = {"update": ",d", "restart": "d"}
RESTART_COLUMNS |= {f"{NEAR} before": ".4f", f"{NEAR} after": ".4f", "change ": "+.4f"}
RESTART_COLUMNS |= {
    f"{WINDOW} before": ".4f",
    f"{WINDOW} after": ".4f",
    "change": "+.4f",
    f"{WINDOW + 1} to {REACH} after": ".4f",
}
RESTART_NOTE = f"""Training loss: means over so many updates before and after the restart, none across another one. The last
column's are the last {WINDOW} before the next restart, or the newest ones, where that comes sooner than {REACH}."""
CLIMB_NOTE = "After a restart the learning rate climbs from 0 again, so that the last column is the fairer one."
MERGE_COLUMNS = {
    "restart": "d",
    "pruned fraction": ".4f",
    "merged change": ".4f",
    "merge error": ".1e",
    "seconds": ".2f",
    "bytes": ",.0f",
}
MERGE_NOTE = """What each restart did. Pruned fraction: the share of the factors' Adam moments that was set to 0. Merged change: the
norm of s·B·A over that of W. Merge error: the share of that change that rounding lost. Seconds: how long the restart took. Bytes: the
payload of its collectives on rank 0."""
EVALUATION_NOTE = """Validation loss and perplexity at the evaluations nearest to each restart, and how many updates off these were.
Only one right before and one right after would show what the restart itself did."""
EVALUATION_COLUMNS = ["restart", "update", "updates before", "validation loss", "perplexity"]
EVALUATION_COLUMNS += ["updates after", "validation loss", "perplexity"]
PHASE_COLUMNS = ["phase", "updates", "time in updates", "median tokens/s", "sent by rank 0 in an update (median)"]
SPENT_COLUMNS = ["what", "time", "share"]


@dataclass(frozen=True)
class Table:
    """Cells, the heading first. ``is_upright``: the first column is what the rows are called, and all others are text."""

    rows: Sequence[Sequence[str]]
    is_upright: bool = False


@dataclass(frozen=True)
class Recipe:
    """A text that is long and shown as it is; ``name`` says where it lies."""

    name: str
    text: str


@dataclass(frozen=True)
class Panels:
    """Pictures that belong together: Markdown shows them as one file of this name, without its ending."""

    name: str
    title: str
    pictures: Sequence[Picture]


Block: TypeAlias = "str | Table | Picture | Panels | Recipe"


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it; a sentence is a ``str``."""

    title: str
    blocks: Sequence[Block]


def title(runs: Sequence[Run]) -> str:
    """The heading of a report on these runs."""
    return "Report on " + ", ".join(run.label for run in runs)


def sections(runs: Sequence[Run], pictures: Sequence[Picture]) -> list[Section]:
    """All of a report but its title."""
    found = [
        Section("What is ReLoRA?", [INTRODUCTION, WORDS]),
        Section("In short", [*map(_in_short, runs), table(RUN_COLUMNS, map(_run_row, runs))]),
        Section("What was run", [_upright(runs, {run.label: facts.what(run) for run in runs})]),
        Section("Where it was run", [_upright(runs, {run.label: facts.on_what(run) for run in runs})]),
        *(Section(picture.title, [picture, picture.caption]) for picture in pictures),
    ]
    for run in runs:
        found += [_restarts(run), _time(run)]
        found += [Section(f"Traffic of {run.label}", _traffic(run))] if run.starts else []
        sentence = speed.slowest_rank(run.ranks)
        found += [Section(f"Ranks of {run.label}", [sentence])] if sentence else []
        found += [_recipe(run)] if run.folder.config.is_file() else []
    return found


def table(columns: Mapping[str, str], rows: Iterable[Sequence[object]]) -> Table:
    """A table of values, written by the format of their column; NaN is not known."""
    cells = [[_text(value, pattern) for value, pattern in zip(row, columns.values(), strict=True)] for row in rows]
    return Table([[name.strip() for name in columns], *cells])


def _text(value: object, pattern: str) -> str:
    if isinstance(value, float) and math.isnan(value):
        return "–"
    return "0" if value == 0 and pattern.endswith("e") else format(value, pattern)


def _upright(runs: Sequence[Run], values: Mapping[str, Mapping[str, str]]) -> Table:
    """A row for each fact, a column for each run."""
    names = list(dict.fromkeys(name for facts_of_run in values.values() for name in facts_of_run))
    heading = ["", *(run.label for run in runs)]
    return Table(
        [heading, *([name, *(values[run.label].get(name, facts.UNKNOWN) for run in runs)] for name in names)], is_upright=True
    )


def _in_short(run: Run) -> str:
    """What a run did and came to, for somebody who reads no table."""
    done = [METHODS.get(run.method, run.method), f"updates {facts.progress(run)}"]
    done += [f"{len(run.restarts)} restart(s)"] if run.restarts else []
    evals = [record for record in run.evals if known(column([record], "eval_perplexity"))]
    told = [f"{record['eval_perplexity']:,.2f} after update {record['update']:,}" for record in evals[:1] + evals[1:][-1:]]
    reached = f" Validation perplexity: {', then '.join(told)}." if told else ""
    return f"{run.label}: {', '.join(done)}.{reached}"


def _run_row(run: Run) -> list[object]:
    perplexities = column(run.evals, "eval_perplexity")
    # Only a run that goes on with LoRA has a warm start: every evaluation of a full-rank run is of the "full" phase.
    warm = [record for record in run.evals if record.get("phase") == "full"] if run.phase_changes else []
    progress = [run.updates[-1]["update"], column(run.updates, "tokens")[-1], len(run.restarts)]
    quality = [mean(column(run.updates[-WINDOW:], "loss")), last(column(run.evals, "eval_loss")), last(perplexities)]
    quality += [min(known(perplexities), default=math.nan), last(column(warm, "eval_perplexity"))]
    skipped = sum(bool(record.get("skipped")) for record in run.updates)
    return [run.label, run.method, *progress, *quality, median(column(run.updates, "tokens_per_s")), skipped]


def _restarts(run: Run) -> Section:
    rows = restart_table(run.updates, run.restarts)
    blocks: list[Block] = [verdict(rows)]
    if rows:
        note = f"{RESTART_NOTE} {CLIMB_NOTE}" if run.climbs_after_restarts else RESTART_NOTE
        blocks += [note, table(RESTART_COLUMNS, map(_loss_row, rows))]
    if rows and run.evals:
        blocks += [EVALUATION_NOTE, Table([EVALUATION_COLUMNS, *evaluations_around(run)])]
    if rows:
        blocks += [MERGE_NOTE, table(MERGE_COLUMNS, map(_merge_row, rows))]
        blocks += [remark] if (remark := merge_remark(run)) else []
    return Section(f"Restarts of {run.label}", blocks)


def _loss_row(row: RestartRow) -> list[object]:
    losses = [row.near.before, row.near.after, row.near.change, row.wide.before, row.wide.after, row.wide.change, row.later.after]
    return [row.update, row.restart, *losses]


def _merge_row(row: RestartRow) -> list[object]:
    return [row.restart, row.pruned_fraction, row.merged_change, row.merge_error, row.seconds, row.bytes]


def _time(run: Run) -> Section:
    rows = []
    for phase in speed.phases(run):
        seconds = "–" if math.isnan(phase.seconds) else speed.duration(phase.seconds)
        sent = "–" if math.isnan(phase.sent_bytes) else human_bytes(phase.sent_bytes)
        rows.append([phase.title, f"{phase.first:,} to {phase.last:,}", seconds, _text(phase.tokens_per_s, ",.0f"), sent])
    blocks: list[Block] = [Table([PHASE_COLUMNS, *rows])]
    if spent := speed.spent(run):
        starts = "" if len(run.begun) == 1 else f" over {len(run.begun)} starts, with updates that were done again"
        blocks += [f"Where the time of rank 0 went{starts}:", Table([SPENT_COLUMNS, *spent])]
    blocks += [sentence for sentence in (speed.lost_time(run), traffic.saved_bytes(run)) if sentence]
    return Section(f"Time and bytes of {run.label}", blocks)


def _traffic(run: Run) -> list[Block]:
    blocks: list[Block] = []
    for start in run.starts:
        blocks += [f"{traffic.title(start)}.", Table(traffic.rows(start))]
    return [*blocks, traffic.note(run.starts)]


def _recipe(run: Run) -> Section:
    ranks = facts.world_size(run)
    command = f"relora-ds train {shlex.quote(str(run.folder.config))} --nproc {ranks} run.dir=runs/again"
    if isinstance(run.setting("deepspeed"), str) and run.folder.deepspeed.is_file():  # a file that lay beside another recipe
        command += f" {shlex.quote(f'deepspeed={run.folder.deepspeed}')}"
    told = (
        "The recipe as the run was started, with every setting that was replaced on the command line. To train it again, "
        f"from the folder in which relora_ds and its data lie (on several nodes by their launcher): `{command}`"
    )
    blocks: list[Block] = [told]
    if commands := facts.commands(run):
        blocks = [f"The run was started by {', then by '.join(commands)}.", *blocks]
    text = masked(run.folder.config.read_text(encoding="utf-8", errors="replace"))  # the page may be sent to others
    return Section(f"Recipe of {run.label}", [*blocks, Recipe(str(run.folder.config), text)])
