"""traffic.json as a run writes it, without an engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from relora_ds.callbacks.traffic import TrafficLog
from relora_ds.launch.places import Place


def test_entries_of_others_stay_and_end_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that was cut short by hand, or that another tool wrote."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    path = tmp_path / "traffic.json"
    others = [{"attempt": "7.0"}, {"first_update": 1, "last_update": 4}, {"attempt": "7.0", "first_update": 3}]
    path.write_text(json.dumps({"starts": others}))
    log = TrafficLog(path, Place(0, 1, 0, 1, "127.0.0.1", 1, "torchrun"), ["here"], torch.device("cpu"), "7.0")
    log.count_from(3)
    log.write(4)
    *kept, own = json.loads(path.read_text())["starts"]
    assert kept == others[:2]
    assert (own["attempt"], own["first_update"], own["last_update"]) == ("7.0", 3, 4)
