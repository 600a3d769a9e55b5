"""Runs that are killed, hung or doubled, in real processes: they end as if nothing had been."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from benchmarks import kill_test
from relora_ds.supervision import faults
from tests.command_line import ROOT, read_log, relora, start, wait_for_update

Recipe = Callable[..., Path]

pytestmark = pytest.mark.long


def metrics(run_dir: Path) -> list[dict]:
    return read_log(run_dir / "metrics.jsonl")


def after_update(update: int) -> kill_test.Aim:
    return lambda run, _age: kill_test.updates_logged(run) >= update


def half_written(name: str) -> kill_test.Aim:
    return lambda run, _age: (run / name).is_dir() and not (run / name / "manifest.json").exists()


def test_killed_runs_end_as_if_they_had_not_been(token_folder: Path, tmp_path: Path) -> None:
    """A short form of benchmarks/kill_test.py: a kill around a merge, one in the writing of a base, one in a save."""
    whole = kill_test.recipe(tmp_path, "whole", token_folder)
    assert kill_test.start(whole).wait(timeout=300) == 0
    path = kill_test.recipe(tmp_path, "killed", token_folder)
    hits = 0
    for aim in (after_update(13), half_written("base/restart_0002"), half_written("checkpoints/update_0000030")):
        hits += kill_test.torture_once(path, tmp_path / "killed", aim)
    assert hits > 0, "no run can miss the first"
    assert kill_test.start(path).wait(timeout=300) == 0
    assert not kill_test.differences(kill_test.result(tmp_path / "killed"), kill_test.result(tmp_path / "whole"))


def kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the launcher and all ranks, at once, as a node that dies."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=10)


def kill_launcher(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the launcher alone, as from the out-of-memory killer: the ranks go with it, also one that hangs."""
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    ranks[1].suspend()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5  # at once; some time on a busy machine
    while time.monotonic() < deadline and any(map(is_alive, ranks)):
        time.sleep(0.02)
    survivors = [rank for rank in ranks if is_alive(rank)]
    for rank in survivors:
        rank.kill()
    assert not survivors


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_sigkill_and_resume(recipe: Recipe, tmp_path: Path, whole: Path) -> None:
    """Killed in the full-rank phase and again after a restart: run again at once, it ends with the uninterrupted run's losses."""
    path = recipe("killed")
    for update, kill in ((5, kill_tree), (17, kill_launcher)):
        process = start("train", path, "--nproc", 2)
        wait_for_update(tmp_path / "killed", update, process)
        kill(process)
    told = relora("train", path, "--nproc", 2).stderr
    assert "taking over" in told and "resuming from" in told
    assert metrics(tmp_path / "killed") == metrics(whole)
    assert read_log(tmp_path / "killed" / "restarts.jsonl") == read_log(whole / "restarts.jsonl")


def test_a_dead_rank_takes_the_job_down(recipe: Recipe, tmp_path: Path) -> None:
    """One rank dies: the launcher ends the other, within seconds, and no process stays behind."""
    process = start("train", recipe("orphan", train={"updates": 100_000}), "--nproc", 2)
    wait_for_update(tmp_path / "orphan", 3, process)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    ranks[1].kill()
    began = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert time.monotonic() - began < 40
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)


def test_a_stopped_rank_ends_the_job_and_is_named(recipe: Recipe, tmp_path: Path, whole: Path) -> None:
    """A process that is stopped hangs the job: it ends by itself, says where, leaves no process and goes on when run again."""
    path, run_dir = recipe("hung", train={"hang_timeout": 3.0}), tmp_path / "hung"
    process = start("train", path, "--nproc", 2)
    wait_for_update(run_dir, 12, process)
    ranks = {psutil.Process(child.pid).environ()["RANK"]: child for child in psutil.Process(process.pid).children()}
    ranks["1"].suspend()
    began = time.monotonic()
    try:
        _, told = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        kill_tree(process)
        raise
    assert process.returncode == 1
    assert time.monotonic() - began < 3 + 5 + 20 + 10, "the limit, the wait for the other's stacks, the launcher's, and some"
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks.values())
    (line,) = [line for line in told.splitlines() if "nothing moved" in line]
    assert f"rank 1 on {socket.gethostname()} wrote no stacks" in line
    (folder,) = (run_dir / "stacks").iterdir()
    assert line.endswith(f"stacks: {folder}")
    (written,) = folder.iterdir()
    assert written.name == "rank_00000.txt" and "training/loop.py" in written.read_text()
    (fault,) = faults.read(run_dir)
    assert (fault["kind"], fault["rank"], fault["host"]) == ("hang", 1, socket.gethostname())
    assert fault["update"] >= 12
    relora("train", path, "--nproc", 2)
    assert metrics(run_dir) == metrics(whole)
    assert [record["update"] for record in read_log(run_dir / "ranks.jsonl")] == [20, 30]
    assert faults.read(run_dir) == [fault], "a run that ends in order has no fault"


def test_a_second_job_is_refused_and_a_dead_ones_lock_taken_over(recipe: Recipe, tmp_path: Path) -> None:
    path = recipe("shared", train={"updates": 5000, "checkpoint_every": 5})
    first = start("train", path, "--nproc", 2)
    wait_for_update(tmp_path / "shared", 6, first)
    log = (tmp_path / "shared" / "config.yaml").read_bytes()
    second = relora("train", path, "--nproc", 2, expect=2)
    assert second.stderr.strip().splitlines()[-1].startswith("relora-ds: error: run.dir=")
    assert "in use by process" in second.stderr and "wait for it or stop it" in second.stderr
    ranked = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "relora_ds"]
    third = subprocess.run([*ranked, "train", str(path)], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert third.returncode != 0 and third.stderr.count("in use by process") == 1, "said once, by rank 0"
    assert (tmp_path / "shared" / "config.yaml").read_bytes() == log
    kill_test.kill(first)
    done = relora("train", path, "--nproc", 2, "train.updates=20")
    assert "taking over" in done.stderr and "its process is gone" in done.stderr
    assert not (tmp_path / "shared" / "lock.json").exists()
