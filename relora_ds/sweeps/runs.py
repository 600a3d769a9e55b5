"""Where each run of a sweep stands, by its folder, by SLURM and by what the sweep remembers; and its figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from relora_ds.errors import DIVERGED, ConfigError
from relora_ds.reports.facts import peak_memory
from relora_ds.reports.run_records import column, known, last, read_run
from relora_ds.run import manifest as manifests
from relora_ds.run.changes import differences
from relora_ds.run.folder import read_traffic
from relora_ds.run.lock import RunLock
from relora_ds.slurm import client
from relora_ds.slurm.client import SlurmError
from relora_ds.slurm.events import Events as JobEvents
from relora_ds.slurm.events import outcome_message
from relora_ds.sweeps.events import Events
from relora_ds.sweeps.sweep_file import SweepRun

State = Literal["done", "running", "queued", "stopped", "failed", "diverged", "changed", "not begun"]


@dataclass(frozen=True)
class Standing:
    """Where a run stands.

    Attributes:
        state: *done*: its newest checkpoint is that of its last update. *running*: here, elsewhere or as a job; *queued* as a job.
            *stopped*: it can go on. *failed* and *diverged*: it ended so. *changed*: its folder is that of other settings, or of more
            updates.
        update: of its newest checkpoint.
        error: the line that it ended with, where it failed or diverged; what is wrong with it.
    """

    state: State
    update: int = 0
    error: str = ""

    @property
    def is_settled(self) -> bool:
        """Whether there is nothing to start: it is done, at work, or would diverge once more. One that is changed is started, and
        says itself what is wrong."""
        return self.state in ("done", "running", "queued", "diverged")


def standing(run: SweepRun, events: Events) -> Standing:
    """Where a run stands now; ``events``: of its sweep."""
    folder = run.folder
    newest = manifests.newest(folder.checkpoints)
    update = newest[1].update if newest else 0
    is_changed = _is_changed(run)
    if update == run.config.total_updates and not is_changed:
        return Standing("done", update)
    if folder.path.is_dir() and RunLock(folder.path).holder() is not None:
        return Standing("running", update)
    job = _of_job(run)
    if job is not None and job[0] in ("running", "queued"):
        return Standing(job[0], update)
    if update > run.config.total_updates:  # the sweep's file asks for less by now
        return Standing("changed", update, _longer(run, update))
    event = events.newest.get(run.name, {})
    if job is not None and _time(event) >= max(map(_time, JobEvents(folder).all)):
        job = None  # it was trained here since
    state, error = job or (event.get("state"), str(event.get("error", "")))
    if is_changed and state != "failed":
        return Standing("changed", update)
    if state not in ("failed", "diverged") or (state == "diverged" and not folder.path.is_dir()):
        # what began and left no word was killed; what diverged and was removed is to begin anew
        state, error = ("stopped" if newest or folder.metrics.is_file() else "not begun"), ""
    return Standing(state, update, error)


def refuse_longer(run: SweepRun) -> None:
    """Raises ConfigError where a run was trained for more updates than the sweep's file asks for: nothing can take them back."""
    newest = manifests.newest(run.folder.checkpoints)
    if newest is not None and newest[1].update > run.config.total_updates:
        way_out = f"remove {run.folder.path}, or name another arm"
        raise ConfigError(f"arms.{run.arm}: updates", run.config.total_updates, _longer(run, newest[1].update), way_out)


def _longer(run: SweepRun, update: int) -> str:
    return f"{run.name} was trained for {update:,} updates before the file was changed"


def _is_changed(run: SweepRun) -> bool:
    if not run.folder.config.is_file():
        return False
    try:
        return bool(differences(run.folder.read_config(), run.config))
    except ConfigError:  # not as this version writes it
        return True


def _of_job(run: SweepRun) -> tuple[State, str] | None:
    """What became of the newest SLURM job of a run; None where there was none."""
    events = JobEvents(run.folder)
    number = events.newest_job()
    if number is None:
        return None
    try:
        job = client.job(number, events.cluster(number))
    except (ConfigError, SlurmError):  # SLURM is not here, or does not answer
        job = None
    if job is not None and not job.is_over:
        return ("running" if job.is_under_way else "queued"), ""
    ended = events.of("ended", events.chain(number))
    if not ended or ended[-1]["decision"] != "stop" or events.of("cancelled", [number]):
        return "stopped", ""
    error = f"job {number} ended with code {ended[-1]['code']}: relora-ds slurm logs {run.folder.path}"
    return ("diverged" if outcome_message(run.folder, ended[-1]["attempt"]).startswith(DIVERGED) else "failed"), error


def _time(event: Mapping[str, Any]) -> float:
    """When something happened, in seconds since 1970; 0 where the event does not tell."""
    try:
        return datetime.fromisoformat(str(event.get("time"))).timestamp()
    except ValueError:
        return 0.0


@dataclass(frozen=True)
class Figures:
    """What a run's folder says of it; NaN for what it does not say.

    Attributes:
        update: the newest that is written down.
        evaluations: perplexity by update.
        perplexity: of the newest evaluation.
        trainable_parameters: in the phase of the newest checkpoint.
        tokens: trained on.
        seconds: in updates, restarts included; without the start, evaluations, and what was waited for checkpoints.
        sent_bytes: by rank 0 for all updates.
        sent_bytes_per_update: the mean of these.
        peak_memory_bytes: of rank 0, in the phase that needs most: allocated on its GPU; without one, resident of its process.
        problem: why they cannot be read.
    """

    update: int = 0
    perplexity: float = math.nan
    trainable_parameters: float = math.nan
    tokens: float = math.nan
    seconds: float = math.nan
    sent_bytes: float = math.nan
    sent_bytes_per_update: float = field(default=math.nan)
    peak_memory_bytes: float = math.nan
    evaluations: Mapping[int, float] = field(default_factory=dict)
    problem: str = ""

    @property
    def seconds_per_update(self) -> float:
        return self.seconds / self.update if self.update else math.nan


def figures(run: SweepRun) -> Figures:
    """The figures of a run, as far as it has come."""
    try:
        content = read_run(run.folder.path)
    except ConfigError as error:
        return Figures(problem=str(error))
    batch = run.config.train.global_batch * run.config.data.sequence_length
    sent = known(column(content.updates, "sent_bytes"))
    trainable = column(read_traffic(run.folder.traffic), "trainable_parameters")
    return Figures(
        update=content.updates[-1]["update"],
        perplexity=last(column(content.evals, "eval_perplexity")),
        trainable_parameters=last(trainable),
        tokens=last(column(content.updates, "tokens")),
        seconds=sum(batch / speed for speed in known(column(content.updates, "tokens_per_s")) if speed > 0),
        sent_bytes=sum(sent) if sent else math.nan,
        sent_bytes_per_update=sum(sent) / len(sent) if sent else math.nan,
        peak_memory_bytes=max(peak_memory(content).values(), default=math.nan),
        evaluations={
            record["update"]: value
            for record, value in zip(content.evals, column(content.evals, "eval_perplexity"), strict=True)
            if not math.isnan(value)
        },
    )
