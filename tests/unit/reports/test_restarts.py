"""The loss around restarts, on values worked out by hand, and what is said of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from relora_ds.reports.restarts import (
    evaluations_around,
    loss_around_restarts,
    merge_remark,
    noise_of_means,
    restart_table,
    right_at_restarts,
    verdict,
)
from relora_ds.reports.run_records import Record, read_run
from tests.unit.reports.run_folders import falling, relora_records, restart, update, write_run


def test_loss_around_restarts_far_apart() -> None:
    # Before: updates 151..200, mean 1000 - 175.5. After: the 50 that end 100 updates on, 251..300.
    assert loss_around_restarts(falling(600), [200]) == [(824.5, 724.5, 50)]


def test_loss_after_ends_at_the_next_restart_and_at_the_last_update() -> None:
    first, second = loss_around_restarts(falling(340), [200, 270])
    assert first == (824.5, 1000 - 245.5, 50)  # 221..270
    assert second == (1000 - 245.5, 1000 - 315.5, 50)  # 291..340


def test_loss_after_holds_no_update_from_before_the_restart() -> None:
    assert loss_around_restarts(falling(210), [200]) == [(824.5, 1000 - 205.5, 10)]  # 201..210


def test_restart_at_the_last_update_has_no_loss_after() -> None:
    for ((before, after, count),) in (loss_around_restarts(falling(200), [200]), right_at_restarts(falling(200), [200], 50)):
        assert before == 824.5
        assert math.isnan(after) and count == 0


def test_skipped_updates_do_not_count() -> None:
    updates = falling(300)
    updates[199] = update(200, None, skipped=True)  # before: 151..199
    updates[299] = update(300, math.nan, skipped=True)  # after: 251..299
    assert loss_around_restarts(updates, [200]) == [(825.0, 725.0, 49)]


def test_right_at_a_restart() -> None:
    assert right_at_restarts(falling(600), [200], 10) == [(1000 - 195.5, 1000 - 205.5, 10)]  # 191..200, 201..210
    assert right_at_restarts(falling(600), [200], 50) == [(1000 - 175.5, 1000 - 225.5, 50)]


def test_no_mean_reaches_across_another_restart() -> None:
    first, second = right_at_restarts(falling(600), [200, 204], 10)
    assert first == (1000 - 195.5, 1000 - 202.5, 4)  # 201..204
    assert second == (1000 - 202.5, 1000 - 209.5, 10)  # 201..204, 205..214


def test_a_spike_right_behind_a_restart_is_told() -> None:
    """Twenty updates that a window further on would leave out."""
    updates = falling(400)
    for record in updates[200:220]:
        record["loss"] += 500
    (row,) = restart_table(updates, [restart(1, 200)])
    assert row.near.change == 490 and row.wide.change == pytest.approx(150) and row.later.change == -100
    text = verdict([row])
    assert "Right at the restart, mean of the 10 updates before and after it: the loss **rose** at restart 1 (1 of 1)" in text
    assert "most at restart 1: +490.0000." in text and "The rise at restart 1 is more than twice that." in text
    assert "Mean of the 50 updates before and after it: the loss **rose** at restart 1 (1 of 1)" in text


def test_noise_of_two_means() -> None:
    """Losses that go up and down by 1: successive ones differ by +2, -2, +2, …, which is 2/√10 in the difference of two means."""
    updates = [update(number, 3.0 + (-1) ** number) for number in range(1, 201)]
    assert noise_of_means(updates, 200) == pytest.approx(2 / math.sqrt(10), rel=0.02)
    assert noise_of_means(falling(200), 200) == 0, "a steady fall is no noise"
    assert math.isnan(noise_of_means(falling(2), 2))


def test_a_rise_by_chance_is_called_so() -> None:
    """Losses that go up and down by 1, and by 0.1 higher after the restart."""
    updates = [update(number, 3.0 + (-1) ** number + 0.1 * (number > 200)) for number in range(1, 401)]
    text = verdict(restart_table(updates, [restart(1, 200)]))
    assert "rose** at restart 1" in text and text.count("No rise is more than twice that.") == 1


def test_restart_table() -> None:
    (row,) = restart_table(falling(300), [restart(1, 200)])
    assert (row.update, row.restart, row.later.before, row.later.after, row.later.change) == (200, 1, 824.5, 724.5, -100.0)
    assert (row.near.change, row.wide.change) == (-10.0, -50.0)
    assert (row.pruned_fraction, row.merged_change, row.merge_error, row.seconds, row.bytes) == (0.99, 0.7, 1e-6, 0.5, 2048)
    assert restart_table(falling(10), []) == []


def test_verdict_when_the_loss_fell_everywhere() -> None:
    assert verdict(restart_table(falling(400), [restart(1, 200), restart(2, 300)])) == (
        "Right at the restart, mean of the 10 updates before and after it: the loss rose at no restart (0 of 2). "
        "By chance alone, two such means differ by about 0.0000. "
        "Mean of the 50 updates before and after it: the loss rose at no restart (0 of 2)."
    )


def test_verdict_names_the_restarts_at_which_it_rose() -> None:
    updates = falling(300) + [update(number, 5000.0) for number in range(301, 401)]
    text = verdict(restart_table(updates, [restart(1, 200), restart(2, 300)]))
    assert text.count("the loss **rose** at restart 2 (1 of 2), most at restart 2") == 2
    many = verdict(restart_table([update(n, n / 10) for n in range(1, 401)], [restart(n, 20 * n) for n in range(1, 12)]))
    assert "rose** at restart 1, 2, 3, 4, 5, 6, 7, 8 and 3 more (11 of 11)" in many


def test_verdict_says_where_it_cannot_tell() -> None:
    text = verdict(restart_table(falling(210), [restart(1, 100), restart(2, 200), restart(3, 210)]))
    assert "no restart (0 of 2 that can be judged)" in text
    assert "Nothing can be said about restart 3" in text
    assert "loss after restart 2 is a mean of fewer than 50" in text
    assert verdict([]) == "The run made no restart."


def run_with(tmp_path: Path, dtype: str, error: float, master: str = "none") -> str:
    settings = f"method: relora\nrelora: {{frozen: {{dtype: {dtype}, master: {master}}}}}\n"
    return merge_remark(
        read_run(write_run(tmp_path / "run", falling(100), [restart(1, 50, merge_error=error)], settings=settings))
    )


def test_why_the_merge_error_is_what_it_is(tmp_path: Path) -> None:
    assert run_with(tmp_path, "fp32", 0.0).startswith("The merge error is 0 because the frozen weights are stored in fp32")
    assert run_with(tmp_path, "bf16", 0.0) == "The merge error is 0: every merged sum could be stored as it was."
    assert run_with(tmp_path, "bf16", 0.25) == (
        "The merge error is what rounding to bf16 lost of the merged change, at most 25.0% of it."
    )
    assert run_with(tmp_path, "int8", 0.25, "sharded").endswith(
        "An fp32 master keeps what was rounded away, and it arrives with a later merge."
    )
    assert "auto" not in run_with(tmp_path, "auto", 0.25), "no checkpoint says what auto was"


def test_the_base_says_in_what_the_weights_are_stored(tmp_path: Path) -> None:
    run_with(tmp_path, "auto", 0.0)
    folder = tmp_path / "run" / "base" / "restart_0001"
    folder.mkdir(parents=True)
    layers = {"q_proj": {"shape": [4, 4], "dtype": "fp32", "group_size": 128}}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": {}, "layers": layers}))
    assert "stored in fp32" in merge_remark(read_run(tmp_path / "run"))


def test_evaluations_before_and_after_a_restart(tmp_path: Path) -> None:
    """An evaluation behind the restart's own update comes after the restart."""
    records: list[Record] = relora_records()
    run = read_run(write_run(tmp_path / "run", records, [restart(1, 110), restart(2, 160), restart(3, 199)]))
    assert evaluations_around(run) == [
        ["1", "110", "10", "3.0000", "300.00", "10", "3.0000", "280.00"],
        ["2", "160", "20", "3.0000", "260.00", "0", "3.0000", "240.00"],
        ["3", "199", "19", "3.0000", "220.00", "1", "3.0000", "200.00"],
    ]
    run = read_run(write_run(tmp_path / "early", records[:30], [restart(1, 10)]))
    assert evaluations_around(run) == [["1", "10", "–", "–", "–", "10", "3.0000", "380.00"]]
