"""``relora-ds slurm``: submit a recipe, see how it goes, read its output, end it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from relora_ds.config import Config, dump
from relora_ds.console import say
from relora_ds.environment import process_environment
from relora_ds.errors import ConfigError
from relora_ds.run.folder import RunFolder, write_atomically
from relora_ds.run.lock import WAY_OUT, RunLock
from relora_ds.slurm import client
from relora_ds.slurm import script as slurm_script
from relora_ds.slurm.client import Job, SlurmError
from relora_ds.slurm.events import Events, newest_update
from relora_ds.slurm.sbatch_environment import Call, for_sbatch, option_of
from relora_ds.slurm.script import Settings
from relora_ds.version import __version__

OUTPUT = "job.out"
SCRIPT = "job.sbatch"
RECIPE = "recipe.yaml"
DEEPSPEED = "deepspeed.json"
COMMIT = "commit.json"
KEYS = (
    ("account", "--account"), ("partition", "--partition"), ("qos", "--qos"), ("time", "--time"), ("gres", "--gpus-per-node"),
    ("generic resource", "--gpus-per-node"), ("feature", "--constraint"), ("node name", "--exclude"), ("node", "--nodes"),
)  # fmt: skip
"""Words of sbatch's complaints, and the option that each is most likely about."""
NOT_NOW = re.compile(r"not (currently |yet )?(available|usable)|busy|in use", re.IGNORECASE)
"""sbatch --test-only on a request that cannot start on the nodes as they are at this moment, which sbatch itself queues."""
POLL_S = 0.5


# Submit


def submit(
    config: Config,
    found: Settings,
    deepspeed: dict[str, Any],
    text: str,
    *,
    workdir: Path,
    environment: Mapping[str, str] | None = None,
    say: Callable[[str], None] = say,
) -> tuple[int, Path]:
    """Submits a recipe that was checked, by the script ``text``; returns the job's id and the file that its output goes to.

    Everything that the job needs of this moment is written into run.dir/slurm first: the resolved recipe, DeepSpeed's JSON, the
    commit and the script.

    Args:
        config, found, deepspeed, text: the recipe, the job's settings, DeepSpeed's JSON, the batch script.
        workdir: where the job runs.
        environment: the user's, before any library added to it; None: what this process has now.
        say: tells the user.

    Raises:
        ConfigError: SLURM is not here or refuses the job, the folder cannot be written, or another job works in it.
    """
    run = RunFolder(Path(config.run.dir))
    how = for_sbatch(process_environment() if environment is None else environment, text)
    refuse_second(run)
    doubts = check_script(text, found, how)
    is_new = not run.path.exists()
    snapshot(run, config, deepspeed, text, workdir)
    try:
        with refused_by_sbatch(found):
            job, cluster = client.submit(absolute(run, workdir) / SCRIPT, *how.options, environment=how.environment)
    except ConfigError:
        if is_new:
            discard(run)
        raise
    for line in (*how.told, *doubts):
        say(line)
    Events(run).add("submitted", job=job, cluster=cluster, settings=found.model_dump(exclude_unset=True))
    return job, absolute(run, workdir) / OUTPUT


def script(config: Config, found: Settings, *, recipe_name: str, workdir: Path, insisted: Sequence[str] = ()) -> str:
    """The batch script for :func:`submit`; ``insisted``: more words for ``relora-ds train``."""
    folder = absolute(RunFolder(Path(config.run.dir)), workdir)
    if found.python is None:
        found = found.model_copy(update={"python": sys.executable})
    output = str(folder / OUTPUT).replace("%", "%%")
    return slurm_script.render(
        found, recipe=str(folder / RECIPE), output=output, workdir=str(workdir), name=recipe_name, insisted=insisted
    )


def absolute(run: RunFolder, workdir: Path) -> Path:
    return workdir / run.slurm


def refuse_second(run: RunFolder) -> None:
    """Raises ConfigError when a job works, or waits to work, in the run's folder."""
    events = Events(run)
    newest = events.newest_job()
    job = client.job(newest, events.cluster(newest)) if newest is not None else None
    if job is not None and not job.is_over:
        problem = f"job {job.id} ({job.state}) is there for it"
        raise ConfigError("run.dir", str(run.path), problem, f"relora-ds slurm cancel {run.path}, or name another run.dir")
    other = RunLock(run.path).holder() if run.path.is_dir() else None
    if other is not None:
        raise ConfigError("run.dir", str(run.path), f"in use by {other}", WAY_OUT)


def check_script(text: str, found: Settings, how: Call) -> list[str]:
    """What sbatch says against a start of the script on the nodes as they are just now, in lines for the user.

    Raises:
        ConfigError: with the complaint of bash, about the set-up lines, or of sbatch about what no waiting can mend.
    """
    syntax = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    if syntax.returncode:
        raise ConfigError("--setup", found.setup, client.in_one_line(syntax.stderr), "these lines are shell: see --dry-run")
    with refused_by_sbatch(found):
        try:
            client.test(text, *how.options, environment=how.environment)
        except SlurmError as error:
            if not NOT_NOW.search(str(error)) or needs_more_nodes(found, how):
                raise
            return [f"submitted, but it has to wait: {error} (nodes may be down, drained or reserved just now)"]
    return []


def needs_more_nodes(found: Settings, how: Call) -> bool:
    """Whether a job asks for more nodes than there are at all: many a SLURM queues it for ever."""
    if how.options or {"partition", "clusters"} & set(map(option_of, found.sbatch_args)):
        return False  # sbatch knows
    there = client.most_nodes(found.partition or how.environment.get("SBATCH_PARTITION"))
    return there is not None and found.node_range[0] > there


@contextmanager
def refused_by_sbatch(found: Settings) -> Iterator[None]:
    """Turns SLURM's own complaint into a ConfigError about the option that it most likely means."""
    try:
        yield
    except SlurmError as error:
        key = next((key for word, key in KEYS if word in str(error).lower()), "sbatch")
        value = getattr(found, key.removeprefix("--").replace("-", "_"), None)
        raise ConfigError(key, value, f"SLURM refuses the job: {error}") from None


def snapshot(run: RunFolder, config: Config, deepspeed: dict[str, Any], text: str, workdir: Path) -> None:
    """Writes what the job will run into run.dir/slurm. Raises ConfigError where that cannot be."""
    try:
        run.slurm.mkdir(parents=True, exist_ok=True)
        kept = config.model_copy(update={"deepspeed": str(absolute(run, workdir) / DEEPSPEED)})
        write_atomically(run.slurm / RECIPE, dump(kept))
        write_atomically(run.slurm / DEEPSPEED, json.dumps(deepspeed, indent=2) + "\n")
        write_atomically(run.slurm / COMMIT, json.dumps(commit(workdir), indent=2) + "\n")
        write_atomically(run.slurm / SCRIPT, text)
    except OSError as error:
        raise ConfigError(
            "run.dir", str(run.path), error.strerror or str(error), "name a folder that can be written, from all nodes"
        ) from None


def discard(run: RunFolder) -> None:
    """Takes back what :func:`snapshot` made for a job that there will not be."""
    for name in (RECIPE, DEEPSPEED, COMMIT, SCRIPT):
        (run.slurm / name).unlink(missing_ok=True)
    with suppress(OSError):  # something else is in it
        run.slurm.rmdir()
        run.path.rmdir()


def commit(workdir: Path) -> dict[str, Any]:
    """Which code a job was submitted with: this package's version and commit, and the commit of the working directory."""
    described = {"package": Path(__file__).resolve().parents[1], "workdir": workdir}
    commits = {name: _git(folder, "describe", "--always", "--dirty", "--abbrev=40") for name, folder in described.items()}
    return {"relora_ds": __version__, **commits, "submitted": datetime.now().astimezone().isoformat(timespec="seconds")}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says in a folder; None where it is no repository, or git is not here."""
    try:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None


# Status


def status(config: Config) -> Iterator[str]:
    """The lines of ``relora-ds slurm status``. Raises ConfigError where no job of this run is known."""
    run = RunFolder(Path(config.run.dir))
    events, job = known_job(run)
    yield from job_lines(job, client.job(job, events.cluster(job)), events)
    if (following := events.successor(job)) is not None:
        yield f"job {following} resumes the run when it has ended"
    yield from run_lines(run, config)


def known_job(run: RunFolder) -> tuple[Events, int]:
    """The newest job of a run, or the one that it is to follow while that is there. Raises ConfigError where there was none."""
    events = Events(run)
    job = events.newest_job()
    if job is None:
        raise ConfigError("run.dir", str(run.path), "no SLURM job is known of it", "relora-ds slurm submit RECIPE starts one")
    forerunner = events.chain(job)[-2:][0]
    if forerunner != job and not events.of("started", [job]):
        there = client.job(forerunner, events.cluster(forerunner))
        job = job if there is None or there.is_over else forerunner
    return events, job


def job_lines(number: int, job: Job | None, events: Events) -> Iterator[str]:
    """A job's state, nodes and time, and its starts so far."""
    if job is None:
        yield f"job {number}: SLURM does not know it any more"
    else:
        parts = [f"job {number} ({job.name}): {job.state}"]
        if job.nodes:
            parts[0] += f" on {job.nodes}"
        if job.reason and job.state in ("PENDING", "FAILED", "COMPLETING"):
            parts.append(f"reason: {job.reason}")
        if job.seconds_used is not None:
            parts.append(f"running for {_time(job.seconds_used)}")
        if job.seconds_left is not None:
            parts.append(f"{_time(job.seconds_left)} left of its time limit")
        yield ", ".join(parts)
    starts, ends = events.of("started", events.chain(number)), events.of("ended", events.chain(number))
    if starts:
        yield f"starts: {len(starts)}, requeues: {len(starts) - 1}"
    for event in ends[-3:]:
        named = f", first failed: {', '.join(event['suspects'])}" if event["suspects"] else ""
        code = "without a word" if event["code"] is None else f"with code {event['code']}"
        yield f"  {event['time']}  {event['attempt']} ended {code} at update {event['update']} ({event['decision']}){named}"


def run_lines(run: RunFolder, config: Config) -> Iterator[str]:
    """How far the run is, by its metrics."""
    from relora_ds.run.folder import read_jsonl

    total = config.total_updates
    updates = [record for record in read_jsonl(run.metrics) if "loss" in record] if run.metrics.is_file() else []
    if not updates:
        yield f"{run.path}: no update yet"
        return
    last, recent = updates[-1], [record["tokens_per_s"] for record in updates[-50:]]
    speed = sorted(recent)[len(recent) // 2]
    left = (total - last["update"]) * config.train.global_batch * config.data.sequence_length / speed
    loss = "skipped" if last["loss"] is None else f"loss {last['loss']:.4f}"
    yield (
        f"{run.path}: update {last['update']:,} of {total:,} ({last['update'] / total:.1%}), phase {last['phase']}, {loss}, "
        f"{speed:,.0f} tokens/s, ReLoRA restarts {last['restarts']}, ETA {_time(left)}"
    )
    yield f"newest checkpoint: update {newest_update(run):,}"


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


# Logs


def log_file(config: Config) -> Path:
    """The file that the newest job of a run writes to. Raises ConfigError where there is none yet."""
    run = RunFolder(Path(config.run.dir))
    events, job = known_job(run)
    started = [event["log"] for event in events.of("started", events.chain(job)) if event["log"]]
    path = Path(started[-1]) if started else run.slurm / OUTPUT
    if not path.is_file():
        raise ConfigError("run.dir", str(run.path), f"job {job} has written nothing yet", f"relora-ds slurm status {run.path}")
    return path


def tail(path: Path, num_lines: int, write: Callable[[str], object], is_over: Callable[[], bool] | None = None) -> None:
    """Writes the last lines of a file; with ``is_over``, goes on with what comes until that says so and nothing new is there."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 400 * num_lines))
        write("".join(file.read().decode("utf-8", errors="replace").splitlines(keepends=True)[-num_lines:]))
        asked = time.monotonic()
        over = False
        while is_over is not None:
            new = file.read()
            if new:
                write(new.decode("utf-8", errors="replace"))
            elif over:
                return
            elif time.monotonic() - asked > 10 * POLL_S:
                over, asked = is_over(), time.monotonic()
            else:
                time.sleep(POLL_S)


# Cancel


def cancel(config: Config, *, wait_s: float, stop_signal: str, say: Callable[[str], None]) -> None:
    """Ends the newest job of a run for good: first asks its ranks to write a checkpoint, then cancels what is left.

    Args:
        config: the recipe.
        wait_s: seconds that the ranks get; 0 to cancel at once.
        stop_signal: that they stop upon.
        say: tells the user.
    """
    run = RunFolder(Path(config.run.dir))
    events, number = known_job(run)
    cluster = events.cluster(number)
    job, where = client.job(number, cluster), client.on(cluster)
    if job is None or job.is_over:
        say(f"job {number} is over already{f' ({job.state})' if job else ''}")
        return
    events.add("cancelled", job=number)
    if (following := events.successor(number)) is not None:
        client.call("scancel", *where, following)
        events.add("withdrawn", job=following)
    if wait_s and job.is_under_way:
        whom = ["--batch"] if hears_by_script(client.shown(number, cluster=cluster)) else []
        client.call("scancel", *where, *whom, f"--signal={stop_signal}", number)
        say(f"asked the ranks of job {number} to write a checkpoint and end; waiting up to {wait_s:.0f} s")
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and (job := client.shown(number, cluster=cluster)) is not None and job.is_under_way:
            time.sleep(POLL_S)
    if job is not None and not job.is_over:
        client.call("scancel", *where, number)
    say(f"cancelled job {number}; the newest checkpoint is of update {newest_update(run):,}")


def hears_by_script(job: Job | None) -> bool:
    """Whether the ranks hear of signals through the batch script, as under mpirun: SLURM then reaches no rank itself."""
    if job is None or not job.command:
        return False
    return "\n#SBATCH --signal=B:" in client.text_of(Path(job.command))
