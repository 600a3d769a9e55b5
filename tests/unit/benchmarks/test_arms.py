"""What is read from a sweep's runs.csv, and the shares and tables that are made of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import arms

RUNS = """\
arm,seed,state,update,updates,perplexity
full,1,done,10,10,20.0
full,2,done,10,10,22.0
lora,1,done,10,10,30.0
lora,2,done,10,10,30.0
relora,1,done,10,10,25.0
relora,2,done,10,10,24.0
relora,3,running,5,10,99.0
wild,1,diverged,10,10,
"""


@pytest.fixture
def found(tmp_path: Path) -> arms.Perplexities:
    (tmp_path / "runs.csv").write_text(RUNS)
    found, left_out = arms.perplexities(tmp_path)
    assert left_out == ["relora/seed-3 (running)"]
    return found


def test_runs_that_did_not_end_are_left_out(found: arms.Perplexities) -> None:
    assert found["relora"] == {1: 25.0, 2: 24.0}
    assert math.isnan(found["wild"][1])


def test_the_share_of_a_gap_is_taken_seed_by_seed(found: arms.Perplexities) -> None:
    assert arms.closed(found, "relora", "lora", "full") == [0.5, 0.75]
    assert arms.gap(found, "lora", "full", ["relora", "full"])[1:] == [
        ["relora", "24.50 ± 0.71", "62% ± 18%", "2"],
        ["full", "21.00 ± 1.41", "100% ± 0%", "2"],
    ]


def test_a_seed_that_diverged_is_told_beside_the_mean_of_the_others() -> None:
    assert arms.told([24.0, math.nan, 26.0]) == "25.00 ± 1.41 (2 of 3)"
    assert [arms.told([math.nan]), arms.told([])] == ["diverged", "–"]


def test_the_least_of_a_methods_rates_is_bold() -> None:
    found = {"relora_r2_1e-3": {1: 9.0}, "relora_r2_4e-3": {1: 8.0}, "full_2e-3": {1: 7.0}, "full_4e-3": {1: math.nan}}
    assert arms.rates(found) == [
        ["method", "1e-3", "2e-3", "4e-3"],
        ["relora_r2", "9.00", "–", "**8.00**"],
        ["full", "–", "**7.00**", "diverged"],
    ]


def test_a_grid_of_ranks_lengths_and_restarts() -> None:
    found = {"r16_750_0": {1: 3.0}, "r2_750_0": {1: 5.0}, "r2_750_11": {1: 4.0}, "r2_750_3": {1: 6.0, 2: 6.0}}
    assert arms.grid(found) == [
        ["rank", "updates", "0 restarts", "3 restarts", "11 restarts"],
        ["2", "750", "5.00", "6.00 ± 0.00", "4.00"],
        ["16", "750", "3.00", "–", "–"],
    ]


def test_a_method_that_diverged_at_all_rates_has_no_least() -> None:
    assert arms.rates({"full_1": {1: math.nan}})[1:] == [["full", "diverged"]]


@pytest.mark.parametrize(
    ("table", "runs", "told"),
    [
        ("rates", RUNS, "rates: arm 'full' of {} is not called METHOD_RATE; take another table\n"),
        ("grid", RUNS, "grid: arm 'full' of {} is not called rRANK_UPDATES_RESTARTS; take another table\n"),
        ("gap", "arm,seed\nfull,1\n", "{}: no runs.csv of a sweep ('state'); relora-ds sweep SWEEP.yaml --table writes one\n"),
    ],
)
def test_what_is_no_such_sweep_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], table: str, runs: str, told: str
) -> None:
    (tmp_path / "runs.csv").write_text(runs)
    monkeypatch.setattr("sys.argv", ["arms", table, str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        arms.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == told.format(tmp_path).rstrip()
