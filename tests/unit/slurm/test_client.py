"""SLURM's answers, as they were recorded, and its complaints."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from relora_ds.errors import ConfigError
from relora_ds.slurm import client
from relora_ds.slurm.client import SlurmError, bad_nodes, duration, in_one_line, largest, number, parse_json, parse_scontrol

SCONTROL = (
    "JobId=7 JobName=my job UserId=me(1000) GroupId=me(1000) MCS_label=N/A Priority=42 Nice=0 Account=(null) QOS=(null) "
    "JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0 RunTime=1-00:00:10 "
    "TimeLimit=2-00:00:00 TimeMin=N/A SubmitTime=2026-11-22T10:58:07 Partition=low AllocNode:Sid=ctl:0 ReqNodeList=(null) "
    "ExcNodeList=node9 NodeList=node[1-2] BatchHost=node1 NumNodes=2 NumCPUs=2 NumTasks=2 CPUs/Task=1 ReqB:S:C:T=0:0:*:* "
    "Command=/runs/a b/job.sbatch WorkDir=/work StdErr=/runs/a b/job.out StdIn=/dev/null StdOut=/runs/a b/job.out Power= \n"
)
OLD_JSON = {
    "job_id": 1, "job_state": "RUNNING", "name": "a", "nodes": "node[1-2]", "restart_cnt": 3, "time_limit": 10, "start_time": 1000,
    "standard_output": "", "state_reason": "None",
}  # fmt: skip
NEW_JSON = {
    "job_id": 1, "job_state": ["RUNNING"], "name": "a", "nodes": "node[1-2]", "restart_cnt": 3,
    "time_limit": {"set": True, "infinite": False, "number": 10}, "start_time": {"set": True, "infinite": False, "number": 1000},
    "standard_output": "", "state_reason": "None",
}  # fmt: skip


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Puts a shell script on the PATH under the name of one of SLURM's programs."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def put(name: str, text: str) -> None:
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return put


def test_a_job_from_scontrol() -> None:
    job = parse_scontrol(SCONTROL)
    assert (job.id, job.name, job.state, job.nodes, job.restarts, job.excluded) == (
        7, "my job", "RUNNING", "node[1-2]", 2, ("node9",),
    )  # fmt: skip
    assert (job.seconds_used, job.seconds_left) == (86410.0, 86390.0)
    assert (job.log, job.command, job.reason) == ("/runs/a b/job.out", "/runs/a b/job.sbatch", "")


@pytest.mark.parametrize("record", [OLD_JSON, NEW_JSON], ids=["22.05", "23.11"])
def test_a_job_from_squeue(record: dict[str, object]) -> None:
    job = parse_json(record, now=1060.0)
    assert (job.id, job.state, job.nodes, job.restarts, job.reason) == (1, "RUNNING", "node[1-2]", 3, "")
    assert (job.seconds_used, job.seconds_left, job.is_over) == (60.0, 540.0, False)


def test_a_job_that_waits_uses_no_time() -> None:
    job = parse_json({**OLD_JSON, "job_state": "PENDING", "nodes": "", "state_reason": "Resources"}, now=1060.0)
    assert (job.seconds_used, job.seconds_left, job.reason) == (None, None, "Resources")


def test_numbers_of_json() -> None:
    assert number(3) == 3 and number(None) is None
    assert number({"set": False, "infinite": False, "number": 0}) is None
    assert number({"set": True, "infinite": True, "number": 0}) is None


def test_durations() -> None:
    assert [duration(text) for text in ("00:10", "01:00:00", "2-00:00:01", "UNLIMITED", "")] == [10, 3600, 172801, None, None]


def test_complaints_in_one_line() -> None:
    text = "sbatch: error: invalid partition specified: x\nallocation failure: Invalid partition name specified\n"
    assert in_one_line(text) == "invalid partition specified: x; allocation failure: Invalid partition name specified"


def test_bad_nodes() -> None:
    text = "node1 idle\nnode1 idle\nnode2 down*\nnode3 mixed*\nnode4 drained\nnode5 allocated\nnode6 draining\nnode7 mixed\n"
    assert bad_nodes(text) == ["node2", "node3", "node4", "node6"]


def test_the_size_of_a_partition() -> None:
    text = "main* 3\nmain* 1\nlong 8\nshort 2\n"
    assert [largest(text, names) for names in (None, "main", "short", "short,long", "nope")] == [4, 4, 2, 8, None]
    assert largest("PARTITION NODES\n17\n", None) is None


def test_a_program_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"sbatch=None: is not on the PATH; run this where SLURM's commands are"):
        client.call("sbatch")


def test_a_failure_has_the_programs_own_words(program) -> None:  # type: ignore[no-untyped-def]
    program("sbatch", "echo 'sbatch: error: no such account' >&2; exit 1")
    with pytest.raises(SlurmError, match=r"^no such account$"):
        client.submit(Path("script"))
    program("sbatch", "echo 'Welcome to the cluster'; echo 17")
    assert client.submit(Path("script")) == (17, "")
    program("sbatch", "echo '17;alex'")
    assert client.submit(Path("script")) == (17, "alex")


def test_a_silent_controller_is_asked_again(program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(client, "PAUSE_S", 0.01)
    program(
        "scontrol",
        f"[ -e {tmp_path}/asked ] && exit 0; touch {tmp_path}/asked; echo 'Unable to contact slurm controller' >&2; exit 1",
    )
    assert client.insist("scontrol", "requeue", 1) == ""
    program("scontrol", f"echo x >>{tmp_path}/refused; echo 'Access/permission denied' >&2; exit 1")
    with pytest.raises(SlurmError, match="permission denied"):
        client.insist("scontrol", "requeue", 1)
    assert (tmp_path / "refused").read_text() == "x\n", "a refusal stays one"


def test_a_job_is_sought_in_three_places(program) -> None:  # type: ignore[no-untyped-def]
    program("squeue", "echo 'no json here' >&2; exit 1")
    program("scontrol", f"echo '{SCONTROL.strip()}'")
    found = client.job(7)
    assert found is not None and found.restarts == 2
    program("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert client.job(7) is None
    program("sacct", "echo '7|a|CANCELLED by 0|node1|60'")
    found = client.job(7)
    assert found is not None and (found.state, found.nodes, found.is_over) == ("CANCELLED", "node1", True)


def test_another_cluster_is_asked_of_its_job(program, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for name in ("squeue", "scontrol", "sacct"):
        program(name, f"echo {name} $1 >>{tmp_path}/asked; echo 'Invalid job id specified' >&2; exit 1")
    assert client.job(7, "alex") is None
    assert (tmp_path / "asked").read_text() == "".join(f"{name} --clusters=alex\n" for name in ("squeue", "scontrol", "sacct"))


def test_an_outage_is_waited_for_as_long_as_one_has(program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(client, "PAUSE_S", 0.01)
    program("scontrol", f"echo x >>{tmp_path}/asked; echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(SlurmError, match="Unable to contact"):
        client.shown(7, 0.0)
    short = len((tmp_path / "asked").read_text())
    with pytest.raises(SlurmError, match="Unable to contact"):
        client.shown(7, 0.5)
    assert len((tmp_path / "asked").read_text()) > 2 * short


@pytest.mark.parametrize(
    ("fields", "is_preempted"),
    [
        ("PreemptEligibleTime=2026-11-26T02:23:33 PreemptTime=2026-11-26T02:23:36", True),
        ("PreemptEligibleTime=2026-11-26T02:23:33 PreemptTime=None", False),
        ("", False),
    ],
)
def test_a_job_whose_nodes_another_took(fields: str, is_preempted: bool) -> None:
    """As SLURM 22.05 says it: preempted by PreemptMode=CANCEL, cancelled by its user, and older ones."""
    text = f"JobId=1 JobName=a JobState=COMPLETING Reason=None Requeue=1 Restarts=0 {fields} SuspendTime=None NodeList=node1 \n"
    assert parse_scontrol(text).is_preempted is is_preempted
