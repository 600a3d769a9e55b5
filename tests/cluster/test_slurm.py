"""relora-ds train under a real SLURM: several nodes, each with a network of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.cluster import Cluster, missing
from tests.command_line import ROOT, environment, read_log, relora, write_recipe

pytestmark = [pytest.mark.long, pytest.mark.skipif(missing() is not None, reason=missing() or "")]
Recipe = Callable[..., Path]
SCRIPT = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --output={folder}/job.out
srun {python} -m relora_ds train {recipe}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm"), 2) as up:
        yield up


@pytest.fixture(scope="module")
def losses(token_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of two processes on one machine."""
    folder = tmp_path_factory.mktemp("whole")
    relora("train", write_recipe(folder, token_folder, "whole"), "--nproc", 2)
    return read_log(folder / "whole" / "metrics.jsonl")


@pytest.fixture
def train(cluster: Cluster, recipe: Recipe, tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    """Runs a job over both nodes to its end; returns its losses."""

    def run() -> list[dict[str, Any]]:
        script = tmp_path / "job.sbatch"
        script.write_text(SCRIPT.format(folder=tmp_path, python=sys.executable, recipe=recipe("nodes")))
        job = cluster.wait(cluster.sbatch(script, env=environment(), cwd=ROOT), ("COMPLETED", "FAILED"), timeout=180)
        assert job["state"] == "COMPLETED", (tmp_path / "job.out").read_text()
        return read_log(tmp_path / "nodes" / "metrics.jsonl")

    return run


@pytest.fixture
def rename(cluster: Cluster, tmp_path: Path) -> Iterator[Callable[[str, str], None]]:
    """Gives a node a hosts file of its own, until the end of the test."""
    renamed = []

    def install(node: str, hosts: str) -> None:
        path = tmp_path / f"hosts.{node}"
        path.write_text(f"127.0.0.1 localhost\n{hosts}\n")
        cluster.run(node, "mount", "--bind", path, "/etc/hosts")
        renamed.append(node)

    yield install
    for node in renamed:
        cluster.run(node, "umount", "/etc/hosts")


def test_nodes_whose_names_do_not_resolve(
    cluster: Cluster, train: Callable[[], object], losses: object, rename: Callable[[str, str], None]
) -> None:
    """SLURM knows their addresses."""
    before = cluster.tx_bytes("n1")
    for node in ("n1", "n2"):
        rename(node, "")
    assert train() == losses
    assert cluster.tx_bytes("n1") - before > 1_000_000, "the ranks were on two nodes"


def test_nodes_whose_own_names_lead_elsewhere(
    cluster: Cluster, train: Callable[[], object], losses: object, rename: Callable[[str, str], None]
) -> None:
    """To loopback, as Debian has it, and to a second network that does not join the nodes."""
    cluster.run("n2", "ip", "link", "add", "mgmt0", "type", "veth", "peer", "name", "mgmt1")
    cluster.run("n2", "ip", "address", "add", "192.168.99.2/24", "dev", "mgmt0")
    for end in ("mgmt0", "mgmt1"):
        cluster.run("n2", "ip", "link", "set", end, "up")
    rename("n1", f"127.0.1.1 node1 n1\n{cluster.address('n2')} node2 n2")
    rename("n2", f"192.168.99.2 node2 n2\n{cluster.address('n1')} node1 n1")
    assert train() == losses


def test_a_sweep_is_a_job_for_each_run(cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    """What is queued, running or done is not submitted again."""
    arms = {"lora": {"method": "lora"}, "relora": {"relora.rank": 2}}
    sweep = {"recipe": str(recipe("base")), "dir": str(tmp_path / "sweep"), "seeds": [3], "arms": arms}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))

    def call(*options: str) -> subprocess.CompletedProcess[str]:
        words = (sys.executable, "-m", "relora_ds", "sweep", path, *options)
        return cluster.run("ctl", *words, env=environment(HOME=str(tmp_path)), cwd=ROOT)

    submit = ("--slurm", "--tasks-per-node", "1", "--no-check")
    nodes = ("scontrol", "update", "nodename=n[1-2]")
    cluster.run("ctl", *nodes, "state=drain", "reason=test")  # the jobs wait until they were submitted twice
    jobs = [int(job) for job in re.findall(r"submitted job (\d+)", call(*submit).stdout)]
    assert len(jobs) == 2
    again = call(*submit)
    assert "submitted" not in again.stdout
    assert len(re.findall(r"\w+/seed-3 is queued", again.stderr)) == 2
    cluster.run("ctl", *nodes, "state=resume")
    for job in jobs:
        assert cluster.wait(job, ("COMPLETED", "FAILED"), timeout=180)["state"] == "COMPLETED"
    assert call(*submit).stderr.count("/seed-3 is done") == 2
    lora, relora_ = call("--table").stdout.splitlines()[1:3]
    assert lora.split()[:2] == ["lora", "1"] and relora_.split()[:2] == ["relora", "1"]
