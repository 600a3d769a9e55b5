"""The watch, tied to the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from relora_ds.callbacks.watch import Watch
from relora_ds.supervision.watchdog import Watchdog


def test_it_runs_from_the_first_update_to_the_end(make_run: Any, tmp_path: Path) -> None:
    run, _ = make_run()
    watchdog = Watchdog(tmp_path, tmp_path / "stacks", timeout_s=60.0, rank=0, hosts=["here"])
    run.callbacks.append(Watch(watchdog))
    assert watchdog._thread is None, "start-up is not watched"
    run.callbacks[-1].begin(run)
    assert watchdog._thread is not None
    before = watchdog._beats
    run.update_in_progress = 4
    run.callbacks[-1].begin_update(run)
    run.beat("a micro batch", allow_s=600.0)
    assert (watchdog.update, watchdog._beats, watchdog._where) == (4, before + 1, "a micro batch")
    assert watchdog._deadline_s - watchdog._moved_s == 600.0
    run.callbacks[-1].end(0)
    assert watchdog._thread is None
