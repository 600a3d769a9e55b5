"""The progress line and the logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from relora_ds.config import parse
from relora_ds.optimizer.wrapper import RestartRecord
from relora_ds.run.folder import RunFolder
from relora_ds.training import metrics

RECORD = {"update": 3, "phase": "lora", "loss": 3.5, "lr": 1e-3, "lora_lr": 2e-3, "tokens_per_s": 12345.6, "restarts": 1}
RECORD["sent_bytes"] = 4_517_888


def test_progress_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([100.0, 110.0, 112.0, 200.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    progress = metrics.Progress(total=9)
    for update in (2, 3, 4, 9):
        progress.show({**RECORD, "update": update})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("ETA ?")
    assert lines[1] == (
        "[relora-ds] lora 3/9  loss 3.5000  lr 1.00e-03  lora_lr 2.00e-03  12,346 tokens/s  sent 4.52 MB  restarts 1  ETA 0:01:00"
    )
    assert len(lines) == 3, "two seconds later nothing is printed, at the last update it is"


def test_the_progress_line_of_a_phase_without_factors(capsys: pytest.CaptureFixture[str]) -> None:
    metrics.Progress(total=9).show({name: value for name, value in RECORD.items() if name != "lora_lr"} | {"phase": "full"})
    assert "full 3/9  loss 3.5000  lr 1.00e-03  12,346 tokens/s" in capsys.readouterr().err


def test_a_skipped_update_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    metrics.Progress(total=9).show({**RECORD, "loss": None, "skipped": True})
    assert "loss skipped" in capsys.readouterr().err


def test_logs_are_on_disk_at_once(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = parse({**settings, "wandb": {"mode": "disabled"}})
    log = metrics.Metrics(config, RunFolder(tmp_path))
    log.update(RECORD)
    log.restart(3, RestartRecord(1, 0.99, 0.1, 0.0, 0.1, {}, 0, "", {}))
    log.evaluation({"update": 3, "phase": "lora", "eval_loss": 3.0, "eval_perplexity": 20.0})
    assert [json.loads(line)["update"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [3, 3]
    assert json.loads((tmp_path / "restarts.jsonl").read_text())["restart"] == 1
    assert not (tmp_path / "wandb").exists()
    log.close(exit_code=0)
