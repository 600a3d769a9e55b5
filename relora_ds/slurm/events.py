"""What became of a run's SLURM jobs, so far: the events in run.dir/slurm, which commands outside and inside the jobs write and read.

An *attempt* is one start of a job, named ``<job id>.<restart count>``. ``run.dir/slurm/events.jsonl`` tells what became of each:

    {"event": "submitted", "job": 17, "cluster": "", …}       by relora-ds slurm submit; on which of several clusters
    {"event": "started", "job": 17, "attempt": "17.0", "update": 0, "nodes": […], "log": path, "offset": bytes, …}
    {"event": "ready", "job": 17, "attempt": "17.0", "available": 4, "use": 4}         nodes; the recipe was checked
    {"event": "ended", "attempt": "17.0", "code": 75, "update": 140, "suspects": [nodes], "decision": "requeue", …}
    {"event": "successor", "job": 18, "of": 17}               by requeue_by: dependency, at the start of 17
    {"event": "withdrawn", "job": 18}                         its forerunner ended for good
    {"event": "cancelled", "job": 17}                         by relora-ds slurm cancel
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from relora_ds.run import manifest as manifests
from relora_ds.run.folder import RunFolder, append_surely, write_atomically

Event = dict[str, Any]
OUTCOME = "outcome.json"

# What happened so far


class Events:
    """The events of a run's jobs, oldest first; of a folder that is a copy, without those of the original's jobs."""

    def __init__(self, run: RunFolder) -> None:
        self.path = run.slurm / "events.jsonl"
        self.all: list[Event] = []
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    event = json.loads(line)
                except ValueError:
                    continue  # cut off by a kill
                if isinstance(event, dict) and "event" in event:
                    self.all.append(event)
            self._leave_out_others()

    def _leave_out_others(self) -> None:
        """Drops the jobs of the run that this one's folder is a copy of, where that is still there: a copy must not end its job."""
        others: set[Any] = set()
        for event in self.all:
            if event.get("of") in others or self._is_of_another(event):
                others.add(event.get("job"))
        self.all = [event for event in self.all if event.get("job") not in others]

    def _is_of_another(self, event: Event) -> bool:
        try:  # by number alone: two machines may mount one file system in two places
            return "file" in event and Path(event["file"]).stat().st_ino != self.path.stat().st_ino
        except (OSError, TypeError, ValueError):  # moved
            return False

    def add(self, kind: str, **content: Any) -> None:
        event = {"event": kind, "time": datetime.now().astimezone().isoformat(timespec="seconds"), **content}
        if kind in ("submitted", "started"):
            event["file"] = str(self.path.absolute())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_surely(self.path, event)
        self.all.append(event)

    def of(self, kind: str, jobs: Iterable[int] | None = None) -> list[Event]:
        """The events of a kind, of some jobs or of all."""
        wanted = None if jobs is None else set(jobs)
        return [event for event in self.all if event["event"] == kind and (wanted is None or event.get("job") in wanted)]

    def newest_job(self) -> int | None:
        """The job that was submitted or started last, of those that are not withdrawn."""
        withdrawn = {event["job"] for event in self.of("withdrawn")}
        jobs = [event["job"] for event in self.all if event["event"] in ("submitted", "started", "successor")]
        return next((job for job in reversed(jobs) if job not in withdrawn), None)

    def successor(self, job: int) -> int | None:
        """The job that was submitted to go on after ``job``, unless it is withdrawn."""
        withdrawn = {event["job"] for event in self.of("withdrawn")}
        following = [event["job"] for event in self.of("successor") if event["of"] == job and event["job"] not in withdrawn]
        return following[-1] if following else None

    def cluster(self, job: int) -> str:
        """The cluster that a job or its forerunner was submitted to, where sbatch named one; empty: the one that is asked anyway."""
        named = [
            str(event.get("cluster") or "") for kind in ("submitted", "successor") for event in self.of(kind, self.chain(job))
        ]
        return next(filter(None, reversed(named)), "")

    def chain(self, job: int) -> list[int]:
        """A job and those that it is the successor of, oldest first."""
        before = {event["job"]: event["of"] for event in self.of("successor")}
        jobs = [job]
        while jobs[0] in before:
            jobs.insert(0, before[jobs[0]])
        return jobs

    def ended(self, attempt: str) -> Event | None:
        return next((event for event in self.of("ended") if event["attempt"] == attempt), None)


def newest_update(run: RunFolder) -> int:
    """The update of the newest checkpoint, 0 without any: what the run has for sure."""
    found = manifests.newest(run.checkpoints)
    return found[1].update if found else 0


# How an attempt ended, by its ranks' own word


def write_outcome(run: RunFolder, attempt: str, code: int, message: str = "") -> None:
    """What the exit code of a launcher may not tell: torchrun makes 1 of every failure, srun may kill those who leave last."""
    run.slurm.mkdir(parents=True, exist_ok=True)
    write_atomically(run.slurm / OUTCOME, json.dumps({"attempt": attempt, "code": code, "message": message}) + "\n")


def read_outcome(run: RunFolder, attempt: str) -> int | None:
    """The exit code that the ranks of an attempt agreed on; None where they told nothing: they did not come to an orderly end."""
    try:
        return int(_outcome(run, attempt)["code"])
    except (ValueError, KeyError, TypeError):
        return None


def outcome_message(run: RunFolder, attempt: str) -> str:
    """The line with which the ranks of an attempt ended; empty where they told none."""
    return str(_outcome(run, attempt).get("message", ""))


def _outcome(run: RunFolder, attempt: str) -> dict[str, Any]:
    """What :func:`write_outcome` left of an attempt; empty where it is of another, damaged or missing."""
    try:
        content = dict(json.loads((run.slurm / OUTCOME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
    return content if content.get("attempt") == attempt else {}
