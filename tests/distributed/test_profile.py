"""The profiler in a run of two ranks: the run is the same, and every part of an update is found."""

from __future__ import annotations

import copy
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from relora_ds.callbacks.profile import Profile
from relora_ds.config import parse
from relora_ds.errors import EXIT_DONE
from relora_ds.launch import places
from relora_ds.supervision import parts
from relora_ds.training.loop import train
from relora_ds.training.preflight import check
from tests.command_line import read_log
from tests.distributed.pool import run


def train_profiled(content: dict[str, Any], num_updates: int) -> int:
    """With the profiler on rank 0 in so many updates, if in any."""
    place = places.discover()
    assert place is not None
    callbacks = [Profile(num_updates)] if num_updates and place.is_main else []
    checked = check(parse(content), Path("recipe.yaml"), place.world_size)
    return train(checked, place, torch.device("cpu"), callbacks=callbacks)


def spans(trace: Path) -> dict[str, list[tuple[float, float]]]:
    """From when to when each part goes on."""
    with gzip.open(trace) as file:
        events = [event for event in json.load(file)["traceEvents"] if str(event.get("name")).startswith(parts.PREFIX)]
    found: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        found.setdefault(event["name"].removeprefix(parts.PREFIX), []).append((event["ts"], event["ts"] + event["dur"]))
    return found


def test_a_profiled_run_is_the_same_run(settings: dict[str, Any], tmp_path: Path) -> None:
    """Seven updates of two micro batches a rank, the first two at full rank; a restart follows the fourth and the sixth."""
    settings["relora"] = {"rank": 4, "alpha": 8, "dropout": 0.1, "warm_start": 2, "restart_every": 2, "restart_warmup": 1}
    settings["train"] = {"updates": 7, "global_batch": 8, "micro_batch": 2, "eval_every": 4, "checkpoint_every": 4}
    settings["wandb"] = {"mode": "disabled"}
    plain = copy.deepcopy(settings)
    plain["run"]["dir"] = str(tmp_path / "plain")
    assert run(2, train_profiled, plain, 0) == run(2, train_profiled, settings, 3) == [EXIT_DONE, EXIT_DONE]
    for name in ("metrics.jsonl", "restarts.jsonl"):
        assert read_log(tmp_path / "run" / name) == read_log(tmp_path / "plain" / name), name
    assert not (tmp_path / "plain" / "profile").exists()

    folder = tmp_path / "run" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"update_000000{update}.json.gz" for update in (3, 4, 5)), "updates_0000003_0000005.md",
    ]  # fmt: skip
    found = spans(folder / "update_0000004.json.gz")
    assert {name: len(times) for name, times in found.items() if name != parts.REDUCTION} == Counter(
        {name: 1 for name in parts.PARTS if name != parts.REDUCTION}
        | {name: 2 for name in (parts.DATA, parts.FORWARD, parts.BACKWARD, parts.STEP)}
    )
    around = {parts.REDUCTION: found[parts.BACKWARD], parts.ALL_GATHER: found[parts.STEP], parts.RESTART: found[parts.STEP]}
    for name, outer in around.items():
        assert all(any(begin < start < end < over for begin, over in outer) for start, end in found[name]), name
    page = (folder / "updates_0000003_0000005.md").read_text()
    table = {cells[1].strip(): cells for line in page.splitlines() if len(cells := line.split("|")) == 6}
    assert list(table)[:3] == ["part", "---", "update"] and set(parts.PARTS) <= set(table)
    assert sum(float(table[name][2].strip(" %")) for name in parts.PARTS) == pytest.approx(100, abs=0.5)
    assert table[parts.REDUCTION][4].strip() != "0 B" != table[parts.ALL_GATHER][4].strip()
