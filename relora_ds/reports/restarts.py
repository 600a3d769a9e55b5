"""What happened around every restart: the loss right before and after it, the merge, the evaluations that are nearest."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from relora_ds.reports.run_records import Record, Run, column, known, mean
from relora_ds.run import manifest as manifests
from relora_ds.run.manifest import ManifestError

NEAR = 10
"""Updates of the means right before and right after a restart: few enough to show a spike."""
WINDOW = 50
"""Updates of a mean in which the noise of single updates has gone."""
REACH = 100
"""How far behind a restart its "later" window may end: the re-warmed learning rate needs some updates to act."""
MOST_NAMED = 8
"""Restarts that a sentence names one by one; more are counted."""


class Around(NamedTuple):
    """The mean loss on the two sides of a restart; NaN stands for what the run folder does not tell.

    Attributes:
        before: over the updates up to and including that of the restart, which happens at its end.
        after: over the updates that follow.
        num_after: how many losses ``after`` covers.
    """

    before: float
    after: float
    num_after: int

    @property
    def change(self) -> float:
        """After minus before: negative where the loss fell."""
        return self.after - self.before


@dataclass(frozen=True)
class RestartRow:
    """One restart.

    Attributes:
        update, restart: the update that it followed, and its number.
        near, wide: the loss right before and right after it, over :data:`NEAR` and over :data:`WINDOW` updates.
        later: as :func:`loss_around_restarts` has it.
        noise: by how much two means of :data:`NEAR` updates differ by chance, as :func:`noise_of_means` has it.
        pruned_fraction, merged_change, merge_error, seconds, bytes: as in restarts.jsonl.
    """

    update: int
    restart: int
    near: Around
    wide: Around
    later: Around
    noise: float
    pruned_fraction: float
    merged_change: float
    merge_error: float
    seconds: float
    bytes: float


def loss_around_restarts(updates: Sequence[Record], restart_updates: Sequence[int]) -> list[Around]:
    """For each restart the mean loss before it, and that some way behind it, when the learning rate has climbed again.

    *Before* is the mean of the :data:`WINDOW` updates up to and including that of the restart; *after* is the mean of the ``WINDOW``
    updates that end at the next restart, at the last update or :data:`REACH` updates on, whichever comes first. No update from before
    the restart counts as one after it, so the second mean may cover fewer. What happens right at the restart is mostly left out of
    it: for that there is :func:`right_at_restarts`.
    """
    losses = dict(zip(column(updates, "update"), column(updates, "loss"), strict=True))
    newest = int(max(losses, default=0))
    around = []
    for update, following in zip(restart_updates, [*restart_updates[1:], newest], strict=False):
        end = min(following, newest, update + REACH)
        before = mean(losses.get(at, math.nan) for at in range(update - WINDOW + 1, update + 1))
        after = known(losses.get(at, math.nan) for at in range(max(update, end - WINDOW) + 1, end + 1))
        around.append(Around(before, mean(after), len(after)))
    return around


def right_at_restarts(updates: Sequence[Record], restart_updates: Sequence[int], window: int) -> list[Around]:
    """For each restart the mean loss of the ``window`` updates that end with its own, and of as many that follow it.

    Neither reaches across another restart, so both may cover fewer.
    """
    losses = dict(zip(column(updates, "update"), column(updates, "loss"), strict=True))
    newest = int(max(losses, default=0))
    around = []
    neighbours = zip([0, *restart_updates], restart_updates, [*restart_updates[1:], newest], strict=False)
    for previous, update, following in neighbours:
        before = mean(losses.get(at, math.nan) for at in range(max(previous, update - window) + 1, update + 1))
        after = known(losses.get(at, math.nan) for at in range(update + 1, min(following, update + window) + 1))
        around.append(Around(before, mean(after), len(after)))
    return around


def noise_of_means(updates: Sequence[Record], update: int) -> float:
    """The standard deviation of the difference of two means of :data:`NEAR` losses, from the :data:`WINDOW` updates up to ``update``.

    It is judged by the differences of successive losses, less their mean, so that a steady fall is no noise. NaN where too few are
    known.
    """
    losses = [
        loss for at, loss in zip(column(updates, "update"), column(updates, "loss"), strict=True) if 0 <= update - at < WINDOW
    ]
    steps = known(after - before for before, after in pairwise(losses))
    return statistics.stdev(steps) / math.sqrt(NEAR) if len(steps) > 1 else math.nan


def restart_table(updates: Sequence[Record], restarts: Sequence[Record]) -> list[RestartRow]:
    """One row per restart, from the update records of ``metrics.jsonl`` and the records of ``restarts.jsonl``."""
    at = [record["update"] for record in restarts]
    near, wide = (right_at_restarts(updates, at, window) for window in (NEAR, WINDOW))
    noise = [noise_of_means(updates, update) for update in at]
    fields = ("pruned_fraction", "merged_change", "merge_error", "seconds", "bytes")
    measured = zip(*(column(restarts, key) for key in fields), strict=True)
    losses = zip(near, wide, loss_around_restarts(updates, at), noise, strict=True)
    rows = enumerate(zip(restarts, losses, measured, strict=True), start=1)
    return [RestartRow(record["update"], number_of(record, at), *means, *more) for at, (record, means, more) in rows]


def number_of(restart: Record, otherwise: int) -> int:
    """Which restart a record of restarts.jsonl is about; ``otherwise`` where it does not tell."""
    number = restart.get("restart")
    return number if isinstance(number, int) else otherwise


def verdict(rows: Sequence[RestartRow]) -> str:
    """Says in words whether the loss fell or rose right at the restarts."""
    if not rows:
        return "The run made no restart."
    sentences = [
        _directions(
            {str(row.restart): row.near.change for row in rows},
            f"Right at the restart, mean of the {NEAR} updates before and after it",
        ),
        _by_chance(rows),
        _directions({str(row.restart): row.wide.change for row in rows}, f"Mean of the {WINDOW} updates before and after it"),
    ]
    if unknown := [str(row.restart) for row in rows if math.isnan(row.wide.change)]:
        sentences.append(f"Nothing can be said about restart {_names(unknown)}: no loss is recorded on both sides of it.")
    if short := [str(row.restart) for row in rows if 0 < row.wide.num_after < WINDOW]:
        sentences.append(f"The loss after restart {_names(short)} is a mean of fewer than {WINDOW} updates.")
    return " ".join(filter(None, sentences))


def _directions(changes: Mapping[str, float], span: str) -> str:
    judged = {name: change for name, change in changes.items() if not math.isnan(change)}
    rose = [name for name, change in judged.items() if change > 0]
    if not judged:
        return ""
    if not rose:
        return f"{span}: the loss rose at no restart (0 of {len(judged)}{' that can be judged' * (len(judged) < len(changes))})."
    share = f"{len(rose)} of {len(changes)}"
    most = max(rose, key=judged.__getitem__)
    return f"{span}: the loss **rose** at restart {_names(rose)} ({share}), most at restart {most}: {judged[most]:+.4f}."


def _by_chance(rows: Sequence[RestartRow]) -> str:
    noise = mean(row.noise for row in rows)
    if math.isnan(noise):
        return ""
    judged = "" if not any(row.near.change > 0 for row in rows) else " No rise is more than twice that."
    if beyond := [str(row.restart) for row in rows if row.near.change > 2 * row.noise]:
        judged = f" The rise at restart {_names(beyond)} is more than twice that."
    return f"By chance alone, two such means differ by about {noise:.4f}.{judged}"


def _names(numbers: Sequence[str]) -> str:
    more = len(numbers) - MOST_NAMED
    return ", ".join(numbers[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def stored_dtype(run: Run) -> str:
    """In which dtype a run keeps its frozen weights, by its newest base, else by its settings; "" where neither tells."""
    for folder in sorted(run.folder.base.glob("restart_*"), reverse=True):
        try:
            layers = manifests.read_json(folder).get("layers")
        except ManifestError:
            continue
        if isinstance(layers, dict):
            return ", ".join(sorted({str(layer.get("dtype")) for layer in layers.values() if isinstance(layer, dict)}))
    chosen = run.setting("relora.frozen.dtype")
    if chosen == "auto":
        newest = manifests.newest(run.folder.checkpoints)
        return newest[1].precision if newest else ""
    return str(chosen or "")


def merge_remark(run: Run) -> str:
    """Why the merge error is what it is; "" without restarts."""
    errors = known(column(run.restarts, "merge_error"))
    if not errors:
        return ""
    dtype = stored_dtype(run)
    if max(errors) == 0 and dtype == "fp32":
        return (
            "The merge error is 0 because the frozen weights are stored in fp32: the sum is formed in fp32, and stored as it "
            "is. It could not be anything else, and says nothing about the method."
        )
    if max(errors) == 0:
        return "The merge error is 0: every merged sum could be stored as it was."
    where = f" to {dtype}" if dtype else ""
    kept = ""
    if run.setting("relora.frozen.master") == "sharded":
        kept = " An fp32 master keeps what was rounded away, and it arrives with a later merge."
    return f"The merge error is what rounding{where} lost of the merged change, at most {max(errors):.1%} of it.{kept}"


def evaluations_around(run: Run) -> list[list[str]]:
    """For each restart the evaluations that are nearest, as cells: number, update; for either side how far off, loss, perplexity.

    A restart comes after its update and before an evaluation that follows the same update.
    """
    fields = (column(run.evals, key) for key in ("update", "eval_loss", "eval_perplexity"))
    found = [(int(at), loss, perplexity) for at, loss, perplexity in zip(*fields, strict=True)]
    rows = []
    for number, record in enumerate(run.restarts, start=1):
        update = record["update"]
        before = next((one for one in reversed(found) if one[0] < update), None)
        after = next((one for one in found if one[0] >= update), None)
        sides = [
            [f"{abs(update - one[0]):,}", f"{one[1]:.4f}", f"{one[2]:,.2f}"] if one else ["–", "–", "–"]
            for one in (before, after)
        ]
        rows.append([str(number_of(record, number)), f"{update:,}", *sides[0], *sides[1]])
    return rows
