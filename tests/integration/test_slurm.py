"""relora-ds train under a real SLURM: several nodes, each with a network of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.cluster import Cluster, missing
from tests.integration.conftest import ROOT, environment, read_log, relora

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")
Recipe = Callable[..., Path]
SCRIPT = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --output={folder}/job.out
srun {python} -m relora_ds.cli train {recipe}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm"), 2) as up:
        yield up


def test_srun_over_two_nodes_trains_as_two_processes_on_one_machine(cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    """Warm start, restarts, checkpoints and evaluation; the same losses to the last digit."""
    relora("train", recipe("whole"), "--nproc", 2)
    script = tmp_path / "job.sbatch"
    script.write_text(SCRIPT.format(folder=tmp_path, python=sys.executable, recipe=recipe("nodes")))
    before = cluster.tx_bytes("node1")
    job = cluster.wait(cluster.sbatch(script, env=environment(), cwd=ROOT), ("COMPLETED", "FAILED"), timeout=180)
    assert job["state"] == "COMPLETED", (tmp_path / "job.out").read_text()
    assert read_log(tmp_path / "nodes" / "metrics.jsonl") == read_log(tmp_path / "whole" / "metrics.jsonl")
    assert cluster.tx_bytes("node1") - before > 1_000_000, "the ranks were on two nodes"
