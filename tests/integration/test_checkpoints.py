"""Checkpoints through the command line, in real processes: kills, two jobs on one folder, the table."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import kill_test
from relora_ds.checkpoint import reader as checkpoints
from relora_ds.run.folder import RunFolder
from tests.integration.conftest import relora, start, wait_for_update

Recipe = Callable[..., Path]


def after_update(update: int) -> kill_test.Aim:
    return lambda run, _age: kill_test.updates_logged(run) >= update


def half_written(name: str) -> kill_test.Aim:
    return lambda run, _age: (run / name).is_dir() and not (run / name / "manifest.json").exists()


def test_killed_runs_end_as_if_they_had_not_been(token_folder: Path, tmp_path: Path) -> None:
    """A short form of benchmarks/kill_test.py: a kill around a merge, one in the writing of a base, one in a save."""
    whole = kill_test.recipe(tmp_path, "whole", token_folder)
    assert kill_test.start(whole).wait(timeout=300) == 0
    path = kill_test.recipe(tmp_path, "killed", token_folder)
    hits = 0
    for aim in (after_update(13), half_written("base/restart_0002"), half_written("checkpoints/update_0000030")):
        hits += kill_test.torture_once(path, tmp_path / "killed", aim)
    assert hits > 0, "no run can miss the first"
    assert kill_test.start(path).wait(timeout=300) == 0
    assert not kill_test.differences(kill_test.result(tmp_path / "killed"), kill_test.result(tmp_path / "whole"))


def test_a_second_job_is_refused_and_a_dead_ones_lock_taken_over(recipe: Recipe, tmp_path: Path) -> None:
    path = recipe("shared", train={"updates": 5000, "checkpoint_every": 5})
    first = start("train", path, "--nproc", 2)
    wait_for_update(tmp_path / "shared", 6, first)
    log = (tmp_path / "shared" / "config.yaml").read_bytes()
    second = relora("train", path, "--nproc", 2, expect=2)
    assert second.stderr.strip().splitlines()[-1].startswith("relora-ds: error: run.dir=")
    assert "in use by process" in second.stderr and "wait for it or stop it" in second.stderr
    ranked = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "relora_ds"]
    third = subprocess.run(
        [*ranked, "train", str(path)], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2]
    )
    assert third.returncode != 0 and third.stderr.count("in use by process") == 1, "said once, by rank 0"
    assert (tmp_path / "shared" / "config.yaml").read_bytes() == log
    kill_test.kill(first)
    done = relora("train", path, "--nproc", 2, "train.updates=20")
    assert "taking over" in done.stderr and "its process is gone" in done.stderr
    assert not (tmp_path / "shared" / "lock.json").exists()


def test_the_table_of_checkpoints(recipe: Recipe, tmp_path: Path) -> None:
    """Sizes, what each needs, and, on demand, what is damaged."""
    relora("train", recipe("run"), "--nproc", 2)
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
