"""What a restart costs at first and gains later, out of the logs of runs with it and without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import payback
from relora_ds.errors import ConfigError

BEFORE, CHANGES = [4.0, 3.0], [-0.1, 0.3, 0.1, 0.0, -0.2]
"""Losses up to the first restart, and what it changes in those that follow."""


def write(folder: Path, losses: list[float], restarts: list[int]) -> None:
    folder.mkdir(parents=True)
    logs = {
        "metrics": [{"update": at, "loss": loss} for at, loss in enumerate(losses, 1)],
        "restarts": [{"update": at} for at in restarts],
    }
    for name, records in logs.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.yaml").write_text("run: {}\n")


def test_the_difference_is_taken_between_the_first_restart_and_the_second(tmp_path: Path) -> None:
    """Over the seeds of both; another one has only been trained without."""
    for seed, more in ((1, 0.1), (2, -0.1)):
        write(tmp_path / f"lora/seed-{seed}", [*BEFORE, *[2.0] * 6], [])
        write(tmp_path / f"relora/seed-{seed}", [*BEFORE, *[2.0 + change + more for change in CHANGES], 9.0], [2, 7])
    write(tmp_path / "lora/seed-3", BEFORE, [])
    found = payback.difference(tmp_path, "relora", "lora")
    assert (found.restart, found.seeds) == (2, 2) and found.losses == pytest.approx(CHANGES)
    assert found.windows(2) == pytest.approx([0.1, 0.05])
    assert found.even_after(1) == 3, "not before it was worse"
    assert found.even_after(2) is None
    rows = payback.table(tmp_path, [("relora", "lora")], 2)
    assert rows == [["with", "without", "seeds", "to 2", "to 4", "even after"], ["relora", "lora", "2", "+0.100", "+0.050", "–"]]


@pytest.mark.parametrize(
    ("with_it", "restarts", "message"),
    [
        ([4.0, 3.1, 2.0, 2.0], [2], "is not the same run as lora up to its first restart"),
        ([*BEFORE, 2.0, 2.0], [], "has not restarted"),
        ([*BEFORE, 2.0], [2], "has not as many updates as lora"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, with_it: list[float], restarts: list[int], message: str) -> None:
    write(tmp_path / "lora/seed-1", [*BEFORE, 2.0, 2.0], [])
    write(tmp_path / "relora/seed-1", with_it, restarts)
    with pytest.raises(ConfigError, match=message):
        payback.difference(tmp_path, "relora", "lora")
    with pytest.raises(ConfigError, match="has no seed of both"):
        payback.difference(tmp_path, "relora", "full")
