"""What a job does for itself before and after its ranks; SLURM is a record of what it was asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from relora_ds.config import Config
from relora_ds.errors import ConfigError
from relora_ds.run.folder import RunFolder
from relora_ds.run.lock import RunLock
from relora_ds.slurm import client as slurm_client
from relora_ds.slurm import job as slurm_job
from relora_ds.slurm.client import Job, SlurmError
from relora_ds.slurm.events import Events, newest_update, read_outcome, write_outcome
from relora_ds.slurm.job import Attempt, decide, most_nodes
from relora_ds.supervision import faults
from tests.unit.slurm.conftest import FIRST, RUNNING, After, Before, Cluster, checkpoint

# The decision


@pytest.mark.parametrize(
    ("outcome", "code", "stalled", "go_on", "text"),
    [
        (0, 0, 1, False, "the run is done"),
        (0, 143, 1, False, "the run is done"),  # srun killed those who left last
        (75, 1, 1, True, "stopped by a signal"),  # torchrun
        (75, 75, 2, True, "stopped by a signal"),
        (75, 75, 3, False, "3 attempts in a row wrote no newer checkpoint"),
        (2, 143, 1, False, "a setting is wrong"),
        (None, 2, 1, False, "a setting is wrong"),  # before any rank
        (1, 1, 1, False, "the run itself gave up"),
        (None, 137, 1, True, "a rank failed"),
        (None, 1, 3, False, "a rank failed (code 1); 3 attempts"),
        (None, 0, 1, False, "the run is done"),
    ],
)
def test_decisions(outcome: int | None, code: int, stalled: int, go_on: bool, text: str) -> None:
    decision = decide(outcome, code, stalled=stalled, max_stalled=3)
    assert decision.go_on is go_on and text in decision.text


def test_a_cancelled_job_does_not_go_on() -> None:
    assert not decide(75, 75, stalled=1, max_stalled=3, is_cancelled=True).go_on


# Before


def test_the_first_start(cluster: Cluster, before: Before, run: RunFolder) -> None:
    assert before() == 2
    (event,) = Events(run).of("started")
    assert (event["attempt"], event["update"], event["nodes"]) == ("17.0", 0, ["node1", "node2"])


def test_as_many_nodes_as_the_batch_divides_over(said: list[str]) -> None:
    def fits(nodes: int) -> None:
        if 8 % nodes:
            raise ConfigError("train.global_batch", 8, f"does not divide over {nodes}")

    assert [most_nodes(n, fits, said.append) for n in (1, 2, 3, 4, 7)] == [1, 2, 2, 4, 4]
    assert said[0] == "using 2 of 3 nodes: train.global_batch=8: does not divide over 3"


def test_a_later_start_on_as_many_nodes_is_not_checked_again(before: Before, cluster: Cluster) -> None:
    asked: list[int] = []
    for restart, nodes in enumerate((("node1", "node2"), ("node1", "node3"), ("node1",))):
        before(Attempt(17, restart, nodes), fits=asked.append)
    assert asked == [2, 1]


def test_a_recipe_that_fits_nowhere_is_refused_with_the_first_reason(before: Before, cluster: Cluster) -> None:
    def fits(nodes: int) -> None:
        raise ConfigError("relora.rank", nodes, "too large")

    with pytest.raises(ConfigError, match="relora.rank=2: too large"):
        before(fits=fits)


def test_another_jobs_folder_is_refused(before: Before, cluster: Cluster, run: RunFolder) -> None:
    run.path.mkdir(parents=True)
    with RunLock(run.path, job="99.0"), pytest.raises(ConfigError, match=r"in use by process .*\(job 99.0\)"):
        before()


def test_what_is_left_of_an_earlier_start_is_not_waited_for(before: Before, cluster: Cluster, run: RunFolder) -> None:
    run.path.mkdir(parents=True)
    with RunLock(run.path, job="17.0"):
        assert before(Attempt(17, 1, ("node2",))) == 1


def test_a_forerunner_is_waited_for(
    before: Before, cluster: Cluster, run: RunFolder, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Events(run).add("successor", job=17, of=16)
    lock = RunLock(run.path, job="16.0")
    lock.acquire()
    monkeypatch.setattr(slurm_job.time, "sleep", lambda _: lock.release())
    assert before() == 2
    assert "waiting up to 60 s" in said[0]


# After


def test_a_stopped_run_is_requeued(cluster: Cluster, before: Before, after: After, run: RunFolder) -> None:
    before()
    checkpoint(run, 5)
    write_outcome(run, "17.0", 75)
    assert after(143) == 75
    assert cluster.calls == ["scontrol requeue 17"]
    (event,) = Events(run).of("ended")
    assert (event["code"], event["update"], event["decision"], event["suspects"]) == (75, 5, "requeue", [])


def test_a_finished_run_is_not(cluster: Cluster, before: Before, after: After, run: RunFolder) -> None:
    before()
    write_outcome(run, "17.0", 0)
    assert after(0) == 0 and cluster.calls == []


def test_an_outcome_of_another_start_does_not_count(run: RunFolder) -> None:
    assert read_outcome(run, "17.0") is None
    write_outcome(run, "17.0", 0)
    assert (read_outcome(run, "17.0"), read_outcome(run, "17.1")) == (0, None)


@pytest.mark.parametrize(
    "job", [None, replace(RUNNING, restarts=1), replace(RUNNING, state="COMPLETING"), replace(RUNNING, state="CANCELLED")]
)
def test_what_slurm_decided_stands(job: Job | None, cluster: Cluster, before: Before, after: After) -> None:
    """Cancelled, requeued by an operator, or this is a cut-off node's old script while the job runs elsewhere."""
    before()
    cluster.job = job
    assert after(143) == 143 and cluster.calls == []


@pytest.mark.parametrize("state", ["SIGNALING", "CONFIGURING", "RESIZING"])
def test_a_job_that_slurm_is_busy_with_is_under_way(state: str, cluster: Cluster, before: Before, after: After) -> None:
    """scontrol shows these in the place of RUNNING: SIGNALING while a node has not yet answered to a warning."""
    before()
    cluster.job = replace(RUNNING, state=state)
    after(1)
    assert cluster.calls == ["scontrol requeue 17"]


TAKEN = [
    replace(RUNNING, state="COMPLETING", is_preempted=True),
    replace(RUNNING, state="PREEMPTED", is_preempted=True),
    replace(RUNNING, state="COMPLETING", reason="NodeDown"),
    replace(RUNNING, state="NODE_FAIL"),
]
"""What SLURM shows of a job that it ended by PreemptMode=CANCEL, or for a dead node although it must not requeue."""


@pytest.mark.parametrize("job", TAKEN)
def test_a_job_that_slurm_gave_up_goes_on(job: Job, cluster: Cluster, before: Before, after: After, run: RunFolder) -> None:
    before()
    cluster.job = job
    assert after(143) == 143
    assert cluster.calls == ["scontrol requeue 17"]


def test_a_preempted_node_is_not_to_blame(cluster: Cluster, before: Before, after: After, run: RunFolder) -> None:
    before()
    faults.record(run.path, kind="error", attempt="17.0", rank=0, host="node1", update=3, detail="RuntimeError: what is this")
    cluster.job = TAKEN[0]
    after(143)
    assert Events(run).of("ended")[0]["suspects"] == []


def test_starts_that_slurm_ended_are_not_without_progress(
    cluster: Cluster, before: Before, after: After, run: RunFolder, said: list[str]
) -> None:
    """Four preemptions and two faults, all before the first checkpoint; the third fault ends it."""
    jobs = [TAKEN[0], RUNNING, TAKEN[0], TAKEN[2], RUNNING, TAKEN[0], RUNNING]
    for restart, job in enumerate(jobs):
        attempt = Attempt(17, restart, ("node1",))
        cluster.job = replace(job, restarts=restart)
        before(attempt)
        after(1, attempt)
    assert len(cluster.calls) == 6
    assert "3 attempts in a row wrote no newer checkpoint: not started again" in said[-1]


def test_starts_that_vanished_or_that_an_operator_ended_are_not_either(
    cluster: Cluster, before: Before, after: After, run: RunFolder
) -> None:
    for restart in (0, 1, 2):  # killed with all that ran there, and the node is well again
        before(Attempt(17, restart, ("node1",)))
    before(Attempt(17, 3, ("node1",)))
    cluster.job = replace(RUNNING, restarts=4)  # scontrol requeue
    after(143, Attempt(17, 3, ("node1",)))
    before(Attempt(17, 4, ("node1",)))
    after(1, Attempt(17, 4, ("node1",)))
    assert cluster.calls == ["scontrol requeue 17"]


def test_a_limit_that_came_before_the_checkpoint(cluster: Cluster, before: Before, after: After) -> None:
    before()
    cluster.job = replace(RUNNING, state="COMPLETING", reason="TimeLimit")
    after(143)
    assert cluster.calls == ["scontrol requeue 17"]


def test_no_progress_ends_the_job(cluster: Cluster, before: Before, after: After, run: RunFolder, said: list[str]) -> None:
    checkpoint(run, 5)
    for restart in range(3):
        cluster.job = replace(RUNNING, restarts=restart)
        before(Attempt(17, restart, ("node1",)))
        after(1, Attempt(17, restart, ("node1",)))
    assert cluster.calls == ["scontrol requeue 17"] * 2
    assert "3 attempts in a row wrote no newer checkpoint: not started again" in said[-1]


def test_progress_counts_anew(cluster: Cluster, before: Before, after: After, run: RunFolder) -> None:
    for restart in range(5):
        cluster.job = replace(RUNNING, restarts=restart)
        before(Attempt(17, restart, ("node1",)))
        if restart == 2:
            checkpoint(run, 5)
        after(1, Attempt(17, restart, ("node1",)))
    assert newest_update(run) == 5
    assert cluster.calls == ["scontrol requeue 17"] * 5


def test_a_node_that_fails_twice_running_is_excluded(cluster: Cluster, before: Before, after: After, run: RunFolder) -> None:
    for restart, host in enumerate(["node1", "node2", "node2"]):
        attempt = Attempt(17, restart, ("node1", "node2"))
        cluster.job = replace(RUNNING, restarts=restart, excluded=("node9",))
        before(attempt)
        checkpoint(run, restart + 1)
        faults.record(
            run.path, kind="error", attempt=str(attempt), rank=1, host=host, update=3, detail="RuntimeError: CUDA error"
        )
        faults.record(run.path, kind="error", attempt=str(attempt), rank=0, host="node1", update=3, detail="connection closed")
        after(1, attempt)
    assert cluster.calls == [*["scontrol requeue 17"] * 3, "scontrol update JobId=17 ExcNodeList=node9,node2"]


def test_a_start_that_vanished_is_noted_with_the_nodes_that_are_gone(cluster: Cluster, before: Before, run: RunFolder) -> None:
    before()
    cluster.bad = ["node2"]
    before(Attempt(17, 1, ("node1",)))
    (event,) = Events(run).of("ended")
    assert (event["attempt"], event["code"], event["suspects"], event["decision"]) == ("17.0", None, ["node2"], "vanished")


def test_a_node_that_vanished_twice_is_not_used(cluster: Cluster, before: Before, run: RunFolder) -> None:
    cluster.bad = ["node2"]
    before()
    before(Attempt(17, 1, ("node1", "node2")))
    with pytest.raises(slurm_job.ExcludedError, match="node2 failed twice running"):
        before(Attempt(17, 2, ("node1", "node2")))
    assert cluster.calls == ["scontrol requeue 17", "scontrol update JobId=17 ExcNodeList=node2"]


@pytest.mark.parametrize("refuses", [False, True], ids=["asked for", "requeue refused"])
def test_a_successor(refuses: bool, cluster: Cluster, before: Before, after: After, run: RunFolder, said: list[str]) -> None:
    before()
    checkpoint(run, 5)
    write_outcome(run, "17.0", 75)
    cluster.refuses = refuses
    after(75, requeue_by="requeue" if refuses else "dependency")
    assert cluster.calls == ["sbatch --dependency=afterany:17 /runs/job.sbatch"]
    events = Events(run)
    assert events.chain(18) == [17, 18] and events.newest_job() == 18
    assert "submitted job 18" in said[-1]


def test_a_successor_waits_from_the_start(
    cluster: Cluster, before: Before, after: After, run: RunFolder, said: list[str]
) -> None:
    """The node of the batch script may die with it: then nobody could submit one any more."""
    before(requeue_by="dependency")
    assert cluster.calls == ["sbatch --dependency=afterany:17 /runs/job.sbatch"]
    checkpoint(run, 5)
    write_outcome(run, "17.0", 75)
    after(75, requeue_by="dependency")
    assert len(cluster.calls) == 1, "it is there already"
    assert Events(run).newest_job() == 18 and said[-1] == "job 18 starts when job 17 has ended"
    before(Attempt(18, 0, ("node1",)), requeue_by="dependency")
    assert cluster.calls[1:] == ["sbatch --dependency=afterany:18 /runs/job.sbatch"], "and one of its own"


def test_a_successor_keeps_off_a_bad_node(cluster: Cluster, before: Before, after: After, run: RunFolder) -> None:
    for job in (17, 18):
        attempt = Attempt(job, 0, ("node1", "node2"))
        cluster.job = replace(RUNNING, excluded=("node9",))
        before(attempt, requeue_by="dependency")
        checkpoint(run, job)
        faults.record(
            run.path, kind="error", attempt=str(attempt), rank=1, host="node2", update=3, detail="RuntimeError: CUDA error"
        )
        after(1, attempt, requeue_by="dependency")
    assert cluster.calls[2:] == ["scontrol update JobId=19 ExcNodeList=node9,node2"]


def test_a_successor_that_cannot_be_kept_off_a_node_is_there_all_the_same(
    cluster: Cluster, run: RunFolder, said: list[str]
) -> None:
    events = Events(run)
    events.add("successor", job=18, of=17)
    cluster.refuses = True
    slurm_job.hand_over(RUNNING, ["node2"], said.append, events, {})
    assert said == [
        "job 18 starts when job 17 has ended",
        "node2 failed twice running, but could not be excluded (Access/permission denied); to do so by hand: "
        "scontrol update JobId=18 ExcNodeList=node2",
    ]


@pytest.mark.parametrize("is_cancelled", [False, True], ids=["done", "cancelled"])
def test_a_successor_that_is_not_needed_is_withdrawn(
    is_cancelled: bool, cluster: Cluster, before: Before, after: After, run: RunFolder
) -> None:
    before(requeue_by="dependency")
    if is_cancelled:  # by scancel
        cluster.job = replace(RUNNING, state="COMPLETING")
    else:
        write_outcome(run, "17.0", 0)
    after(0, requeue_by="dependency")
    assert cluster.calls[1:] == ["scancel 18"]
    assert Events(run).newest_job() == 17 and Events(run).successor(17) is None


def test_a_job_that_may_not_submit_yet_tries_again_at_its_end(
    cluster: Cluster, before: Before, after: After, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise SlurmError("Job violates accounting/QOS policy")

    with monkeypatch.context() as patched:
        patched.setattr(slurm_client, "submit", refuse)
        assert before(requeue_by="dependency") == 2
    assert said == ["no successor yet: Job violates accounting/QOS policy; tried again when this job ends"]
    after(1, requeue_by="dependency")
    assert cluster.calls == ["sbatch --dependency=afterany:17 /runs/job.sbatch"]


def test_a_successor_gets_the_jobs_environment_without_its_place(
    cluster: Cluster, config: Config, said: list[str], tmp_path: Path
) -> None:
    script = tmp_path / "job.sbatch"
    script.write_text("#!/bin/bash\n#SBATCH --account=lm\n")
    cluster.job = replace(RUNNING, command=str(script))
    environment = {"SLURM_RESTART_COUNT": "2", "SBATCH_ACCOUNT": "x", "SBATCH_QOS": "high", "RANK": "0", "NAME": "value"}
    slurm_job.before(config, FIRST, lambda _: None, requeue_by="dependency", say=said.append, environment=environment)
    assert cluster.environments == [{"SBATCH_QOS": "high", "NAME": "value"}]


@pytest.mark.parametrize(
    ("told", "slurm_says", "restart"),
    [(0, 0, 0), (2, 2, 2), (2, 0, 0), (1, 2, 1)],
    ids=["first", "requeued", "another job's count", "left over from an earlier start"],
)
def test_the_restart_count_is_slurms(told: int, slurm_says: int, restart: int, cluster: Cluster) -> None:
    cluster.job = replace(RUNNING, restarts=slurm_says)
    assert slurm_job.confirmed(Attempt(17, told, ("node1",))) == Attempt(17, restart, ("node1",))


def test_a_start_needs_no_controller(before: Before, cluster: Cluster, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object, **__: object) -> None:
        raise SlurmError("Unable to contact slurm controller")

    monkeypatch.setattr(slurm_client, "shown", silent)
    assert slurm_job.confirmed(FIRST) == FIRST and before() == 2
    assert said == ["going on without the controller: Unable to contact slurm controller"]


def test_an_end_waits_for_the_controller(before: Before, after: After, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    before()
    patience: list[float] = []

    def shown(_: int, patience_s: float = 0.0, **__: object) -> Job:
        patience.append(patience_s)
        return RUNNING

    monkeypatch.setattr(slurm_client, "shown", shown)
    after(1)
    assert patience == [1800.0]


def test_left_to_the_user(cluster: Cluster, before: Before, after: After, run: RunFolder, said: list[str]) -> None:
    before()
    write_outcome(run, "17.0", 75)
    assert after(75, requeue_by="none") == 75 and cluster.calls == []
    assert said[-1] == "to resume from there: sbatch /runs/job.sbatch"


def test_cancelled_by_the_user(cluster: Cluster, before: Before, after: After, run: RunFolder) -> None:
    before()
    Events(run).add("cancelled", job=17)
    write_outcome(run, "17.0", 75)
    assert after(75) == 75 and cluster.calls == []
