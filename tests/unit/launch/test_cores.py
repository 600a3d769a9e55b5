"""How many cores a process may use: by its binding, and by what its cgroup says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from relora_ds.launch import cores


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is bound to no core in particular of 64."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))


def test_a_process_uses_the_cores_that_it_is_bound_to() -> None:
    own = sorted(os.sched_getaffinity(0))[0]
    program = f"import os; os.sched_setaffinity(0, [{own}]); from relora_ds.launch import cores; print(cores.usable())"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "1"


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize(
    ("limits", "count"),
    [
        ({"job/cpu.max": "max 100000"}, 64),
        ({"job/cpu.max": "800000 100000"}, 8),
        ({"job/step/cpu.max": "1600000 100000", "job/cpu.max": "400000 100000"}, 4),  # what is above limits, too
        ({"cpu.max": "250000 100000"}, 2),  # a container that sees its path, but not the folder
        ({"job/step/cpu.max": "50000 100000"}, 1),
    ],
)
def test_a_share_of_time_counts_as_cores(tmp_path: Path, limits: dict[str, str], count: int) -> None:
    root = tmp_path / "sys"
    for name, text in limits.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n", encoding="ascii")
    (tmp_path / "own").write_text("0::/job/step\n", encoding="ascii")
    assert cores.usable(root, tmp_path / "own") == count


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize(("quota", "count"), [("-1", 64), ("800000", 8)])
def test_version_1_of_cgroups(tmp_path: Path, quota: str, count: int) -> None:
    folder = tmp_path / "sys/cpu/job"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text(quota, encoding="ascii")
    (folder / "cpu.cfs_period_us").write_text("100000", encoding="ascii")
    (tmp_path / "own").write_text("5:cpuset:/job\n4:cpu,cpuacct:/job\n1:name=systemd:/x\n", encoding="ascii")
    assert cores.usable(tmp_path / "sys", tmp_path / "own") == count


@pytest.mark.usefixtures("many")
def test_no_cgroups(tmp_path: Path) -> None:
    assert cores.usable(tmp_path / "none", tmp_path / "none") == 64
