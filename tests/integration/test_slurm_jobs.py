"""Jobs that take care of themselves, on a real SLURM: submitted, stopped, requeued, hit, and finished."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.cluster import Cluster, missing
from tests.integration.conftest import ROOT, environment, read_log, relora

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")
Recipe = Callable[..., Path]
RELORA = (sys.executable, "-m", "relora_ds.cli")
MPIRUN = shutil.which("mpirun") is not None and importlib.util.find_spec("mpi4py") is not None
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
PARTITIONS = """\
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 MaxTime=60
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""
TRAIN = {"updates": 300, "checkpoint_every": 20, "eval_every": 150, "global_batch": 12, "micro_batch": 2}
LONG = {"train": TRAIN, "relora": {"restart_every": 40, "restart_warmup": 5}}
SLOW = {**LONG, "train": {**TRAIN, "updates": 800, "checkpoint_every": 200, "micro_batch": 1}}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm"), 4, partitions=PARTITIONS) as up:
        yield up


def slurm(cluster: Cluster, *arguments: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs ``relora-ds slurm ARGUMENTS`` on the cluster's login node."""
    words = (*RELORA, "slurm", *arguments)
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


def test_a_run_survives_its_time_limits(cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    """Its limit is shorter than its training: it requeues itself, and ends with the metrics of a run that was never stopped.

    SLURM looks twice a minute, so with one second of warning the signal comes 29 to 59 s after the start.
    """
    relora("train", recipe("whole", **SLOW), "--nproc", 2)
    path = recipe("nodes", **SLOW)
    job = submit(cluster, path, "--nodes", 2, "--time", 1, "--sbatch-args=--signal=USR2@1")
    ended = finish(cluster, job, tmp_path / "nodes", timeout=500)
    assert ended["restarts"] >= 2
    assert [event["code"] for event in events(tmp_path / "nodes", "ended")] == [75] * ended["restarts"] + [0]
    for log in ("metrics.jsonl", "restarts.jsonl"):
        assert read_log(tmp_path / "nodes" / log) == read_log(tmp_path / "whole" / log)


def test_a_run_survives_signals_operators_and_preemption(cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    relora("train", recipe("whole", **LONG), "--nproc", 2)
    folder = tmp_path / "nodes"
    job = submit(cluster, recipe("nodes", **LONG), "--nodes", 2, "--time", 30)
    wait_for_update(cluster, job, folder, 30)
    cluster.run("ctl", "scancel", "--signal=USR2", job)
    wait_for_update(cluster, job, folder, 90)
    cluster.run("ctl", "scontrol", "requeue", job)
    wait_for_update(cluster, job, folder, 150)
    urgent = tmp_path / "urgent.sbatch"
    urgent.write_text("#!/bin/bash\nsleep 3\n")
    cluster.wait(cluster.sbatch(urgent, "--partition=urgent", "--nodes=4", "--exclusive"), "COMPLETED")
    ended = finish(cluster, job, folder)
    assert ended["restarts"] == 3
    assert [event["decision"] for event in events(folder, "ended")] == ["requeue", "slurm", "requeue", "stop"]
    assert [event["code"] for event in events(folder, "ended")] == [75, 75, 75, 0], "every stop had its checkpoint"
    for log in ("metrics.jsonl", "restarts.jsonl"):
        assert read_log(folder / log) == read_log(tmp_path / "whole" / log)


def assert_same_losses(folder: Path, whole: Path) -> None:
    """Every update is there once; the order of sums over another number of ranks is all that may differ."""
    mine, theirs = ([record for record in read_log(path / "metrics.jsonl") if "loss" in record] for path in (folder, whole))
    assert [record["update"] for record in mine] == [record["update"] for record in theirs]
    assert [record["loss"] for record in mine] == pytest.approx([record["loss"] for record in theirs], rel=1e-3)


def test_a_run_goes_on_with_fewer_nodes_after_one_died(cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    """SIGKILL to all that runs on the node."""
    relora("train", recipe("whole", **LONG), "--nproc", 2)
    folder = tmp_path / "nodes"
    job = submit(cluster, recipe("nodes", **LONG), "--nodes", "2-4", "--time", 30)
    wait_for_update(cluster, job, folder, 70)
    cluster.kill_node("node2")
    ended = finish(cluster, job, folder)
    cluster.start_node("node2")
    assert len(ended["nodes"]) == 3 and "node2" not in ended["nodes"]
    assert [len(event["nodes"]) for event in events(folder, "started")] == [4, 3]
    assert_same_losses(folder, tmp_path / "whole")
    cluster.wait_idle()


def test_a_node_that_was_cut_off_does_no_damage(cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    """Rank 0's node, for a minute: the job goes on elsewhere while the old ranks live."""
    relora("train", recipe("whole", **LONG), "--nproc", 2)
    folder = tmp_path / "nodes"
    job = submit(cluster, recipe("nodes", **LONG), "--nodes", "2-4", "--time", 30)
    wait_for_update(cluster, job, folder, 70)
    cluster.cut("node1")
    time.sleep(60)
    cluster.join("node1")
    ended = finish(cluster, job, folder)
    assert "node1" not in ended["nodes"]
    assert_same_losses(folder, tmp_path / "whole")
    cluster.wait_idle()


def test_a_rank_that_dies_ends_its_start_and_a_bad_node_is_excluded(cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    """Killed on the same node twice: within seconds the step is over and the job requeued, the second time without the node."""
    relora("train", recipe("whole", **LONG), "--nproc", 2)
    folder = tmp_path / "nodes"
    job = submit(cluster, recipe("nodes", **LONG), "--nodes", 2, "--time", 30)
    for update in (45, 105):
        wait_for_update(cluster, job, folder, update)
        bad = cluster.job(job)["nodes"][1]
        cluster.run(bad, "pkill", "-KILL", "-f", "relora_ds.cli train")
        killed = time.monotonic()
        cluster.wait(job, ("PENDING", "COMPLETING", *OVER), timeout=60)
        assert time.monotonic() - killed < 20
    ended = finish(cluster, job, folder)
    assert [event["suspects"] for event in events(folder, "ended")] == [["node2"], ["node2"], []]
    assert ended["nodes"] == ["node1", "node3"]
    assert ended["fields"]["ExcNodeList"] == "node2"
    for log in ("metrics.jsonl", "restarts.jsonl"):
        assert read_log(folder / log) == read_log(tmp_path / "whole" / log)


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "mpi"])
def test_launchers_train_alike(launcher: str, cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    """Two nodes with two ranks each; stopped once by a signal, and finished."""
    if launcher == "mpi" and not MPIRUN:
        pytest.skip("not installed: openmpi-bin, mpi4py")
    if not (whole := tmp_path.parent / "launchers").exists():
        relora("train", recipe("whole", run={"dir": str(whole), "seed": 1}), "--nproc", 4)
    folder = tmp_path / "nodes"
    job = submit(cluster, recipe("nodes"), "--nodes", 2, "--time", 30, "--tasks-per-node", 2, "--launcher", launcher)
    finish(cluster, job, folder)
    for log in ("metrics.jsonl", "restarts.jsonl"):
        assert read_log(folder / log) == read_log(whole / log)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (("--partition", "nope"), {}, "--partition=None: SLURM refuses the job: invalid partition specified: nope"),
        (
            ("--nodes", 9),
            {},
            "--nodes=None: SLURM refuses the job: allocation failure: Requested node configuration is not available",
        ),
        (("relora.rnak=4",), {}, "relora.rnak='4': unknown key; did you mean 'rank'?"),
        (("--nodes", 3), {}, "train.global_batch=8: is not a multiple of micro_batch x ranks = 2 x 3"),
        (("--ndoes", 3), {}, "--ndoes=None: unknown option; did you mean '--nodes'?"),
        ((), {"run": {"dir": "/dev/null/run"}}, "run.dir='/dev/null/run': Not a directory"),
        ((), {"data": {"path": "/nowhere"}}, "data.path='/nowhere'"),
    ],
)
def test_a_bad_submission_is_one_line_and_no_job(
    options: tuple[object, ...], changes: dict[str, Any], message: str, cluster: Cluster, recipe: Recipe, tmp_path: Path
) -> None:
    before = cluster.run("ctl", "squeue", "--noheader", "--states=all").stdout
    result = slurm(cluster, "submit", recipe("bad", **changes), "--tasks-per-node", 1, *options, expect=2)
    assert result.stderr.startswith(f"relora-ds: error: {message}") and result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert cluster.run("ctl", "squeue", "--noheader", "--states=all").stdout == before
    assert not (tmp_path / "bad").exists(), "nothing is written"


def test_without_slurm_there_is_one_line(recipe: Recipe, tmp_path: Path) -> None:
    result = relora("slurm", "submit", recipe("bad"), "--tasks-per-node", 1, expect=2, PATH="/nowhere")
    assert result.stderr == (
        "relora-ds: error: sbatch=None: is not on the PATH; run this where SLURM's commands are: a login node of the cluster\n"
    )
    shown = relora("slurm", "submit", recipe("bad"), "--tasks-per-node", 1, "--dry-run", PATH="/nowhere").stdout
    assert shown.startswith("#!/bin/bash\n#SBATCH --job-name=bad\n") and not (tmp_path / "bad").exists()


def test_one_job_for_a_run_and_its_end_on_demand(cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "nodes"
    path = recipe("nodes", **LONG)
    job = submit(cluster, path, "--nodes", 1, "--time", 30)
    refused = slurm(cluster, "submit", path, "--tasks-per-node", 1, expect=2).stderr
    assert f"job {job} (" in refused and "is there for it; relora-ds slurm cancel" in refused
    wait_for_update(cluster, job, folder, 10)
    said = slurm(cluster, "status", folder).stdout
    assert f"job {job} (nodes): RUNNING on node1" in said and "left of its time limit" in said and "of 300 (" in said
    assert cluster.run("ctl", *RELORA, "slurm", "hostfile", "--job", job, "--slots", 8, env=environment(), cwd=ROOT).stdout == (
        "node1 slots=8\n"
    )
    slurm(cluster, "cancel", folder)
    cluster.wait(job, OVER)
    assert events(folder, "ended")[-1]["decision"] == "stop" and events(folder, "ended")[-1]["code"] == 75
    assert "a checkpoint is written" in output(folder) and "cancelled" in output(folder)


def test_a_rank_that_hangs_is_named_and_the_run_finished(cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    """Its process is stopped: after train.hang_timeout the others write their stacks, the job ends and goes on elsewhere."""
    changes = {**LONG, "train": {**TRAIN, "hang_timeout": 5.0}}
    relora("train", recipe("whole", **changes), "--nproc", 2)
    folder = tmp_path / "nodes"
    job = submit(cluster, recipe("nodes", **changes), "--nodes", 2, "--time", 30)
    wait_for_update(cluster, job, folder, 45)
    bad = cluster.job(job)["nodes"][1]
    cluster.run(bad, "pkill", "-STOP", "-f", "relora_ds.cli train")
    finish(cluster, job, folder)
    assert [event["suspects"] for event in events(folder, "ended")] == [[bad], []]
    assert list((folder / "stacks").glob("*/rank_00000.txt"))
    for log in ("metrics.jsonl", "restarts.jsonl"):
        assert read_log(folder / log) == read_log(tmp_path / "whole" / log)
