"""Jobs that take care of themselves, on a real SLURM: submitted by ``relora-ds slurm submit``, stopped, requeued, hit, and finished."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.integration.cluster import Cluster, missing
from tests.integration.conftest import ROOT, environment, read_log, relora, write_recipe

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")
Recipe = Callable[..., Path]
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
PARTITIONS = """\
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 MaxTime=60
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""
LONG = {"updates": 300, "checkpoint_every": 20, "eval_every": 150}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm"), 4, partitions=PARTITIONS) as up:
        yield up


def slurm(cluster: Cluster, *arguments: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs ``relora-ds slurm ARGUMENTS`` on the cluster's login node."""
    words = (sys.executable, "-m", "relora_ds.cli", "slurm", *arguments)
    result = cluster.run("ctl", *words, check=False, env=environment(HOME=str(cluster.folder)), cwd=ROOT)
    assert result.returncode == expect, f"{words}\n{result.stdout}\n{result.stderr}"
    return result


def submit(cluster: Cluster, recipe: Path, *options: object) -> int:
    said = slurm(cluster, "submit", recipe, "--tasks-per-node", 1, *options).stdout
    return int(said.split("submitted job ")[1].split(":")[0])


def finish(cluster: Cluster, job: int, run_dir: Path, timeout: float = 240.0) -> dict[str, Any]:
    """The job once it is over; it has come to the end of the run."""
    ended = cluster.wait(job, OVER, timeout=timeout)
    assert ended["state"] == "COMPLETED", output(run_dir)
    assert "the run is done" in output(run_dir)
    return ended


def output(run_dir: Path) -> str:
    path = run_dir / "slurm" / "job.out"
    return path.read_text() if path.exists() else "no output"


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "slurm" / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def updates_done(run_dir: Path) -> int:
    log = run_dir / "metrics.jsonl"
    return sum('"loss"' in line for line in log.read_text().splitlines()) if log.exists() else 0


def wait_for_update(cluster: Cluster, job: int, run_dir: Path, update: int, timeout: float = 120.0) -> None:
    deadline = time.monotonic() + timeout
    while updates_done(run_dir) < update:
        assert time.monotonic() < deadline, f"{cluster.job(job)}\n{output(run_dir)}"
        time.sleep(0.1)


def test_four_nodes_train_as_four_processes_on_one_machine(cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    """Warm start, restarts, evaluations and checkpoints; the same metrics to the last digit."""
    relora("train", recipe("whole"), "--nproc", 4)
    job = submit(cluster, recipe("nodes"), "--nodes", 4, "--time", 10)
    finish(cluster, job, tmp_path / "nodes")
    for log in ("metrics.jsonl", "restarts.jsonl"):
        assert read_log(tmp_path / "nodes" / log) == read_log(tmp_path / "whole" / log)
    assert events(tmp_path / "nodes", "started")[0]["nodes"] == cluster.names
    assert sorted(path.name for path in (tmp_path / "nodes" / "slurm").iterdir()) == [
        "commit.json", "deepspeed.json", "events.jsonl", "job.out", "job.sbatch", "outcome.json", "recipe.yaml",
    ]  # fmt: skip
    said = slurm(cluster, "status", tmp_path / "nodes").stdout
    assert f"job {job} (nodes): COMPLETED" in said and "update 30 of 30 (100.0%)" in said and "requeues: 0" in said
    assert "the run is done" in slurm(cluster, "logs", tmp_path / "nodes", "-n", 3).stdout
