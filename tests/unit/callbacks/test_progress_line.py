"""The progress line, and the messages between."""

from __future__ import annotations

from typing import Any

import pytest

from relora_ds.callbacks import progress_line
from relora_ds.callbacks.progress_line import ProgressLine
from relora_ds.optimizer.wrapper import RestartRecord

RECORD = {"update": 3, "phase": "lora", "loss": 3.5, "lr": 1e-3, "lora_lr": 2e-3, "tokens_per_s": 12345.6, "restarts": 1}
RECORD["sent_bytes"] = 4_517_888


def test_progress_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([100.0, 110.0, 112.0, 200.0])
    monkeypatch.setattr(progress_line.time, "monotonic", lambda: next(clock))
    progress = ProgressLine(total=9)
    for update in (2, 3, 4, 9):
        progress.show({**RECORD, "update": update})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("ETA ?")
    assert lines[1] == (
        "[relora-ds] lora 3/9  loss 3.5000  lr 1.00e-03  lora_lr 2.00e-03  12,346 tokens/s  sent 4.52 MB  restarts 1  ETA 0:01:00"
    )
    assert len(lines) == 3, "two seconds later nothing is printed, at the last update it is"


def test_the_progress_line_of_a_phase_without_factors(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressLine(total=9).show({name: value for name, value in RECORD.items() if name != "lora_lr"} | {"phase": "full"})
    assert "full 3/9  loss 3.5000  lr 1.00e-03  12,346 tokens/s" in capsys.readouterr().err


def test_a_skipped_update_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressLine(total=9).show({**RECORD, "loss": None, "skipped": True})
    assert "loss skipped" in capsys.readouterr().err


def test_messages_of_the_run(make_run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    line, (run, _) = ProgressLine(total=9), make_run()
    run.done.update = 3
    line.evaluation(run, {"update": 3, "phase": "lora", "eval_loss": 3.0, "eval_perplexity": 20.0})
    line.restart(run, RestartRecord(1, 0.99, 0.1, 0.0, 0.1, {}, 0, "", {}))
    first, second = capsys.readouterr().err.splitlines()
    assert first == "[relora-ds] update 3: validation loss 3.0000, perplexity 20.000"
    assert second.startswith("[relora-ds] update 3: restart 1, merged change 10.00% of W, 99.0% of the moments pruned"), second


def test_on_a_terminal_messages_begin_on_their_own_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_line.sys.stderr, "isatty", lambda: True, raising=False)
    line = ProgressLine(total=9)
    line.message("before")
    line.show(RECORD)
    line.message("after")
    text = capsys.readouterr().err
    assert text.startswith("[relora-ds] before\n\r\x1b[2Klora 3/9") and text.endswith("ETA ?\n[relora-ds] after\n")
