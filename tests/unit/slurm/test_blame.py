"""Whose fault it is that a job's ranks ended; SLURM is a record of what it was asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from relora_ds.run.folder import RunFolder
from relora_ds.slurm import client as slurm_client
from relora_ds.slurm import job as slurm_job
from relora_ds.slurm.client import SlurmError
from relora_ds.slurm.events import Events, write_outcome
from relora_ds.slurm.job import Attempt, failed_by_srun
from relora_ds.supervision import faults
from tests.unit.slurm.conftest import RUNNING, After, Before, Cluster, checkpoint


def test_the_first_rank_that_died_by_sruns_word() -> None:
    log = (
        "srun: error: node3: task 5: Terminated\nsrun: error: node4: task 7: User defined signal 2\n"
        "srun: error: node2: tasks 2-3: Killed\n"
        "srun: error: node1: task 0: Exited with exit code 1\n"
    )
    assert failed_by_srun(log) == ["node2", "node1"]
    assert failed_by_srun("all is well\n") == []


def test_only_this_attempts_output_counts(cluster: Cluster, before: Before, after: After, run: RunFolder, tmp_path: Path) -> None:
    log = tmp_path / "job.out"
    log.write_text("srun: error: node1: task 0: Killed\n")
    cluster.job = replace(RUNNING, log=str(log))
    before()
    with log.open("a") as file:
        file.write("srun: error: node2: task 1: Killed\n")
    after(137)
    assert Events(run).of("ended")[0]["suspects"] == ["node2"]


def test_only_the_end_of_a_long_output_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "job.out"
    log.write_text("x" * 1000 + "the end")
    monkeypatch.setattr(slurm_job, "LOG_BYTES", 7)
    assert slurm_job.log_since(str(log), 10) == "the end"
    assert slurm_job.log_since(str(log), 1004) == "end"


def test_a_node_that_slurm_cannot_use_is_to_blame(cluster: Cluster, before: Before, after: After, run: RunFolder) -> None:
    before()
    faults.record(run.path, kind="error", attempt="17.0", rank=0, host="node1", update=3, detail="RuntimeError: what is this")
    cluster.bad = ["node2"]
    after(1)
    assert Events(run).of("ended")[0]["suspects"] == ["node2"]


def test_a_cut_off_line_of_the_events_is_passed_over(run: RunFolder) -> None:
    events = Events(run)
    events.add("submitted", job=17)
    with events.path.open("a") as file:
        file.write('{"event": "star')
    assert Events(run).newest_job() == 17


def refuse(run: RunFolder, attempt: str = "17.0", host: str = "node2") -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    text = f"rank 3 on {host}: data.path='/data': is not there"
    faults.record(run.path, kind="refusal", attempt=attempt, rank=3, host=host, update=0, detail=text)


@pytest.mark.parametrize("code", [2, 1, 143], ids=["srun", "torchrun", "killed"])
def test_what_some_ranks_refuse_ends_a_run_before_its_first_checkpoint_only(
    code: int, cluster: Cluster, before: Before, after: After, run: RunFolder, said: list[str]
) -> None:
    before()
    refuse(run)
    after(code)
    assert cluster.calls == []
    assert "rank 3 on node2: data.path='/data': is not there; nothing is trained yet" in said[-1]
    cluster.job = replace(RUNNING, restarts=1)
    before(Attempt(17, 1, ("node1", "node2")))
    checkpoint(run, 5)
    refuse(run, "17.1")
    after(code, Attempt(17, 1, ("node1", "node2")))
    assert cluster.calls == ["scontrol requeue 17", "scontrol update JobId=17 ExcNodeList=node2"]
    assert Events(run).of("ended")[-1]["suspects"] == ["node2"]


def test_what_all_ranks_refuse_ends_the_job(cluster: Cluster, before: Before, after: After, run: RunFolder) -> None:
    checkpoint(run, 5)
    before()
    write_outcome(run, "17.0", 2)
    after(143)
    assert cluster.calls == []


@pytest.mark.parametrize(
    "detail",
    [
        "RuntimeError: [pair.cc:537] Read error [10.77.0.2]:10460: Connection reset by peer. This is typically caused by",
        "DistBackendError: NCCL error in: x.cpp:3356, remote process exited or there was a network error, NCCL version 2.26.2",
        "DistBackendError: NCCL error in: x.cpp:2210, unhandled system error, NCCL version 2.21.5 ncclRemoteError: A call failed",
        "DistBackendError: NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3356, remote process exited or"
        " there was a network error, NCCL version 2.26.2 ncclRemoteError: A call failed possibly due to a network error or a remote"
        " process exiting prematurely. Last error: socketProgress: Connection closed by remote peer node2<41234>",
        "DistBackendError: [5] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by key"
        " '0', but store->get('0') got error: failed to recv, got 0 bytes",
        "DistStoreError: Timed out after 601 seconds waiting for clients. 7/8 clients joined.",
        "RuntimeError: Process group watchdog thread terminated: the heartbeat of rank 3 stopped",
    ],
)
def test_a_rank_that_lost_the_others_is_not_to_blame(
    detail: str, cluster: Cluster, before: Before, after: After, run: RunFolder, tmp_path: Path
) -> None:
    """The rank on node2 died without a word."""
    log = tmp_path / "job.out"
    cluster.job = replace(RUNNING, log=str(log))
    before()
    faults.record(run.path, kind="error", attempt="17.0", rank=0, host="node1", update=3, detail=detail)
    log.write_text("srun: error: node1: task 0: Exited with exit code 1\nsrun: error: node2: task 1: Segmentation fault\n")
    after(1)
    assert Events(run).of("ended")[0]["suspects"] == ["node2"]


@pytest.mark.parametrize("by", ["srun", "the rank"])
def test_memory_that_ran_out_is_named_and_no_node_blamed(
    by: str, cluster: Cluster, before: Before, after: After, run: RunFolder, said: list[str], tmp_path: Path
) -> None:
    log = tmp_path / "job.out"
    cluster.job = replace(RUNNING, log=str(log))
    before()
    if by == "srun":
        log.write_text("srun: error: node2: task 1: Out Of Memory\nsrun: error: node1: task 0: Exited with exit code 1\n")
    else:
        detail = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
        faults.record(run.path, kind="error", attempt="17.0", rank=1, host="node2", update=3, detail=detail)
    after(1)
    assert Events(run).of("ended")[0]["suspects"] == []
    assert "node2 ran out of memory" in said[-2] and said[-1] == "requeued job 17"


@pytest.mark.parametrize("host", ["node2.cluster.local", None], ids=["a name that SLURM does not know", "no host"])
def test_only_nodes_of_the_attempt_are_blamed(
    host: str | None, cluster: Cluster, before: Before, after: After, run: RunFolder, tmp_path: Path
) -> None:
    log = tmp_path / "job.out"
    cluster.job = replace(RUNNING, log=str(log))
    before()
    faults.record(run.path, kind="error", attempt="17.0", rank=None, host=host, update=0, detail="ranks 2, 3 of 4 did not come")
    log.write_text("srun: error: node1: task 0: Exited with exit code 1\n")  # rank 0, which gave up waiting
    after(1)
    assert Events(run).of("ended")[0]["suspects"] == []


@pytest.mark.parametrize("requeue_by", ["requeue", "dependency"])
def test_an_exclusion_that_slurm_refuses_is_not_a_refused_requeue(
    requeue_by: str,
    cluster: Cluster,
    before: Before,
    after: After,
    run: RunFolder,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever were told that the job could not be started again would submit a second one."""

    def insist(*words: object, **how: Any) -> str:
        if "update" in words:
            raise SlurmError("Invalid node name specified")
        return cluster.insist(*words, **how)

    def submit(script: Path, *options: object, environment: Mapping[str, str]) -> tuple[int, str]:
        if any("--exclude" in str(option) for option in options):
            raise SlurmError("Invalid node name specified")
        return cluster.submit(script, *options, environment=environment)

    monkeypatch.setattr(slurm_client, "insist", insist)
    monkeypatch.setattr(slurm_client, "submit", submit)
    for restart in range(2):
        attempt = Attempt(17, restart, ("node1", "node2"))
        cluster.job = replace(RUNNING, restarts=restart)
        before(attempt)
        checkpoint(run, restart + 1)
        faults.record(
            run.path, kind="error", attempt=str(attempt), rank=1, host="node2", update=3, detail="RuntimeError: CUDA error"
        )
        after(1, attempt, requeue_by=requeue_by)
    again = ["scontrol requeue 17"] * 2 if requeue_by == "requeue" else ["sbatch --dependency=afterany:17 /runs/job.sbatch"]
    assert cluster.calls == again
    assert any("node2 failed twice running, but could not be excluded (Invalid node name specified)" in text for text in said)
    assert not any("could not be started again" in text for text in said)
