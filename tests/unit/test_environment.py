"""What the environment says of a process."""

from __future__ import annotations

import socket

import pytest

from relora_ds.environment import allocation, attempt, node_name


def test_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    assert allocation() is None
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    assert allocation() == "node[1-2]"


@pytest.mark.parametrize(
    ("environment", "name"),
    [({}, ""), ({"SLURM_JOB_ID": "12"}, "12.0"), ({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "3"}, "12.3")],
)
def test_attempt(environment: dict[str, str], name: str) -> None:
    assert attempt(environment) == name


def test_a_node_has_the_name_that_slurm_knows() -> None:
    assert node_name({"SLURMD_NODENAME": "gpu-2"}) == "gpu-2"
    assert node_name({}) == socket.gethostname()
