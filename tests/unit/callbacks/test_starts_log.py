"""starts.jsonl: one line a start, brought up to date, never in the place of another start's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from relora_ds.callbacks import starts_log
from relora_ds.callbacks.callback import RunState
from relora_ds.callbacks.starts_log import StartsLog, command, hardware
from relora_ds.run.folder import read_jsonl


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(log: StartsLog, run: RunState, updates: int) -> None:
    for _ in range(updates):
        log.begin_update(run)
        run.done.update += 1
        log.update(run, {})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in a list of one."""
    now = [0.0]
    monkeypatch.setattr(starts_log.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(starts_log, "age", lambda: 100.0)
    return now


def test_a_line_for_each_start(make_run: Any, tmp_path: Path) -> None:
    run, _ = make_run()
    path = tmp_path / "starts.jsonl"
    for last in (3, 5):
        log = StartsLog(path, ["a", "b", "a"], "7.0")
        log.begin(run)
        train(log, run, last - run.done.update)
        log.checkpoint(run)
        log.end(0)
    first, second = read(path)
    assert (first["first_update"], first["update"], second["first_update"], second["update"]) == (1, 3, 4, 5)
    assert (first["attempt"], first["hosts"], first["world_size"], first["launcher"]) == ("7.0", ["a", "b"], 1, "torchrun")
    assert {"python", "torch", "deepspeed", "transformers", "relora_ds"} == set(first["versions"])
    assert first["hardware"]["cpu"] and first["hardware"]["cores"] >= 1 and "gpu" not in first["hardware"]
    # This process has torch in it, which alone is more than 50 MB.
    assert first["resident_peak_bytes"][run.phase] > 50e6 and "gpu_allocated_peak_bytes" not in first


def test_where_the_time_went(make_run: Any, tmp_path: Path, clock: list[float]) -> None:
    run, _ = make_run()
    log = StartsLog(tmp_path / "starts.jsonl", ["a"], "")
    clock[0] = 10.0
    log.begin(run)
    clock[0] += 1  # the first batch
    log.begin_update(run)
    clock[0] += 2
    log.update(run, {})
    clock[0] += 4
    log.evaluation(run, {})
    clock[0] += 8
    log.checkpoint(run)
    clock[0] += 16  # it is waited for
    run.phase = "other"
    log.begin_update(run)
    clock[0] += 32
    log.update(run, {})
    log.checkpoint(run)
    clock[0] += 64
    log.end(0)
    (line,) = read(tmp_path / "starts.jsonl")
    assert line["seconds"] == {"start_up": 111, "updates": 34, "evaluations": 4, "checkpoints": 72, "phase_change": 16}
    assert list(line["resident_peak_bytes"]) == [run.config.phase_of(1), "other"]


def test_a_start_that_was_replaced_leaves_the_line_of_the_newer_one(make_run: Any, tmp_path: Path) -> None:
    """A job that hangs in a disk may write after another has taken the folder over."""
    run, _ = make_run()
    old, new = (StartsLog(tmp_path / "starts.jsonl", [host], "") for host in ("old", "new"))
    old.begin(run)
    new.begin(run)
    train(old, run, 1)
    old.end(1)
    assert [line["hosts"] for line in read(tmp_path / "starts.jsonl")] == [["old"], ["new"]]


def test_what_a_power_cut_left_of_a_line_is_dropped(make_run: Any, tmp_path: Path) -> None:
    """Behind it, it would be damage that no report passes over."""
    run, _ = make_run()
    path = tmp_path / "starts.jsonl"
    StartsLog(path, ["a"], "").begin(run)
    whole = path.read_text()
    path.write_text(whole + whole[:20])
    StartsLog(path, ["b"], "").begin(run)
    assert [line["hosts"] for line in read_jsonl(path)] == [["a"], ["b"]]


def test_a_disk_that_refuses_ends_no_run(make_run: Any, tmp_path: Path) -> None:
    run, _ = make_run()
    log = StartsLog(tmp_path / "gone" / "starts.jsonl", ["a"], "")
    log.begin(run)
    train(log, run, 1)
    (tmp_path / "gone").mkdir()
    log.end(0)
    assert [line["update"] for line in read(tmp_path / "gone" / "starts.jsonl")] == [1]


def test_a_run_that_never_began_leaves_no_line(tmp_path: Path) -> None:
    StartsLog(tmp_path / "starts.jsonl", ["a"], "").end(1)
    assert not (tmp_path / "starts.jsonl").exists()


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["/x/relora_ds/__main__.py", "train", "a b.yaml", "run.dir=r"], "relora-ds train 'a b.yaml' run.dir=r"),
        (["/bin/relora-ds", "train", "a.yaml"], "relora-ds train a.yaml"),
        (["mine.py", "--fast"], "mine.py --fast"),
        (
            ["/bin/relora-ds", "train", "a.yaml", "deepspeed.comet.api_key=x y"],
            "relora-ds train a.yaml 'deepspeed.comet.api_key=***'",
        ),
    ],
)
def test_the_command(argv: list[str], line: str) -> None:
    assert command(argv) == line


def test_a_machine_without_a_processors_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(starts_log, "CPU_INFO", tmp_path / "none")
    assert hardware(torch.device("cpu"))["cpu"] != ""


def test_a_process_knows_its_age() -> None:
    assert 0 < starts_log.age() < 7 * 24 * 3600
