"""SLURM's own commands, asked and answered: one place for how sbatch, squeue, scontrol and sinfo are called and read."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relora_ds.errors import ConfigError

ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
)
UNDER_WAY = ("RUNNING", "SIGNALING", "CONFIGURING", "RESIZING")
"""States of a job that has its nodes; the last three are shown in the place of RUNNING while SLURM is at it."""
UNUSABLE = ("down", "drain", "drng", "fail", "unk", "boot", "error", "no_respond", "perfctrs")
"""Beginnings of the states of a node that runs nothing; one that does not answer has a ``*`` behind its state."""
TIMEOUT_S = 60.0
PATIENCE_S, PAUSE_S = 60.0, 10.0
"""How long, and how far apart, a controller that does not answer is asked again."""


@dataclass(frozen=True)
class Job:
    """What SLURM says of a job.

    Attributes:
        state: PENDING, RUNNING, COMPLETING, …; of a job that is both, such as PENDING and COMPLETING, the first.
        nodes: SLURM's list, node[1-4]; empty while it waits.
        restarts: how often it was requeued.
        seconds_used, seconds_left: of its time limit; None where it is not running or has none.
        log, command: where its output goes, and its script; empty where SLURM does not say.
        excluded: nodes that it is kept off, as SLURM lists them.
        reason: why it waits, or ended.
        is_preempted: whether another job took its nodes, or is about to.
    """

    id: int
    name: str
    state: str
    nodes: str
    restarts: int
    seconds_used: float | None
    seconds_left: float | None
    log: str
    reason: str
    command: str = ""
    excluded: tuple[str, ...] = ()
    is_preempted: bool = False

    @property
    def is_under_way(self) -> bool:
        return self.state in UNDER_WAY

    @property
    def is_over(self) -> bool:
        return self.state in ENDED


class SlurmError(RuntimeError):
    """A command of SLURM failed; the text is its own."""


def call(program: str, *arguments: object, stdin: str | None = None, environment: Mapping[str, str] | None = None) -> str:
    """The standard output of one of SLURM's commands, in this process's environment or in the one given.

    Raises:
        ConfigError: the program is not here.
        SlurmError: it failed, or did not answer.
    """
    need(program)
    words = [program, *map(str, arguments)]
    try:
        result = subprocess.run(
            words, input=stdin, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{program} did not answer within {TIMEOUT_S:.0f} s") from None
    if result.returncode:
        raise SlurmError(in_one_line(result.stderr or result.stdout) or f"{program} ended with code {result.returncode}")
    return result.stdout


def need(program: str) -> None:
    """Raises ConfigError when a program is not here."""
    if shutil.which(program) is None:
        raise ConfigError(program, None, "is not on the PATH", "run this where SLURM's commands are: a login node of the cluster")


def insist(program: str, *arguments: object, patience_s: float | None = None) -> str:
    """:func:`call`, again while the controller does not answer: it may be restarting just now.

    Args:
        program, arguments: as in :func:`call`.
        patience_s: for how long; None: ``PATIENCE_S``.

    Raises:
        ConfigError: the program is not here.
        SlurmError: the last one.
    """
    deadline = time.monotonic() + (PATIENCE_S if patience_s is None else patience_s)
    while True:
        try:
            return call(program, *arguments)
        except SlurmError as error:
            silent = re.search(r"unable to contact|timed? ?out|did not answer|connection refused|zero bytes", str(error), re.I)
            if not silent or time.monotonic() > deadline:
                raise
            time.sleep(PAUSE_S)


def in_one_line(text: str) -> str:
    """An error output without the repeated names of the program: ``invalid partition specified: x; allocation failure: …``."""
    lines = (re.sub(r"^(s\w+): (error: )?", "", line).strip() for line in text.splitlines())
    return "; ".join(dict.fromkeys(line for line in lines if line))


# Jobs


def on(cluster: str) -> list[str]:
    """The word by which a program of SLURM asks another cluster; none for an empty name."""
    return [f"--clusters={cluster}"] if cluster else []


def job(job_id: int, cluster: str = "") -> Job | None:
    """The job as SLURM knows it; None when it has forgotten it, minutes after its end.

    Asks ``squeue --json``, then ``scontrol`` where this SLURM has no JSON or no longer lists the job, then the accounting, if any:
    those of the cluster that is named, or the one here.

    Raises:
        ConfigError: SLURM's commands are not here.
        SlurmError: the controller does not answer.
    """
    return _from_squeue(job_id, cluster) or shown(job_id, cluster=cluster) or _from_accounting(job_id, cluster)


def _from_squeue(job_id: int, cluster: str) -> Job | None:
    try:
        records = json.loads(call("squeue", *on(cluster), "--json", "--jobs", job_id))["jobs"]
    except (SlurmError, ValueError, KeyError):  # too old, or built without JSON, or the job is forgotten
        return None
    record = next((record for record in records if number(record.get("job_id")) == job_id), None)
    return parse_json(record, time.time()) if record else None


def shown(job_id: int, patience_s: float | None = None, *, cluster: str = "") -> Job | None:
    """The job by ``scontrol show job`` alone, which is cheap on any cluster: what runs inside jobs asks this.

    ``patience_s``, ``cluster``: as in :func:`insist` and :func:`job`. Raises SlurmError when the controller stays silent.
    """
    try:
        return parse_scontrol(insist("scontrol", *on(cluster), "--oneliner", "show", "job", job_id, patience_s=patience_s))
    except SlurmError as error:
        if "invalid job id" in str(error).lower():
            return None
        raise


def _from_accounting(job_id: int, cluster: str) -> Job | None:
    try:
        lines = call(
            "sacct", *on(cluster), "-X", "-n", "-P", "-j", job_id, "-o", "JobID,JobName,State,NodeList,ElapsedRaw"
        ).splitlines()
    except (SlurmError, ConfigError):
        return None
    if not lines:
        return None
    _, name, state, nodes, elapsed = lines[-1].split("|")[:5]
    return Job(job_id, name, state.split()[0], "" if nodes == "None assigned" else nodes, 0, float(elapsed or 0), None, "", "")


def number(value: Any) -> int | None:
    """A number of SLURM's JSON: plain, or, since 23.02, {"set": …, "infinite": …, "number": …}; None where there is none."""
    if isinstance(value, dict):
        value = value.get("number") if value.get("set") and not value.get("infinite") else None
    return int(value) if value is not None else None


def parse_json(record: dict[str, Any], now: float) -> Job:
    """A job of ``squeue --json``. ``now``: seconds since 1970."""
    states = record["job_state"] if isinstance(record["job_state"], list) else [record["job_state"]]
    state, limit_min, start = str(states[0]), number(record.get("time_limit")), number(record.get("start_time"))
    is_running = state == "RUNNING" and start is not None
    used = max(0.0, now - start) if is_running and start is not None else None
    return Job(
        id=number(record["job_id"]) or 0,
        name=str(record.get("name", "")),
        state=state,
        nodes=str(record.get("nodes") or ""),
        restarts=number(record.get("restart_cnt")) or 0,
        seconds_used=used,
        seconds_left=None if used is None or not limit_min else max(0.0, limit_min * 60 - used),
        log=str(record.get("standard_output") or ""),
        reason=_said(record.get("state_reason")),
    )


def parse_scontrol(text: str) -> Job:
    """A job of ``scontrol --oneliner show job``."""
    fields = dict(re.findall(r"(\S+?)=(.*?)(?= [A-Z][\w/:]*?=|\s*$)", text.splitlines()[0]))
    state = fields["JobState"].split(",")[0]
    used, limit = duration(fields.get("RunTime", "")), duration(fields.get("TimeLimit", ""))
    running = state == "RUNNING"
    return Job(
        id=int(fields["JobId"]),
        name=fields.get("JobName", ""),
        state=state,
        nodes=_said(fields.get("NodeList")),
        restarts=int(fields.get("Restarts", 0)),
        seconds_used=used if running else None,
        seconds_left=None if not running or used is None or limit is None else max(0.0, limit - used),
        log=_said(fields.get("StdOut")),
        reason=_said(fields.get("Reason")),
        command=_said(fields.get("Command")),
        excluded=tuple(filter(None, [_said(fields.get("ExcNodeList"))])),
        is_preempted=state == "PREEMPTED" or fields.get("PreemptTime", "")[:1].isdigit(),
    )


def _said(value: object) -> str:
    return "" if value in (None, "None", "(null)") else str(value)


def duration(text: str) -> float | None:
    """Seconds of SLURM's ``days-hours:minutes:seconds``; None for UNLIMITED and the like."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24.0 + hours) * 60 + minutes) * 60 + seconds


# Submitting


def submit(script: Path, *options: object, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """The id of the job that ``sbatch`` made, and the cluster whose it is where it names one. Raises SlurmError."""
    lines = call("sbatch", "--parsable", *options, script, environment=environment).strip().splitlines()
    number, _, cluster = lines[-1].partition(";")
    return int(number), cluster


def text_of(script: Path) -> str:
    """A batch script's text; empty where it cannot be read."""
    try:
        return script.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def test(script: str, *options: object, environment: Mapping[str, str] | None = None) -> None:
    """Raises SlurmError with the complaint of ``sbatch --test-only``, if it has one."""
    call("sbatch", "--test-only", *options, stdin=script, environment=environment)


# Nodes


def unusable(nodes: Iterable[str]) -> list[str]:
    """Those of ``nodes`` that are down, drained or silent; none when SLURM does not say."""
    wanted = list(nodes)
    if not wanted:
        return []
    try:
        text = call("sinfo", "--noheader", "--Node", f"--nodes={','.join(wanted)}", "--format=%N %T")
    except (SlurmError, ConfigError):
        return []
    return bad_nodes(text)


def most_nodes(partitions: str | None) -> int | None:
    """How many nodes the largest of the partitions has, whatever state they are in; None when SLURM does not say.

    ``partitions``: names, as sbatch takes them; None: the default partition.
    """
    try:
        text = call("sinfo", "--noheader", "--all", "--format=%P %D")
    except SlurmError:
        return None
    return largest(text, partitions)


def largest(text: str, partitions: str | None) -> int | None:
    """:func:`most_nodes` from lines of ``sinfo --format='%P %D'``, which has one for each state of a partition's nodes."""
    wanted, sizes = set((partitions or "").split(",")), dict[str, int]()
    for name, size in re.findall(r"^(\S+) +(\d+)$", text, re.MULTILINE):
        if name.removesuffix("*") in wanted or (name.endswith("*") and partitions is None):
            sizes[name] = sizes.get(name, 0) + int(size)
    return max(sizes.values(), default=None)


def bad_nodes(text: str) -> list[str]:
    """The nodes in a bad state, from lines of ``sinfo --Node --format='%N %T'``, which has one for each partition of a node."""
    states = dict(line.split(None, 1) for line in text.splitlines() if " " in line)
    return [name for name, state in states.items() if state.strip().endswith("*") or state.lower().startswith(UNUSABLE)]
