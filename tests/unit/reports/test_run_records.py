"""What is read of a run's folder, and which folders are refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from relora_ds.errors import ConfigError
from relora_ds.reports.run_records import read_run, unique_labels, without_redone
from relora_ds.run.folder import read_jsonl
from tests.unit.reports.run_folders import falling, restart, update, write_run


def test_labels_are_unique(tmp_path: Path) -> None:
    assert unique_labels([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    assert unique_labels([tmp_path / "a" / "x", tmp_path / "b" / "y"]) == ["x", "y"]


def test_cut_off_last_line_is_tolerated(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"update": 201, "phase": "lo')
    assert read_run(run_dir).updates[-1]["update"] == 200


@pytest.mark.parametrize("broken", ['{"update": 2, "lo', "[1]", '{"loss": 1.0}', ""])
def test_broken_line_in_the_middle_is_refused(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"update": 1, "loss": 2.0}}\n{broken}\n{{"update": 3, "loss": 2.0}}\n')
    with pytest.raises(ConfigError, match=r"line 2 of metrics\.jsonl") as caught:
        read_jsonl(path)
    assert caught.value.key == "RUN_DIR" and str(tmp_path) in str(caught.value)


def test_resumed_run_counts_its_later_records(tmp_path: Path) -> None:
    """A run killed at update 120 that goes on from update 100 and has reached 110."""
    again = [update(number, 7.0) for number in range(101, 111)]
    run = read_run(write_run(tmp_path / "run", falling(120) + again, [restart(1, 50), restart(2, 115)]))
    assert [record["update"] for record in run.updates] == list(range(1, 111))
    assert run.updates[-1]["loss"] == 7.0
    assert [record["restart"] for record in run.restarts] == [1]
    assert without_redone([{"update": 1}, {"update": 2}, {"update": 2}]) == [{"update": 1}, {"update": 2}]


def test_seconds_of_updates(tmp_path: Path) -> None:
    records = [
        update(1, 3.0, tokens=40, tokens_per_s=10.0),
        update(2, 3.0, tokens=100, tokens_per_s=20.0),
        update(3, 3.0, tokens=160),
    ]
    records[2]["tokens_per_s"] = None
    run = read_run(write_run(tmp_path / "run", records))
    assert run.tokens_of_updates == [40, 60, 60]
    assert run.seconds[:2] == [4.0, 3.0] and math.isnan(run.seconds[2])


def test_settings_by_dotted_key(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", falling(1), settings="relora: {rank: 4, reset: 7}\n"))
    assert (run.setting("relora.rank"), run.setting("relora.reset.kind"), run.setting("train")) == (4, None, None)
