"""The cluster that other tests stand on: it works, and it leaves nothing behind."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, missing
from tests.command_line import ROOT

pytestmark = [pytest.mark.long, pytest.mark.skipif(missing() is not None, reason=missing() or "")]

NAMESPACES = tuple(f"/proc/self/ns/{kind}" for kind in ("net", "uts", "mnt", "pid"))
SLURMD_PORT = 6818
KILLED_RUN = """
import sys, time
from pathlib import Path
from tests.cluster.cluster import Cluster
with Cluster(Path(sys.argv[1]), 1) as cluster:
    print(cluster.run("n1", "readlink", *sys.argv[2:]).stdout.replace("\\n", " "), flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), 2) as cluster:
        yield cluster


def leftovers(folder: Path, namespaces: set[str]) -> list[str]:
    """The processes that lie in one of the namespaces or were started with ``folder``, and the mounts of it."""
    found = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(folder) in line]
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            words = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            if bytes(folder) in words or namespaces & {str(path.readlink()) for path in (process / "ns").iterdir()}:
                found.append(f"{process.name}: {words[:200]!r}")
    return found


def network() -> list[str]:
    """The names of this machine's own network interfaces, and of the namespaces that have one."""
    interfaces = [line.split(":")[0].strip() for line in Path("/proc/self/net/dev").read_text().splitlines()[2:]]
    named = Path("/run/netns")
    return interfaces + (sorted(path.name for path in named.iterdir()) if named.is_dir() else [])


def reaches(cluster: Cluster, source: str, target: str) -> bool:
    connect = f"timeout 2 bash -c '</dev/tcp/{cluster.address(target)}/{SLURMD_PORT}'"
    return cluster.run(source, "bash", "-c", connect, check=False).returncode == 0


def test_nodes_run_one_command_together(cluster: Cluster) -> None:
    cluster.wait_idle()
    assert cluster.node_states() == {"n1": "idle", "n2": "idle"}
    assert sorted(cluster.run("ctl", "srun", "-N2", "hostname").stdout.split()) == ["node1", "node2"]


def test_a_job_is_known_after_its_end(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sbatch"
    script.write_text("#!/bin/bash\nsrun hostname\nexit ${1:-0}\n")
    good = cluster.wait(cluster.sbatch(script, "-N2", f"--output={tmp_path}/out"), "COMPLETED")
    assert (good["exit_code"], good["restarts"], good["nodes"]) == (0, 0, ["n1", "n2"])
    assert sorted((tmp_path / "out").read_text().split()) == ["node1", "node2"]

    script.write_text("#!/bin/bash\nexit 3\n")
    job_id = cluster.sbatch(script, "--nodelist=n2")
    assert cluster.wait(job_id, {"COMPLETED", "FAILED"})["state"] == "FAILED"
    assert (cluster.job(job_id)["exit_code"], cluster.job(job_id)["nodes"]) == (3, ["n2"])


def test_every_node_has_a_network_of_its_own(cluster: Cluster) -> None:
    addresses = [cluster.run(name, "hostname", "-I").stdout.split()[0] for name in cluster.names]
    assert addresses == [cluster.address(name) for name in cluster.names] == ["10.77.0.1", "10.77.0.2"]
    before = cluster.tx_bytes("n1")
    cluster.run("n1", "bash", "-c", f"head -c 100000 /dev/zero >/dev/tcp/{cluster.address('n2')}/{SLURMD_PORT}", check=False)
    assert cluster.tx_bytes("n1") > before

    assert reaches(cluster, "n1", "n2")
    cluster.cut("n2")
    assert not reaches(cluster, "n1", "n2")
    cluster.join("n2")
    assert reaches(cluster, "n1", "n2")


def test_a_signal_reaches_tasks_and_no_other_session(cluster: Cluster, tmp_path: Path) -> None:
    """As on sites: what a task has started hears nothing where it has left the task's session."""
    (tmp_path / "listen").write_text(f"trap 'echo $1 >>{tmp_path}/heard; exit' USR2\ntouch {tmp_path}/$1\nsleep 600 & wait\n")
    away = f"setsid bash {tmp_path}/listen away </dev/null >/dev/null 2>&1"
    script = tmp_path / "job.sbatch"
    script.write_text(f"#!/bin/bash\nsrun bash -c '{away} & exec bash {tmp_path}/listen task'\n")
    job_id = cluster.sbatch(script, f"--output={tmp_path}/out")
    deadline = time.monotonic() + 20
    while not ((tmp_path / "away").exists() and (tmp_path / "task").exists()):
        assert time.monotonic() < deadline, (tmp_path / "out").read_text()
        time.sleep(0.1)
    cluster.run("ctl", "scancel", "--signal=USR2", job_id)
    cluster.wait(job_id, {"COMPLETED", "FAILED"})
    assert (tmp_path / "heard").read_text().split() == ["task"]


def test_gpus_are_dealt_out(cluster: Cluster) -> None:
    show = ("bash", "-c", "echo $SLURM_PROCID ${CUDA_VISIBLE_DEVICES:-none}")
    for options, shown in (("", "none"), ("--gpus-per-node=2", "0,1"), ("--gres=gpu:1", "0")):
        said = cluster.run("ctl", "srun", "-N2", *options.split(), *show).stdout.splitlines()
        assert sorted(said) == [f"0 {shown}", f"1 {shown}"]
    said = cluster.run("ctl", "srun", "-N2", "--ntasks-per-node=2", "--gpus-per-task=1", *show).stdout.splitlines()
    assert sorted(said) == ["0 0", "1 1", "2 0", "3 1"]


def test_a_killed_node_is_gone_and_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    namespaces = set(cluster.run("n2", "readlink", *NAMESPACES).stdout.split())
    script = tmp_path / "job.sbatch"
    script.write_text("#!/bin/bash\nsleep 600\n")
    job_id = cluster.sbatch(script, "--nodelist=n2", f"--output={tmp_path}/out")
    cluster.wait(job_id, "RUNNING")
    assert leftovers(tmp_path, namespaces)
    cluster.kill_node("n2")
    assert not leftovers(tmp_path, namespaces)
    cluster.start_node("n2")
    cluster.run("ctl", "scancel", job_id)
    assert cluster.wait(job_id, "CANCELLED", timeout=180)["nodes"] == ["n2"]
    cluster.wait_idle()
    assert cluster.run("ctl", "srun", "--nodelist=n2", "hostname").stdout.split() == ["node2"]


def test_nothing_is_left_after_the_end(tmp_path: Path) -> None:
    before = network()
    with Cluster(tmp_path, 1) as cluster:
        namespaces = set(cluster.run("n1", "readlink", *NAMESPACES).stdout.split())
        namespaces |= set(cluster.run("ctl", "readlink", *NAMESPACES).stdout.split())
        assert len(namespaces) == 8
        assert leftovers(tmp_path, namespaces)
        assert network() == before
    assert not leftovers(tmp_path, namespaces)


def test_nothing_is_left_after_a_failed_start(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)a daemon ended on ctl.*Nonsense"):
        Cluster(tmp_path, 1, partitions="Nonsense=1").__enter__()
    assert not leftovers(tmp_path, set())


def test_nothing_is_left_after_the_run_was_killed(tmp_path: Path) -> None:
    words = [sys.executable, "-c", KILLED_RUN, str(tmp_path), *NAMESPACES]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        namespaces = set(process.stdout.readline().split())
        process.kill()
    assert len(namespaces) == 4
    deadline = time.monotonic() + 15
    while leftovers(tmp_path, namespaces) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not leftovers(tmp_path, namespaces)
