"""Checkpoints through the command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from relora_ds.checkpoint import reader as checkpoints
from relora_ds.run.folder import RunFolder
from tests.command_line import relora


@pytest.mark.long
def test_the_table_of_checkpoints(whole: Path, tmp_path: Path) -> None:
    """Sizes, what each needs, and, on demand, what is damaged."""
    shutil.copytree(whole, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    told = relora("checkpoints", folder.path).stdout.splitlines()
    assert told[0].split() == ["checkpoint", "update", "phase", "restarts", "ranks", "size", "needs", "state"]
    assert [line.split()[0] for line in told[1:]] == [
        "update_0000025",
        "update_0000030",
        "base/restart_0002",
        "base/restart_0003",
    ]
    assert "lora" in told[1] and "restart_0002" in told[1] and "KiB" in told[1] and told[1].endswith("complete")
    assert "whole" in relora("checkpoints", folder.path, "--verify").stdout
    victim = checkpoints.find_all(folder)[0] / checkpoints.MODEL_STATES
    content = bytearray(victim.read_bytes())
    content[100] ^= 1
    victim.write_bytes(content)
    assert "damaged" not in relora("checkpoints", folder.path).stdout, "sizes alone do not tell"
    told = relora("checkpoints", folder.path, "--verify", expect=1).stdout
    assert "damaged" in told and f"{victim}: holds other bytes than were written" in told
    assert "holds no run" in relora("checkpoints", tmp_path / "nothing", expect=2).stderr
