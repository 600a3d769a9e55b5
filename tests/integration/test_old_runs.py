"""Runs that earlier versions left resume."""

from __future__ import annotations

import shutil
import sys
import tarfile
from pathlib import Path

import pytest

from tests.command_line import command, read_log

RUN_0_1 = Path(__file__).parent / "data" / "run_0_1.tar.xz"
"""A run of version 0.1 on two ranks, when the package was one folder: stopped after update 8 of 12, with the metrics of all 12."""


@pytest.mark.long
def test_a_run_of_the_flat_package_goes_on(tmp_path: Path) -> None:
    """The losses, and what the restarts did, are as they were then, as far as another CPU's bits allow."""
    with tarfile.open(RUN_0_1) as archive:
        archive.extractall(tmp_path, filter="data")
    run = tmp_path / "run"
    logs = ("metrics.jsonl", "restarts.jsonl")
    before = {log: read_log(shutil.copy(run / log, tmp_path / log)) for log in logs}
    told = command(
        [sys.executable, "-m", "relora_ds", "train", "recipe.yaml", "--nproc", "2"], cwd=tmp_path, WANDB_MODE="disabled"
    )
    assert "update_0000008" in told.stderr
    for log in logs:
        after = read_log(run / log)
        assert [sorted(record) for record in after] == [sorted(record) for record in before[log]]
        for new, old in zip(after, before[log], strict=True):
            numbers = {key: value for key, value in old.items() if isinstance(value, float)}
            assert {key: new[key] for key in numbers} == pytest.approx(numbers, rel=1e-3)
    assert len(before["restarts.jsonl"]) == 3
