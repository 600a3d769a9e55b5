"""relora-ds sweep: killed with all that it started, and run again."""

from __future__ import annotations

import csv
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.command_line import relora, start, wait_for_update

MEASURED = ("seconds", "peak_memory", "folder")


def write_sweep(folder: Path, recipe: Path, name: str) -> Path:
    """Two arms with one seed each; the second restarts."""
    content = {
        "recipe": str(recipe),
        "dir": str(folder / name),
        "seeds": [3],
        "arms": {"lora": {"method": "lora"}, "relora": {"relora": {"rank": 2}}},
        "nproc": 1,
    }
    path = folder / f"{name}_sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{key: value for key, value in row.items() if not key.startswith(MEASURED)} for row in csv.DictReader(file)]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_sweep_that_is_killed_ends_with_the_same_table(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """SIGKILL takes the run along that trains; the next call goes on from its checkpoint, and trains the finished arm no more."""
    path = recipe("base")
    whole, killed = (write_sweep(tmp_path, path, name) for name in ("whole", "killed"))
    told = relora("sweep", whole)
    assert "2 of 2 done" in told.stderr and "wrote" in told.stdout

    process = start("sweep", killed)
    wait_for_update(tmp_path / "killed" / "relora" / "seed-3", 12, process, timeout_s=240)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    first = (tmp_path / "killed" / "lora" / "seed-3.log").read_text()
    relora("sweep", killed)
    assert (tmp_path / "killed" / "lora" / "seed-3.log").read_text() == first
    assert "resuming from" in (tmp_path / "killed" / "relora" / "seed-3.log").read_text()
    for name in ("sweep.csv", "runs.csv"):
        assert rows(tmp_path / "killed" / name) == rows(tmp_path / "whole" / name)
    lora, relora_ = rows(tmp_path / "whole" / "runs.csv")
    assert (lora["state"], relora_["state"], lora["update"], relora_["update"]) == ("done", "done", "30", "30")
    assert float(lora["perplexity"]) != float(relora_["perplexity"])
    with (tmp_path / "whole" / "runs.csv").open(newline="") as file:
        assert all(float(row["peak_memory_bytes"]) > 50e6 for row in csv.DictReader(file))
    assert int(lora["trainable_parameters"]) > int(relora_["trainable_parameters"]), "of rank 4 and of rank 2"
