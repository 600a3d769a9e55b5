"""Where time went, and which rank is slow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from relora_ds.reports.run_records import Record, read_run
from relora_ds.reports.speed import behind_checkpoints, duration, lost_time, phases, slowest_rank, spent
from tests.unit.reports.run_folders import begun, falling, relora_records, restart, update, words, write_run, write_starts


def times(update: int, seconds: Sequence[float], hosts: Sequence[str] = ("n1", "n1", "n2", "n2")) -> Record:
    return {"update": update, "hosts": list(hosts[: len(seconds)]), "forward_s": list(seconds)}


def test_the_slowest_rank_and_its_node(run_dir: Path) -> None:
    records = [times(20, [1.0, 1.0, 1.0, 1.1]), times(40, [2.0, 2.0, 2.0, 3.0]), times(60, [1.0, 1.0, 1.2, 1.6])]
    (run_dir / "ranks.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = words(run_dir)
    # 10 %, 50 % and 60 % above the median of its own record
    assert (
        "## Ranks of relora\n\nRank 3 on n2 **lags**: its batches and forward passes take 40% longer than the median rank's."
        in text
    )


def test_no_rank_lags() -> None:
    assert (
        slowest_rank([times(20, [1.0, 1.09])]) == "No rank lags: the slowest, rank 1 on n1, takes 9% longer than the other rank."
    )
    assert "**lags**" in slowest_rank([times(20, [1.0, 1.11])]), "of two ranks, the faster one is the measure"
    assert slowest_rank([times(20, [1.0, 1.0, 1.09])]).endswith("takes 9% longer than the median rank.")


def test_a_rank_on_another_node_is_another_one() -> None:
    """After a resume rank 0 is on a slow node: it is named with that node, and the earlier rank 0 does not count for it."""
    records = [times(20, [1.0, 1.0, 1.0]), times(40, [1.5, 1.0, 1.0], ["n9", "n1", "n2"])]
    assert slowest_rank(records).startswith("Rank 0 on n9 **lags**: its batches and forward passes take 50%")


def test_one_rank_has_nothing_to_lag_behind(run_dir: Path) -> None:
    assert slowest_rank([]) == slowest_rank([times(20, [1.0])]) == ""
    assert "## Ranks" not in words(run_dir)


def test_phases_apart(tmp_path: Path) -> None:
    records = relora_records()
    for record in records:
        record |= {"tokens_per_s": 50.0, "sent_bytes": 400} if record["phase"] == "lora" else {"sent_bytes": 1000}
    full, lora = phases(read_run(write_run(tmp_path / "run", records)))
    assert (full.title, full.first, full.last, full.tokens_per_s, full.sent_bytes) == ("full-rank", 1, 60, 100, 1000)
    assert (lora.title, lora.first, lora.last, lora.tokens_per_s, lora.sent_bytes) == ("LoRA", 61, 200, 50, 400)
    assert (full.seconds, lora.seconds) == (pytest.approx(6.0), pytest.approx(28.0)), "10 tokens an update"


def test_time_lost_to_restarts(run_dir: Path) -> None:
    text = lost_time(read_run(run_dir))
    assert text.startswith("The updates took 20.0 s together. Of these, the restarts took 1.00 s (5.00%), 0.50 s each.")
    assert "does not record how long starts, evaluations and checkpoints took" in text
    assert "behind one" not in text, "nothing says when checkpoints were written"


def test_time_behind_checkpoints(tmp_path: Path) -> None:
    """Checkpoints after 4 and 8 of 10 updates that take 0.1 s, but for update 5 with 0.3 s; after 8 there is a restart, too."""
    records = falling(10)
    records[4] = update(5, 3.0, tokens_per_s=100 / 3)
    run = read_run(write_run(tmp_path / "run", records, [restart(1, 8)], settings="train: {checkpoint_every: 4}\n"))
    assert behind_checkpoints(run) == [pytest.approx(0.2)]
    assert "the 1 updates right behind one took 0.20 s longer together" in lost_time(run)
    run.folder.config.write_text("train: {checkpoint_every: 4}\ncheckpoint: {async: false}\n")
    assert "while training goes on" not in lost_time(read_run(run.folder.path)), "it waited until the files were written"


def test_durations() -> None:
    assert [duration(seconds) for seconds in (3.21, 59.94, 266, 7200 + 5 * 60 + 4)] == [
        "3.2 s",
        "59.9 s",
        "4 min 26 s",
        "2 h 5 min",
    ]


def test_where_the_time_of_all_starts_went(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", relora_records(), [restart(1, 100)])
    assert spent(read_run(folder)) == [] and "does not record how long" in lost_time(read_run(folder))
    write_starts(folder, begun(), begun(seconds={"start_up": 20, "updates": 80}), begun(seconds=None))
    run = read_run(folder)
    assert spent(run) == [
        ["start-up: imports, ranks, model, checkpoint", "30.0 s", "15.0%"],
        ["updates, restarts included", "2 min 40 s", "80.0%"],
        ["the change from full rank to LoRA", "5.0 s", "2.5%"],
        ["evaluations", "3.0 s", "1.5%"],
        ["waiting for checkpoints", "2.0 s", "1.0%"],
        ["together", "3 min 20 s", "100.0%"],
    ]
    assert "does not record" not in lost_time(run)
    text = words(folder)
    assert (
        "Where the time of rank 0 went over 3 starts" in text
        and "The run was started by `relora-ds train a.yaml` on 2 rank(s)." in text
    )
