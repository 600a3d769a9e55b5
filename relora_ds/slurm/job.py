"""Inside a SLURM job: what is done before the ranks start and after they ended, so that the job takes care of itself."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from relora_ds.config import Config
from relora_ds.environment import process_environment
from relora_ds.errors import EXIT_BAD_CONFIG, EXIT_DONE, EXIT_STOPPED, ConfigError
from relora_ds.run.folder import RunFolder
from relora_ds.run.lock import STALE_AFTER_S, WAY_OUT, RunLock
from relora_ds.slurm import client
from relora_ds.slurm.client import Job, SlurmError
from relora_ds.slurm.events import Event, Events, newest_update, read_outcome
from relora_ds.slurm.sbatch_environment import for_sbatch
from relora_ds.supervision import faults

Say = Callable[[str], None]
FAULT_LINE = re.compile(
    r"^srun: error: (?P<node>[\w.-]+): tasks? [\d,-]+: (?!Terminated|Interrupt|Hangup|User defined)(?P<what>.+)$", re.MULTILINE
)
"""srun on a rank that died: ``srun: error: node2: task 1: Killed``. Those that it terminated itself did not die first;
of a stop signal a rank dies that had hardly begun, which is no node's fault."""
LOST_OTHERS = re.compile(
    r"connection (was )?(reset|closed|refused)|broken pipe|remote ?error|timed? ?out|peer"  # gloo, sockets, the store
    r"|remote process exited|network error|ncclRemoteError|heartbeat|store->get|failed to recv|got 0 bytes",  # NCCL, and around it
    re.IGNORECASE,
)
"""The error of a rank that is well itself: another one went away."""
OUT_OF_MEMORY = re.compile(r"out of memory|oom[ _-]?kill|OutOfMemoryError", re.IGNORECASE)
"""The recipe asks for more than the job has, or than a GPU has: another node would not do better."""
LOCK_PAUSE_S = 2.0
OUTAGE_S = 1800.0
"""How long the end of a start waits for a controller that is away: no time limit is enforced meanwhile either."""
LOG_BYTES = 2**20
"""So much of the end of a job's output is searched: what srun says of a rank that died is among the last lines."""


@dataclass(frozen=True)
class Attempt:
    """One start of a job. ``nodes``: all that it was given."""

    job: int
    restart: int
    nodes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.job}.{self.restart}"


def confirmed(attempt: Attempt, patience_s: float | None = None) -> Attempt:
    """The attempt with a restart count that SLURM agrees to.

    Its variable is not set at a first start, so that one of another job may stand there: it counts more than SLURM does. Where it
    counts less, this is what is left of a start that SLURM has given up, and keeps its own number.
    """
    try:
        shown = client.shown(attempt.job, patience_s)
    except SlurmError:
        return attempt
    return attempt if shown is None else replace(attempt, restart=min(attempt.restart, shown.restarts))


# Before the ranks


def before(
    config: Config,
    attempt: Attempt,
    fits: Callable[[int], None],
    *,
    requeue_by: str,
    say: Say,
    environment: Mapping[str, str] | None = None,
    probe: Callable[[], None] = lambda: None,
) -> int:
    """Gets an attempt ready; returns the number of nodes to use.

    Args:
        config: the recipe.
        attempt: this one.
        fits: raises ConfigError if the recipe cannot run on so many nodes.
        requeue_by: as in the job's settings.
        say: tells the user.
        environment: the job's; None: what this process has now.
        probe: raises ConfigError if ranks cannot be started at all; asked at the first start.

    Raises:
        ConfigError: ranks cannot be started, or not on any number of these nodes, or another job has the run's folder.
        ExcludedError: a node of this attempt failed twice running; the job was requeued without it.
    """
    run = RunFolder(Path(config.run.dir))
    events = Events(run)
    close_vanished(events, run, attempt, say)
    bad = [node for node in suspects(events, attempt.job) if node in attempt.nodes]
    shown = _known(attempt, say)
    log = Path(shown.log) if shown and shown.log else None
    events.add(
        "started", job=attempt.job, attempt=str(attempt), update=newest_update(run), nodes=list(attempt.nodes),
        log=str(log or ""), offset=log.stat().st_size if log and log.is_file() else 0,
    )  # fmt: skip
    if bad and requeue_by == "requeue" and shown is not None:
        requeue(shown, bad, say)
        raise ExcludedError(f"{', '.join(bad)} failed twice running: the job starts again without")
    wait_for_lock(run, attempt, events, say)
    available = len(attempt.nodes)
    known = {event["available"]: int(event["use"]) for event in events.of("ready", events.chain(attempt.job))}
    if not known:
        probe()
    if available not in known:  # a later start need not go through the slow imports once more
        known[available] = most_nodes(available, fits, say)
        events.add("ready", job=attempt.job, attempt=str(attempt), available=available, use=known[available])
    if requeue_by == "dependency" and shown is not None:
        provide_successor(shown, say, events, environment)
    return known[available]


def _known(attempt: Attempt, say: Say) -> Job | None:
    """The job as SLURM has it; None while the controller is away: a start needs nothing of it."""
    try:
        return client.shown(attempt.job)
    except SlurmError as error:
        say(f"going on without the controller: {error}")
        return None


def provide_successor(shown: Job, say: Say, events: Events, environment: Mapping[str, str] | None) -> None:
    """Submits the job's successor, if none waits: at the start already, since the node of the batch script may die with it."""
    waiting = events.successor(shown.id)
    try:
        there = client.shown(waiting) if waiting is not None else None
        if there is None or there.is_over:
            succeed(shown, [], say, events, environment)
    except SlurmError as error:
        say(f"no successor yet: {error}; tried again when this job ends")


class ExcludedError(RuntimeError):
    """A node failed twice running and the job was requeued without it: this attempt is over."""


def most_nodes(available: int, fits: Callable[[int], None], say: Say) -> int:
    """The largest number of nodes that the recipe can run on. Raises the ConfigError for all of them where there is none."""
    first: ConfigError | None = None
    for nodes in range(available, 0, -1):
        try:
            fits(nodes)
        except ConfigError as error:
            first = first or error
            continue
        if first is not None:
            say(f"using {nodes} of {available} nodes: {first}")
        return nodes
    assert first is not None, "a job has a node"
    raise first


def close_vanished(events: Events, run: RunFolder, attempt: Attempt, say: Say) -> None:
    """Notes the end of earlier attempts that could not do so themselves, with the nodes of them that SLURM cannot use now."""
    for event in events.of("started", events.chain(attempt.job)):
        if events.ended(event["attempt"]) is None:
            gone = client.unusable(event["nodes"])
            where = f"; not usable now: {', '.join(gone)}" if gone else ""
            say(f"attempt {event['attempt']} ended without a word{where}")
            events.add(
                "ended", attempt=event["attempt"], job=event["job"], code=None, update=newest_update(run), suspects=gone,
                decision="vanished",
            )  # fmt: skip


def leave_node(attempt: Attempt, node: str, say: Say) -> NoReturn:
    """Gives a start up whose batch script cannot see the recipe that an earlier start had: this node misses a file system.

    Raises:
        ExcludedError: the job was requeued without the node.
        SlurmError: it could not be.
    """
    shown = client.shown(attempt.job)
    if shown is None:
        raise SlurmError(f"SLURM does not know job {attempt.job}")
    requeue(shown, [], say)
    exclude(shown, [node], say, "does not see the recipe")
    raise ExcludedError(f"{node} does not see the recipe: the job starts again without")


def wait_for_lock(run: RunFolder, attempt: Attempt, events: Events, say: Say) -> None:
    """Until the run's folder is free of the attempts before this one. Raises ConfigError where another job has it."""
    lock, forerunners = RunLock(run.path, str(attempt)), {str(job) for job in events.chain(attempt.job)}
    deadline, told = time.monotonic() + STALE_AFTER_S + 30, False
    while run.path.is_dir() and (other := lock.holder()) is not None:
        if other.job.partition(".")[0] not in forerunners or time.monotonic() > deadline:
            raise ConfigError("run.dir", str(run.path), f"in use by {other}", WAY_OUT)
        if not told:
            say(f"waiting up to {STALE_AFTER_S:.0f} s for {run.path}: in use by {other}")
            told = True
        time.sleep(LOCK_PAUSE_S)


# After the ranks


def after(
    config: Config,
    attempt: Attempt,
    code: int,
    *,
    requeue_by: str,
    max_stalled: int,
    say: Say,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Starts the job again, or not; returns its exit code.

    Args:
        config: the recipe.
        attempt: the one that ends.
        code: of what started the ranks, or of what ran before them.
        requeue_by, max_stalled: as in the job's settings.
        say: tells the user.
        environment: the job's; None: what this process has now.
    """
    run = RunFolder(Path(config.run.dir))
    events, update, outcome = Events(run), newest_update(run), read_outcome(run, str(attempt))
    told = faults.read(run.path, str(attempt)) if outcome is None else []
    refusals = [str(fault["detail"]) for fault in told if fault["kind"] == "refusal"]
    is_failure = outcome is None and (code not in (EXIT_DONE, EXIT_BAD_CONFIG) or refusals)
    cause = find_cause(told, events, attempt) if is_failure else Cause()
    named = list(cause.nodes)
    final = code if outcome is None else outcome
    shown = client.shown(attempt.job, OUTAGE_S)
    is_taken = shown is not None and taken_away(shown)
    if shown is not None and shown.is_preempted:
        named = []

    def end(decision: str) -> None:
        events.add(
            "ended", attempt=str(attempt), job=attempt.job, code=final, update=update, suspects=named, decision=decision,
            taken_away=is_taken,
        )  # fmt: skip

    if not may_go_on(shown, attempt):
        end("slurm")
        if shown is not None and shown.restarts == attempt.restart:
            withdraw_successor(attempt.job, say, events)
        say(
            f"attempt {attempt} is over at update {update}; SLURM has the job as {shown.state if shown else 'gone'}: left to SLURM"
        )
        return final
    assert shown is not None
    decision = decide(
        outcome, code, stalled=stalled_attempts(events, attempt.job, update) - is_taken, max_stalled=max_stalled,
        is_cancelled=bool(events.of("cancelled", [attempt.job])), refusal=next(iter(refusals), None), update=update,
    )  # fmt: skip
    go_on = decision.go_on and requeue_by != "none"
    end(requeue_by if go_on else "stop")
    where = f"; first failed: {', '.join(named)}" if named else f"; {cause.remark}" if cause.remark else ""
    say(f"attempt {attempt} is over at update {update} (newest checkpoint): {decision.text}{where}")
    if go_on:
        twice = suspects(events, attempt.job)
        try:
            if requeue_by == "requeue":
                requeue(shown, twice, say, events, environment)
            else:
                hand_over(shown, twice, say, events, environment)
        except SlurmError as error:
            say(
                f"the job could not be started again: {error}; sbatch {shown.command or 'the script'} resumes from the checkpoint"
            )
    elif decision.go_on:
        say(f"to resume from there: sbatch {shown.command or 'the same script'}")
    else:
        withdraw_successor(attempt.job, say, events)
    return final


def may_go_on(shown: Job | None, attempt: Attempt) -> bool:
    """Whether what becomes of the job is this attempt's to say: SLURM has not requeued it meanwhile, and nobody has cancelled it."""
    if shown is None or shown.restarts != attempt.restart:
        return False
    return shown.is_under_way or taken_away(shown) or (shown.state == "COMPLETING" and shown.reason == "TimeLimit")


def taken_away(shown: Job) -> bool:
    """Whether SLURM ends the job for its own reasons, a preemption or a dead node, and leaves it at that."""
    is_ending = shown.state in ("COMPLETING", "PREEMPTED", "NODE_FAIL")
    return is_ending and (shown.is_preempted or shown.reason == "NodeDown" or shown.state == "NODE_FAIL")


@dataclass(frozen=True)
class Decision:
    """``go_on``: whether the job is to be started again. ``text``: why, for the user."""

    go_on: bool
    text: str


def decide(
    outcome: int | None, code: int, *, stalled: int, max_stalled: int, is_cancelled: bool = False, refusal: str | None = None,
    update: int = 0,
) -> Decision:  # fmt: skip
    """What becomes of a job after its step has ended. PURE.

    Args:
        outcome: the exit code that the ranks agreed on; None where they did not come to an orderly end.
        code: of the launcher, or of what ran before it.
        stalled: attempts in a row, this one included, that began at the newest checkpoint there is now.
        max_stalled: so many of them end the job.
        is_cancelled: whether the user wants it to end.
        refusal: what some ranks found wrong and others did not; None where there is no such thing.
        update: of the newest checkpoint.
    """
    final = code if outcome is None else outcome
    if final == EXIT_DONE:
        return Decision(False, "the run is done")
    if outcome is None and refusal is not None and not update:
        return Decision(False, f"{refusal}; nothing is trained yet, so look into it before the next start")
    if final == EXIT_BAD_CONFIG and refusal is None:
        return Decision(False, "a setting is wrong (above): another start would find the same")
    if is_cancelled:
        return Decision(False, "cancelled")
    if outcome is not None and outcome != EXIT_STOPPED:
        return Decision(False, "the run itself gave up (above): look into it before the next start")
    why = (
        "stopped by a signal, with a checkpoint written" if outcome == EXIT_STOPPED else refusal or f"a rank failed (code {code})"
    )
    if stalled >= max_stalled:
        return Decision(False, f"{why}; {stalled} attempts in a row wrote no newer checkpoint: not started again")
    return Decision(True, why)


def stalled_attempts(events: Events, job: int, update: int) -> int:
    """How many attempts of a job and its forerunners began at ``update``, where the run still is, and had time to go on from there:
    those that SLURM ended are not counted."""
    stalled = [event for event in events.of("started", events.chain(job)) if event["update"] >= update]
    return sum(not ended_by_slurm(events.ended(event["attempt"])) for event in stalled)


def ended_by_slurm(event: Event | None) -> bool:
    """Whether an attempt ended for no fault of its own, by its event; None: it has not ended."""
    if event is None:
        return False
    vanished = event["decision"] == "vanished" and not event["suspects"]
    return event["decision"] == "slurm" or vanished or bool(event.get("taken_away"))


def suspects(events: Events, job: int) -> list[str]:
    """The nodes that were named in the two newest attempts of a job and its forerunners."""
    attempts = [event["attempt"] for event in events.of("started", events.chain(job))]
    newest = [event for attempt in attempts[-2:] if (event := events.ended(attempt)) is not None]
    if len(newest) < 2:
        return []
    return [node for node in newest[1]["suspects"] if node in newest[0]["suspects"]]


def failed_by_srun(log: str) -> list[str]:
    """The nodes of the ranks that failed, in the order in which srun tells of them in a job's output."""
    return [found["node"] for found in FAULT_LINE.finditer(log)]


def log_since(path: str, offset: int) -> str:
    """What a job's output file has got since ``offset`` bytes, at most its end; empty where it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            file.seek(max(offset, file.seek(0, 2) - LOG_BYTES))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


@dataclass(frozen=True)
class Cause:
    """``nodes``: to blame for the end of an attempt, by SLURM's names. ``remark``: for the user, where it is no node's fault."""

    nodes: tuple[str, ...] = ()
    remark: str = ""


def find_cause(told: Sequence[dict[str, Any]], events: Events, attempt: Attempt) -> Cause:
    """What ended an attempt.

    Blamed are those nodes that SLURM cannot use; or the one whose rank told first of an error of its own; or the one whose rank died
    first by srun's word, without having told that it lost the others. Where memory ran out, or all ranks stood at the same place,
    or some did not come, nobody is.

    Args:
        told: the faults of the attempt's ranks.
        events: of the run's jobs.
        attempt: the one that ended.
    """
    if gone := client.unusable(attempt.nodes):
        return Cause(tuple(gone))
    lost = [fault for fault in told if fault["kind"] == "error" and LOST_OTHERS.search(str(fault["detail"]))]
    first = next((fault for fault in told if fault not in lost), None)
    if first is not None:
        host = str(first["host"] or "")
        if OUT_OF_MEMORY.search(str(first["detail"])):
            return Cause(remark=f"{host} ran out of memory: {first['detail']}")
        return Cause((host,) if host in attempt.nodes else (), "" if host in attempt.nodes else str(first["detail"]))
    started = [event for event in events.of("started") if event["attempt"] == str(attempt)]
    log = log_since(started[-1]["log"], started[-1]["offset"]) if started else ""
    for found in FAULT_LINE.finditer(log):
        if OUT_OF_MEMORY.search(found["what"]):
            return Cause(remark=f"{found['node']} ran out of memory: ask for more (--mem), or less of it (fewer ranks a node)")
        if found["node"] in attempt.nodes and found["node"] not in {fault["host"] for fault in lost}:
            return Cause((found["node"],))
    return Cause()


def requeue(
    shown: Job, bad: Sequence[str], say: Say, events: Events | None = None, environment: Mapping[str, str] | None = None
) -> None:
    """Puts the running job back into the queue, kept off the nodes ``bad``; where that is not allowed, submits a successor.

    Raises:
        SlurmError: neither could be done.
    """
    try:
        client.insist("scontrol", "requeue", shown.id, patience_s=OUTAGE_S)
    except SlurmError as error:
        if events is None:
            raise
        say(f"SLURM does not requeue the job ({error}); submitting a successor")
        succeed(shown, bad, say, events, environment)
        return
    say(f"requeued job {shown.id}")
    if bad:
        exclude(shown, bad, say)


def exclude(shown: Job, bad: Sequence[str], say: Say, why: str = "failed twice running") -> None:
    """Keeps a job that waits off some nodes. It starts in any case: where this is refused, it may get them once more."""
    command = ("scontrol", "update", f"JobId={shown.id}", f"ExcNodeList={','.join([*shown.excluded, *bad])}")
    try:
        client.insist(*command)
    except SlurmError as error:
        say(f"{', '.join(bad)} {why}, but could not be excluded ({error}); to do so by hand: {' '.join(command)}")
    else:
        say(f"{', '.join(bad)} {why}: excluded from now on")


def hand_over(shown: Job, bad: Sequence[str], say: Say, events: Events, environment: Mapping[str, str] | None) -> None:
    """Leaves the run to the successor that waits, kept off the nodes ``bad``, or to a new one. Raises SlurmError."""
    waiting = events.successor(shown.id)
    there = client.shown(waiting) if waiting is not None else None
    if there is None or there.is_over:
        succeed(shown, bad, say, events, environment)
        return
    say(f"job {there.id} starts when job {shown.id} has ended")
    if bad:
        exclude(replace(there, excluded=shown.excluded), bad, say)


def withdraw_successor(job: int, say: Say, events: Events) -> None:
    """Takes back the successor that a job's start submitted: nothing is left to do. Tells what SLURM says against it."""
    waiting = events.successor(job)
    if waiting is None:
        return
    try:
        client.insist("scancel", waiting)
    except SlurmError as error:
        say(f"job {waiting}, the successor, could not be withdrawn: {error}; scancel {waiting}")
        return
    events.add("withdrawn", job=waiting)


def succeed(shown: Job, bad: Sequence[str], say: Say, events: Events, environment: Mapping[str, str] | None = None) -> None:
    """Submits the same script once more, to start when this job has ended. Raises SlurmError."""
    if not shown.command:
        raise SlurmError("SLURM does not say which script this job runs")
    script = Path(shown.command)
    how = for_sbatch(process_environment() if environment is None else environment, client.text_of(script))
    options = [f"--dependency=afterany:{shown.id}", *how.options]
    kept_off = [f"--exclude={','.join([*shown.excluded, *bad])}"] if bad else []
    try:
        successor, cluster = client.submit(script, *options, *kept_off, environment=how.environment)
    except SlurmError as error:
        if not bad:
            raise
        successor, cluster = client.submit(script, *options, environment=how.environment)
        say(f"{', '.join(bad)} failed twice running, but could not be excluded ({error})")
        bad = []
    events.add("successor", job=successor, of=shown.id, cluster=cluster)
    without = f", without {', '.join(bad)}" if bad else ""
    say(f"submitted job {successor}, which starts when job {shown.id} has ended{without}")
