"""A sweep of two arms and two seeds over the tiny recipe, and runs of it made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from relora_ds.config import dump
from relora_ds.run import manifest as manifests
from relora_ds.run.manifest import Manifest
from relora_ds.sweeps.sweep_file import Sweep, SweepRun, read_sweep


@pytest.fixture
def content(recipe: Path, tmp_path: Path) -> dict[str, Any]:
    """What the sweep's file holds."""
    return {
        "recipe": str(recipe),
        "dir": str(tmp_path / "sweep"),
        "seeds": [1, 2],
        "overrides": {"wandb": {"mode": "disabled"}},
        "arms": {"lora": {"method": "lora"}, "relora": None},
        "nproc": 1,
    }


@pytest.fixture
def read(tmp_path: Path, content: dict[str, Any]) -> Callable[..., Sweep]:
    """Reads a file of ``content``, with changes of its keys."""

    def read_changed(**changes: Any) -> Sweep:
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({**content, **changes}), encoding="utf-8")
        return read_sweep(path)

    return read_changed


@pytest.fixture
def sweep(read: Callable[..., Sweep]) -> Sweep:
    return read()


def make_run(run: SweepRun, *, update: int, losses: Sequence[float | None], perplexity: float | None = None) -> None:
    """A run's folder: a checkpoint of ``update`` (0: none), an update with each loss at 100 tokens/s, the last evaluation."""
    folder = run.folder
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.config.write_text(dump(run.config))
    batch = run.config.train.global_batch * run.config.data.sequence_length
    records: list[dict[str, Any]] = [
        {"update": at, "loss": loss, "tokens": at * batch, "tokens_per_s": 100.0, "sent_bytes": 1000 + at}
        for at, loss in enumerate(losses, 1)
    ]
    if perplexity is not None:
        records.append({"update": len(losses), "eval_loss": 1.0, "eval_perplexity": perplexity})
    folder.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    folder.traffic.write_text(json.dumps({"starts": [{"trainable_parameters": 9000}, {"trainable_parameters": 640}]}))
    if update:
        checkpoint = folder.checkpoints / f"update_{update:07d}"
        checkpoint.mkdir(parents=True)
        manifests.write(checkpoint, Manifest(update, "lora", 0, 0, 1, 2, "fp32", "", {}, {}, {}, None, {}))


def make_done(run: SweepRun, perplexity: float) -> None:
    """A run that is done."""
    updates = run.config.total_updates
    make_run(run, update=updates, losses=[3.0] * updates, perplexity=perplexity)
