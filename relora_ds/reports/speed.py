"""Where a run's time went: by phase, in restarts, behind checkpoints; and which rank is slow."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from relora_ds.reports.run_records import Record, Run, column, known, mean, median

LAGS = 0.1
"""A rank whose own work takes longer than the median rank's by this share is said to lag."""
SPENT_ON = {
    "start_up": "start-up: imports, ranks, model, checkpoint",
    "updates": "updates, restarts included",
    "phase_change": "the change from full rank to LoRA",
    "evaluations": "evaluations",
    "checkpoints": "waiting for checkpoints",
}
"""What starts.jsonl tells apart, as the report calls it."""
PHASE_NAMES = {"full": "full-rank", "lora": "LoRA"}


@dataclass(frozen=True)
class Phase:
    """The updates of one phase.

    Attributes:
        name: ``full`` or ``lora``.
        first, last: of its updates.
        seconds: of all of them together, restarts included; NaN where no time is known.
        tokens_per_s: the median update's, over all ranks.
        sent_bytes: what rank 0 sent for the median update.
    """

    name: str
    first: int
    last: int
    seconds: float
    tokens_per_s: float
    sent_bytes: float

    @property
    def title(self) -> str:
        return PHASE_NAMES.get(self.name, self.name)


def phases(run: Run) -> list[Phase]:
    """The phases of a run, in their order."""
    found, taken = [], run.seconds
    for name in dict.fromkeys(str(record.get("phase")) for record in run.updates):
        at = [number for number, record in enumerate(run.updates) if str(record.get("phase")) == name]
        records = [run.updates[number] for number in at]
        seconds = known(taken[number] for number in at)
        speed, sent = (median(column(records, key)) for key in ("tokens_per_s", "sent_bytes"))
        found.append(Phase(name, records[0]["update"], records[-1]["update"], sum(seconds) if seconds else math.nan, speed, sent))
    return found


def lost_time(run: Run) -> str:
    """Says how much of a run's time went into restarts, and what can be seen of that for checkpoints."""
    total = sum(known(run.seconds))
    if not total:
        return ""
    restarts = known(column(run.restarts, "seconds"))
    sentences = [f"The updates took {duration(total)} together."]
    if restarts:
        sentences.append(
            f"Of these, the restarts took {sum(restarts):.2f} s ({sum(restarts) / total:.2%}), {mean(restarts):.2f} s each."
        )
    if not run.begun:
        sentences.append("The run's folder does not record how long starts, evaluations and checkpoints took.")
    behind = behind_checkpoints(run)
    if behind:
        more = sum(behind)
        share = f"{more:.2f} s longer" if more > 0 else "no longer"
        sentences.append(
            f"A checkpoint is written while training goes on: the {len(behind)} updates right behind one took {share} "
            "together than as many median updates of their phase."
        )
    return " ".join(sentences)


def spent(run: Run) -> list[list[str]]:
    """Where the time of all starts went, as cells: what, how long, its share. Nothing where starts.jsonl does not tell."""
    totals = {of: sum(known(column(map(_seconds, run.begun), of))) for of in SPENT_ON}
    everything = sum(totals.values())
    if not everything:
        return []
    rows = [[SPENT_ON[of], duration(seconds), f"{seconds / everything:.1%}"] for of, seconds in totals.items() if seconds]
    return [*rows, ["together", duration(everything), "100.0%"]]


def _seconds(start: Record) -> Record:
    seconds = start.get("seconds")
    return seconds if isinstance(seconds, dict) else {}


def behind_checkpoints(run: Run) -> list[float]:
    """For each update that followed a checkpoint: how many seconds more it took than the median update of its phase.

    Updates that follow a restart, too, are left out, and so are those after which the phase changes.
    """
    every = run.setting("train.checkpoint_every")
    if not isinstance(every, int) or every < 1 or run.setting("checkpoint.async") is False:
        return []  # no update has a checkpoint beside it
    usual: dict[str, list[float]] = {}
    for record, seconds in zip(run.updates, run.seconds, strict=True):
        usual.setdefault(str(record.get("phase")), []).append(seconds)
    medians = {phase: median(seconds) for phase, seconds in usual.items()}
    special = {*run.restart_updates, *(update - 1 for update in run.phase_changes)}
    return known(
        seconds - medians[str(record.get("phase"))]
        for record, seconds in zip(run.updates, run.seconds, strict=True)
        if record["update"] > 1 and (record["update"] - 1) % every == 0 and not {record["update"], record["update"] - 1} & special
    )


def slowest_rank(ranks: Sequence[Record]) -> str:
    """Says which rank's own work (batches and forward passes) takes longest; empty where no two ranks were timed.

    Every record is compared with its own median, and a rank on another node (after a resume) counts as another one.
    """
    slower: dict[tuple[int, str], list[float]] = {}
    for record in ranks:
        usual = statistics.median_low(record["forward_s"])  # a rank's own: of two ranks, the faster one
        for rank, (host, seconds) in enumerate(zip(record["hosts"], record["forward_s"], strict=True)):
            slower.setdefault((rank, host), []).append(seconds / usual - 1)
    if not slower or max(slower)[0] == 0:
        return ""
    rank, host = max(slower, key=lambda who: mean(slower[who]))
    share = mean(slower[rank, host])
    # Of two ranks the median one is simply the other.
    other = "the other rank" if max(slower)[0] == 1 else "the median rank"
    if share < LAGS:
        return f"No rank lags: the slowest, rank {rank} on {host}, takes {share:.0%} longer than {other}."
    return f"Rank {rank} on {host} **lags**: its batches and forward passes take {share:.0%} longer than {other}'s."


def duration(seconds: float) -> str:
    """Seconds as people read them: 4 min 26 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
