"""What a sweep remembers of its runs."""

from __future__ import annotations

from pathlib import Path

from relora_ds.sweeps.events import Events


def test_the_newest_word_on_a_run_counts(tmp_path: Path) -> None:
    assert Events(tmp_path / "nowhere").newest == {}
    events = Events(tmp_path)
    events.add("a/seed-1", "running")
    events.add("a/seed-1", "failed", code=1, error="no")
    events.add("b/seed-1", "running")
    with events.path.open("a") as file:
        file.write('{"run": "b/see')  # a kill
    again = Events(tmp_path).newest
    assert {run: event["state"] for run, event in again.items()} == {"a/seed-1": "failed", "b/seed-1": "running"}
    assert again["a/seed-1"]["error"] == "no"
    Events(tmp_path).add("b/seed-1", "failed", code=1, error="no disk")
    assert Events(tmp_path).newest["b/seed-1"]["state"] == "failed", "the line behind the one that was cut off"
