"""The profiler on the loop: which updates, which files; and that it ends no run. The real profiler, on a run without an engine."""

from __future__ import annotations

import errno
import gzip
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from relora_ds.callbacks import profile as module
from relora_ds.callbacks.callback import RunState
from relora_ds.callbacks.profile import Profile, unused, write_trace
from relora_ds.supervision import parts


def train(run: RunState, callback: Profile, last: int) -> None:
    """Begins, where that was not done, and trains up to ``last``: each update is one product."""
    if callback.run is None:
        callback.begin(run)
    for update in range(run.done.update + 1, last + 1):
        run.update_in_progress = update
        callback.begin_update(run)
        with parts.part(parts.FORWARD):
            torch.ones(8, 8) @ torch.ones(8, 8)
        run.done.update = update
        callback.update(run, {})


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "profile").iterdir())


def test_two_updates_warm_up_and_as_many_are_timed_without(make_run: Any) -> None:
    run, lines = make_run()
    callback = Profile(2)
    train(run, callback, 5)
    assert lines == ["the profiler runs in updates 3 to 4"]
    train(run, callback, 8)
    assert "where the time goes: updates 3 to 4, phase lora" in lines
    assert any("(median of 2) with the profiler" in line and line.endswith("(median of 2) without") for line in lines)
    callback.end(0)
    assert sum("where the time goes" in line for line in lines) == 1, "told once"


def test_a_trace_of_each_update_and_the_tables(make_run: Any, tmp_path: Path) -> None:
    run, lines = make_run()
    train(run, Profile(2), 6)
    assert files(tmp_path) == ["update_0000003.json.gz", "update_0000004.json.gz", "updates_0000003_0000004.md"]
    with gzip.open(tmp_path / "profile" / "update_0000003.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("relora_ds: forward") == names.count("relora_ds: rest") == names.count("aten::mm") == 1
    page = (tmp_path / "profile" / "updates_0000003_0000004.md").read_text()
    assert page.startswith("# Where the time goes: updates 3 to 4, phase lora\n") and "| aten::mm | " in page
    assert lines[-1].startswith(f"these tables are in {tmp_path}/profile/updates_0000003_0000004.md;")


def test_earlier_files_stay(make_run: Any, tmp_path: Path) -> None:
    """Of a run that went back to an earlier checkpoint."""
    run, lines = make_run()
    train(run, Profile(1), 4)
    before = {path: path.read_bytes() for path in (tmp_path / "profile").iterdir()}
    run.done.update = 0
    train(run, Profile(1), 4)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert files(tmp_path) == [
        "update_0000003.json.gz", "update_0000003_2.json.gz", "updates_0000003_0000003.md", "updates_0000003_0000003_2.md",
    ]  # fmt: skip
    assert "updates_0000003_0000003_2.md" in lines[-1]
    assert unused(tmp_path / "profile" / "update_0000003.json.gz").name == "update_0000003_3.json.gz"


@pytest.mark.parametrize(
    ("done", "told", "traces"),
    [
        (15, "the profiler runs in updates 18 to 20", 3),
        (17, "the profiler runs in update 20", 1),
        (18, "nothing is profiled: 2 updates warm up, and no other is left", 0),
        (20, "nothing is profiled: 2 updates warm up, and no other is left", 0),
    ],
)
def test_a_resumed_run_with_fewer_updates_left(make_run: Any, tmp_path: Path, done: int, told: str, traces: int) -> None:
    run, lines = make_run()
    run.done.update = done
    callback = Profile(5)
    train(run, callback, 20)
    callback.end(0)
    assert lines[0] == told
    assert len(list(tmp_path.glob("profile/*.json.gz"))) == traces
    assert any("none was left to be timed without" in line for line in lines) == (traces > 0)


def test_a_run_that_is_stopped_tells_what_is_there(make_run: Any) -> None:
    run, lines = make_run()
    callback = Profile(5)
    train(run, callback, 4)
    callback.end(75)
    assert "where the time goes: updates 3 to 4, phase lora" in lines


def test_an_error_within_an_update_leaves_no_profiler_on(make_run: Any) -> None:
    run, lines = make_run()
    callback = Profile(5)
    train(run, callback, 2)
    run.update_in_progress = 3
    callback.begin_update(run)
    assert torch.autograd._profiler_enabled()
    callback.end(1)
    assert not torch.autograd._profiler_enabled()
    assert len(lines) == 1
    Profile(1).end(1)  # an error before the run began


def test_a_profiler_that_fails_ends_no_run(make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> NoReturn:
        raise RuntimeError("another one runs")

    run, lines = make_run()
    monkeypatch.setattr(module, "_profiler", fail)
    train(run, Profile(5), 9)
    assert lines[1:] == ["the profiler does not start (another one runs): the run goes on without it"]
    assert not (tmp_path / "profile").exists()


# Places that cannot be written to


def test_a_disk_that_refuses_a_trace(make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    run, lines = make_run()
    monkeypatch.setattr(module.gzip, "open", refuse)
    train(run, Profile(1), 4)
    path = tmp_path / "profile" / "update_0000003.json.gz"
    assert lines[1] == f"{path} could not be written (No space left on device): the run goes on without it"
    assert files(tmp_path) == ["updates_0000003_0000003.md"], "the tables are there, and nothing of the trace"
    monkeypatch.setattr(module, "write_atomically", refuse)
    run.done.update = 0
    train(run, Profile(1), 4)
    assert any("updates_0000003_0000003_2.md could not be written" in line for line in lines)
    assert lines[-1].startswith("an update took"), "they are told nevertheless"


@pytest.mark.parametrize("small_disk", ["1m"], indirect=True)
def test_a_trace_that_finds_no_room_leaves_the_room_that_there_was(small_disk: Path) -> None:
    """torch says nothing of it, and keeps its file open."""

    def trace(num_products: int) -> Callable[[], None]:
        with module._profiler() as profiler:
            for _ in range(num_products):
                torch.ones(8, 8) @ torch.ones(8, 8)
        return lambda: write_trace(profiler, small_disk / "update_0000003.json.gz")

    large = trace(2000)
    with pytest.raises(OSError, match="is the disk full"):
        large()
    assert list(small_disk.iterdir()) == []
    assert subprocess.run(["df", "--output=used", small_disk], capture_output=True, text=True).stdout.split()[-1] == "0"
    trace(20)()
    assert [path.name for path in small_disk.iterdir()] == ["update_0000003.json.gz"]
