"""wandb, the real one, offline: no key, no question, one id over a resume, steps that go on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from tests.integration.conftest import command, relora


def read_steps(file: Path) -> tuple[str, list[int]]:
    """The run id and the steps of the history records in a .wandb file; each tells the bytes of its update."""
    wandb = Path(sys.executable).parent / "wandb"
    records = [json.loads(line) for line in command([wandb, "leet", "inspect", "--json", file]).stdout.splitlines()]
    assert all("train/sent_bytes" in json.dumps(record) for record in records if "train/loss" in json.dumps(record))
    run_id = next(record["run"]["run_id"] for record in records if record["type"] == "run")
    return run_id, [record["history"]["step"]["num"] for record in records if record["type"] == "history"]


def test_offline_without_a_key_and_resumed(recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe("run", wandb={"mode": "auto"}, relora={"warm_start": 0}, train={"eval_every": None})
    keyless = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_SILENT": "true"}
    relora("train", path, "train.updates=6", "--nproc", 2, **keyless)
    relora("train", path, "train.updates=12", "--nproc", 2, **keyless)
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    (first_id, first), (second_id, second) = map(read_steps, files)
    assert first_id == second_id == (tmp_path / "run" / "wandb_id").read_text()
    assert sorted(set(first)) == list(range(1, 7))
    assert sorted(set(second)) == list(range(7, 13))
