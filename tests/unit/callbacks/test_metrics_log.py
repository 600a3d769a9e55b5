"""metrics.jsonl, restarts.jsonl, ranks.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from relora_ds.callbacks.metrics_log import MetricsLog
from relora_ds.optimizer.wrapper import RestartRecord


def updates(path: Path) -> list[int]:
    return [json.loads(line)["update"] for line in path.read_text().splitlines()]


def test_lines_are_on_disk_at_once(make_run: Any, tmp_path: Path) -> None:
    run, _ = make_run()
    log = MetricsLog(run)
    log.begin(run)
    run.done.update = 3
    log.update(run, {"update": 3, "loss": 3.5})
    log.restart(run, RestartRecord(1, 0.99, 0.1, 0.0, 0.1, {}, 0, "", {}))
    log.evaluation(run, {"update": 3, "eval_loss": 3.0})
    log.rank_times(run, {"update": 3, "hosts": ["here"], "forward_s": [0.1]})
    assert updates(tmp_path / "metrics.jsonl") == [3, 3]
    assert json.loads((tmp_path / "restarts.jsonl").read_text())["restart"] == 1
    assert updates(tmp_path / "restarts.jsonl") == updates(tmp_path / "ranks.jsonl") == [3]


def test_what_will_be_done_again_is_dropped(make_run: Any, tmp_path: Path) -> None:
    names = ("metrics.jsonl", "restarts.jsonl", "ranks.jsonl")
    for name in names:
        (tmp_path / name).write_text("".join(json.dumps({"update": update}) + "\n" for update in (1, 2, 3)))
    run, _ = make_run()
    run.done.update = 2
    MetricsLog(run).begin(run)
    assert [updates(tmp_path / name) for name in names] == [[1, 2]] * 3
