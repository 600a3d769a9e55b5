"""The report: its means on values worked out by hand, the files it writes and the folders it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib.image
import pytest

from relora_ds.errors import ConfigError
from relora_ds.reports.report import (
    Record,
    loss_around_restarts,
    read_run,
    report,
    restart_table,
    running_mean,
    slowest_rank,
    unique_labels,
    verdict,
    without_redone,
)
from relora_ds.run.folder import read_jsonl

WARM_START = 60


def update(number: int, loss: float | None, **more: object) -> Record:
    return {"update": number, "phase": "full", "loss": loss, "lr": 1e-3, "tokens": 10 * number, "tokens_per_s": 100.0} | more


def restart(number: int, at: int) -> Record:
    return {"update": at, "restart": number, "pruned_fraction": 0.99, "merge_error": 1e-6, "seconds": 0.5, "bytes": 2048}


def falling(last: int) -> list[Record]:
    """Updates whose loss is ``1000 - update``: the mean over a window is the loss in its middle."""
    return [update(number, 1000.0 - number) for number in range(1, last + 1)]


def write_run(folder: Path, records: list[Record], restarts: Sequence[Record] = (), method: str = "relora") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(f"method: {method}\nrun: {{}}\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "restarts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in restarts))
    return folder


def relora_records() -> list[Record]:
    """200 updates, LoRA from update 61 on, an evaluation every 20 updates and one skipped update."""
    records = []
    for number in range(1, 201):
        phase: Record = {"phase": "lora", "lora_lr": 2e-3} if number > WARM_START else {"phase": "full"}
        records.append(update(number, None if number == 30 else 4 - number / 100, **phase))
        if number == 30:
            records[-1]["skipped"] = True
        if number % 20 == 0:
            records.append({"update": number, "eval_loss": 3.0, "eval_perplexity": 400.0 - number, "phase": phase["phase"]})
    return records


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "relora", relora_records(), [restart(1, 100), restart(2, 150)])


def cells(text: str, first: str) -> list[str]:
    """The cells of the table row that starts with ``first``."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in row.strip("|").split(" | ")]


def assert_pictures(folder: Path) -> None:
    for name in ("loss", "learning_rate", "perplexity"):
        path = folder / "plots" / f"{name}.png"
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[0] > 300 and pixels.shape[1] > 800
        assert pixels.std() > 0, f"{name} is blank"


def test_running_mean() -> None:
    assert running_mean([1.0, 3.0, 5.0, 10.0], window=2) == [1.0, 2.0, 4.0, 7.5]
    assert running_mean([], window=2) == []


def test_running_mean_leaves_nan_out() -> None:
    means = running_mean([math.nan, 2.0, math.nan, 6.0], window=3)
    assert math.isnan(means[0])
    assert means[1:] == [2.0, 2.0, 4.0]


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
    ((before, after, count),) = loss_around_restarts(falling(200), [200])
    assert before == 824.5
    assert math.isnan(after) and count == 0


def test_skipped_updates_do_not_count() -> None:
    updates = falling(300)
    updates[199] = update(200, None, skipped=True)  # before: 151..199
    updates[299] = update(300, math.nan, skipped=True)  # after: 251..299
    assert loss_around_restarts(updates, [200]) == [(825.0, 725.0, 49)]


def test_restart_table() -> None:
    (row,) = restart_table(falling(300), [restart(1, 200)])
    assert (row.update, row.restart, row.loss_before, row.loss_after, row.change) == (200, 1, 824.5, 724.5, -100.0)
    assert (row.pruned_fraction, row.merge_error, row.seconds, row.bytes) == (0.99, 1e-6, 0.5, 2048)
    assert restart_table(falling(10), []) == []


def test_verdict_when_the_loss_fell_everywhere() -> None:
    assert verdict(restart_table(falling(400), [restart(1, 200), restart(2, 300)])) == (
        "The loss went on falling after every restart (2 of 2)."
    )


def test_verdict_names_the_restarts_after_which_it_did_not_fall() -> None:
    updates = falling(300) + [update(number, 5000.0) for number in range(301, 401)]
    assert "did **not** go on falling after restart 2 (1 of 2)" in verdict(
        restart_table(updates, [restart(1, 200), restart(2, 300)])
    )
    level = [update(number, 3.0) for number in range(1, 201)]
    assert "did **not** go on falling" in verdict(restart_table(level, [restart(1, 100)]))


def test_verdict_says_where_it_cannot_tell() -> None:
    text = verdict(restart_table(falling(210), [restart(1, 100), restart(2, 200), restart(3, 210)]))
    assert "every restart that can be judged (2 of 3)" in text
    assert "Nothing can be said about restart 3" in text
    assert "loss after restart 2 is a mean of fewer than 50" in text
    assert verdict([]) == "The run made no restart."


def test_report_on_one_run(run_dir: Path) -> None:
    path = report([run_dir])
    assert path == run_dir / "report.md"
    text = path.read_text(encoding="utf-8")
    # Final loss: 4 - 1.755, the mean over updates 151..200. Speed, perplexities and tokens as written above.
    row = ["relora", "relora", "200", "2,000", "2", "2.2450", "200.00", "200.00", "340.00", "100", "1"]
    assert cells(text, "relora") == row
    # Restart 1 at 100: updates 51..100, then 101..150. Restart 2 at 150: 101..150, then 151..200.
    assert cells(text, "100")[:5] == ["100", "1", "3.2450", "2.7450", "-0.5000"]
    assert cells(text, "150") == ["150", "2", "2.7450", "2.2450", "-0.5000", "0.9900", "1.0e-06", "0.50", "2,048"]
    assert "The loss went on falling after every restart (2 of 2)." in text
    for name in ("loss", "learning_rate", "perplexity"):
        assert f"(plots/{name}.png)" in text
    assert_pictures(run_dir)


def test_report_on_two_overlaid_runs(run_dir: Path, tmp_path: Path) -> None:
    full = write_run(tmp_path / "full", falling(80), method="full")
    path = report([run_dir, full], tmp_path / "both")
    text = path.read_text(encoding="utf-8")
    assert path == tmp_path / "both" / "report.md"
    assert cells(text, "full") == ["full", "full", "80", "800", "0", "944.5000", "–", "–", "–", "100", "0"]
    assert "## Restarts of relora" in text and "The run made no restart." in text
    assert_pictures(tmp_path / "both")
    assert not (run_dir / "report.md").exists()


def test_several_runs_go_to_a_report_folder_by_default(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = write_run(tmp_path / "other", falling(3))
    monkeypatch.chdir(tmp_path)
    assert report([run_dir, other]) == Path("report/report.md")
    assert (tmp_path / "report/report.md").is_file()


def test_same_folder_twice_is_one_run(run_dir: Path) -> None:
    assert report([run_dir, run_dir]) == run_dir / "report.md"


def test_labels_are_unique(tmp_path: Path) -> None:
    assert unique_labels([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    assert unique_labels([tmp_path / "a" / "x", tmp_path / "b" / "y"]) == ["x", "y"]


def test_run_name_with_special_characters(tmp_path: Path) -> None:
    text = report([write_run(tmp_path / "a|b $x$", falling(3))]).read_text(encoding="utf-8")
    assert "| a\\|b $x$ | relora | 3 |" in text


def test_large_range_of_perplexities_and_an_infinite_one(tmp_path: Path) -> None:
    values = [math.inf, 50000.0, 40.0]
    evals = [{"update": n, "eval_loss": 1.0, "eval_perplexity": value, "phase": "full"} for n, value in enumerate(values, 1)]
    folder = write_run(tmp_path / "wide", falling(3) + evals)
    text = report([folder]).read_text(encoding="utf-8")
    assert cells(text, "wide")[6:8] == ["40.00", "40.00"]
    assert_pictures(folder)


def test_cut_off_last_line_is_tolerated(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"update": 201, "phase": "lo')
    assert read_run(run_dir).updates[-1]["update"] == 200
    assert report([run_dir]).is_file()


@pytest.mark.parametrize("broken", ['{"update": 2, "lo', "[1]", '{"loss": 1.0}', ""])
def test_broken_line_in_the_middle_is_refused(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"update": 1, "loss": 2.0}}\n{broken}\n{{"update": 3, "loss": 2.0}}\n')
    with pytest.raises(ConfigError, match=r"line 2 of metrics\.jsonl") as caught:
        read_jsonl(path)
    assert caught.value.key == "RUN_DIR" and str(tmp_path) in str(caught.value)


def test_resumed_run_counts_its_later_records(tmp_path: Path) -> None:
    """A run killed at update 120 that goes on from update 100 and has reached 110."""
    again = [update(number, 7.0) for number in range(101, 111)]
    run = read_run(write_run(tmp_path / "run", falling(120) + again, [restart(1, 50), restart(2, 115)]))
    assert [record["update"] for record in run.updates] == list(range(1, 111))
    assert run.updates[-1]["loss"] == 7.0
    assert [record["restart"] for record in run.restarts] == [1]
    assert without_redone([{"update": 1}, {"update": 2}, {"update": 2}]) == [{"update": 1}, {"update": 2}]


def test_run_without_restarts_and_config(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "bare", falling(3))
    (folder / "config.yaml").unlink()
    (folder / "restarts.jsonl").unlink()
    assert cells(report([folder]).read_text(encoding="utf-8"), "bare")[:3] == ["bare", "–", "3"]


def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no metrics\.jsonl"):
        report([tmp_path / "missing"])
    evaluation = {"update": 0, "eval_loss": 1.0, "eval_perplexity": 2.7, "phase": "full"}
    with pytest.raises(ConfigError, match="holds no update"):
        report([write_run(tmp_path / "empty", [evaluation])])
    with pytest.raises(ConfigError, match="no run folder"):
        report([])


def times(update: int, seconds: Sequence[float], hosts: Sequence[str] = ("n1", "n1", "n2", "n2")) -> Record:
    return {"update": update, "hosts": list(hosts[: len(seconds)]), "forward_s": list(seconds)}


def test_the_slowest_rank_and_its_node(run_dir: Path) -> None:
    records = [times(20, [1.0, 1.0, 1.0, 1.1]), times(40, [2.0, 2.0, 2.0, 3.0]), times(60, [1.0, 1.0, 1.2, 1.6])]
    (run_dir / "ranks.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = report([run_dir]).read_text(encoding="utf-8")
    # 10 %, 50 % and 60 % above the median of its own record
    assert "## Ranks of relora\n\nRank 3 on n2 **lags**: its batches and forward passes take 40% longer" in text


def test_no_rank_lags() -> None:
    assert (
        slowest_rank([times(20, [1.0, 1.09])]) == "No rank lags: the slowest, rank 1 on n1, takes 9% longer than the median rank."
    )
    assert "**lags**" in slowest_rank([times(20, [1.0, 1.11])]), "of two ranks, the faster one is the measure"


def test_a_rank_on_another_node_is_another_one() -> None:
    """After a resume rank 0 is on a slow node: it is named with that node, and the earlier rank 0 does not count for it."""
    records = [times(20, [1.0, 1.0, 1.0]), times(40, [1.5, 1.0, 1.0], ["n9", "n1", "n2"])]
    assert slowest_rank(records).startswith("Rank 0 on n9 **lags**: its batches and forward passes take 50%")


def test_one_rank_has_nothing_to_lag_behind(run_dir: Path) -> None:
    assert slowest_rank([]) == slowest_rank([times(20, [1.0])]) == ""
    assert "## Ranks" not in report([run_dir]).read_text(encoding="utf-8")


def test_traffic_of_every_start(run_dir: Path) -> None:
    nodes = [
        {"host": "a", "ranks": [0], "counted_bytes": 6e6, "sent_bytes": 6_100_000, "received_bytes": 1},
        {"host": "b", "ranks": [1], "counted_bytes": 6e6, "sent_bytes": 6_000_000, "received_bytes": 1},
    ]
    wire = {"gradient": 2e6, "parameters": 2e6, "norm": 40, "restart": 1e6, "verify": 500_000, "evaluation": 32, "checkpoint": 68}
    start = {"first_update": 1, "last_update": 1100, "world_size": 2, "wire_bytes_per_update": 4321.0, "wire_bytes": wire}
    (run_dir / "traffic.json").write_text(json.dumps({"starts": [{**start, "nodes": nodes}]}))
    text = report([run_dir]).read_text()
    assert cells(text, "1 to 1,100")[1:] == ["2", "2", "4.32 kB", "2 MB", "2 MB", "1.5 MB", "100 B", "12 MB", "12.1 MB"]
    (run_dir / "traffic.json").write_text(json.dumps({"starts": [{**start, "nodes": nodes, "unseen": ["cxi0 (libfabric)"]}]}))
    assert cells(report([run_dir]).read_text(), "1 to 1,100")[-1] == "≥ 12.1 MB"


def test_a_damaged_traffic_file_is_left_out(run_dir: Path) -> None:
    (run_dir / "traffic.json").write_text('{"starts": [{"first')
    assert "## Traffic" not in report([run_dir]).read_text()
