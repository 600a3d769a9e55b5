"""The conversion of a checkpoint for another number of ranks, by a stand-in of DeepSpeed's program."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from relora_ds.checkpoint import universal as elastic
from relora_ds.launch import launcher
from relora_ds.run import manifest as manifests

WRITES = 'mkdir -p "$8/zero/a.weight"; echo master >"$8/zero/a.weight/fp32.pt"'


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints" / "update_0000004"
    folder.mkdir(parents=True)
    manifests.write(folder, {"files": {}})
    return folder


def stand_in(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a shell script in the interpreter's place; its argument 8 is the folder to write."""
    path = tmp_path / "python"
    tie = f'case "$1" in -I) exec {sys.executable} "$@";; esac'  # what ties it to the rank is Python's still
    path.write_text(f"#!/bin/bash\n{tie}\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_it_is_finished_although_the_run_is_asked_to_stop(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM signals every process of a step."""
    signals = "".join(f"kill -s {name} $$; " for name in ("TERM", "USR1", "USR2", "HUP", "INT"))
    stand_in(tmp_path, f"{signals} {WRITES}", monkeypatch)
    told: list[str] = []
    for _ in range(2):
        elastic.convert(checkpoint, tmp_path / "universal", told.append)
    assert [line.split()[0] for line in told] == ["converting", "reusing"]


def test_one_that_is_not_whole_is_made_anew(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a copy that was broken off leaves it, or a power cut."""
    stand_in(tmp_path, WRITES, monkeypatch)
    told: list[str] = []
    written = tmp_path / "universal" / "zero" / "a.weight" / "fp32.pt"
    for content in ("", None):
        elastic.convert(checkpoint, tmp_path / "universal", told.append)
        assert written.read_text() == "master\n"
        if content is None:
            written.unlink()
        else:
            written.write_text(content)
    elastic.convert(checkpoint, tmp_path / "universal", told.append)
    assert [line.split()[0] for line in told] == ["converting"] * 3


def test_a_failure_has_the_programs_last_words(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, "mkdir -p $8; echo no space left; exit 1", monkeypatch)
    with pytest.raises(elastic.ConversionError, match=r"ds_to_universal failed on .*update_0000004: no space left"):
        elastic.convert(checkpoint, tmp_path / "universal", print)
    assert not (tmp_path / "universal").exists()


def test_it_does_not_outlive_its_rank(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=1, stdout="")

    monkeypatch.setattr(elastic.subprocess, "run", run)
    with pytest.raises(elastic.ConversionError):
        elastic.convert(checkpoint, tmp_path / "universal", print)
    tie = launcher.tied([])
    assert commands[0][: len(tie)] == tie
