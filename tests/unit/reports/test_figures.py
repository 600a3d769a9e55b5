"""What pictures show: the means, gaps, limits and marks, on values worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from relora_ds.reports import figures
from relora_ds.reports.figures import MOST_MARKED, Picture, Series, centred_mean, loss, thinned
from relora_ds.reports.run_records import Run, read_run
from tests.unit.reports.run_folders import falling, relora_records, restart, update, write_run


@pytest.fixture
def run(run_dir: Path) -> Run:
    return read_run(run_dir)


def by_label(picture: Picture) -> dict[str, Series]:
    return {series.label: series for series in picture.series}


def test_a_centred_mean_does_not_lie_beside_a_falling_curve() -> None:
    values = [10.0 - number for number in range(10)]
    assert centred_mean(values, window=5) == pytest.approx(values)
    assert centred_mean([1.0, 3.0, 8.0, 2.0], window=3) == [1.0, 4.0, 13 / 3, 2.0]
    assert centred_mean([], window=3) == []


def test_beside_a_break_a_mean_does_not_end_in_the_noise_of_one_value() -> None:
    values = [3.0 + (-1) ** number for number in range(60)]
    smooth = centred_mean(values, breaks=[30])
    assert max(abs(value - 3.0) for value in smooth) < 0.3


def test_a_centred_mean_leaves_nan_out() -> None:
    means = centred_mean([math.nan, 2.0, math.nan, 6.0, 1.0], window=3)
    assert math.isnan(means[0])
    assert means[1:] == [2.0, 4.0, 3.5, 1.0]


def test_no_mean_reaches_across_a_break() -> None:
    assert centred_mean([1.0] * 6 + [5.0] * 6, breaks=[6], window=5) == [1.0] * 6 + [5.0] * 6


def test_a_thinned_curve_keeps_its_spikes() -> None:
    values = [0.0] * 10_000
    values[1234], values[7777] = 9.0, -9.0
    x, y = thinned([float(at) for at in range(10_000)], values)
    assert len(x) == len(y) <= figures.MOST_POINTS
    assert (max(y), min(y)) == (9.0, -9.0) and x == sorted(x)
    assert (x[y.index(9.0)], x[y.index(-9.0)]) == (1234, 7777)
    assert thinned([1.0, 2.0], [3.0, 4.0]) == ([1.0, 2.0], [3.0, 4.0])
    _, gap = thinned([float(at) for at in range(10_000)], [math.nan] * 5000 + [1.0] * 5000)
    assert math.isnan(gap[0]) and gap[-1] == 1.0


def test_losses_are_told_apart(run: Run) -> None:
    picture = figures.loss([run])
    curves = by_label(picture)
    assert list(curves) == ["training loss of each update", "training loss, mean of 21 updates", "validation loss"]
    assert list(curves["validation loss"].x) == list(range(20, 201, 20)) and set(curves["validation loss"].y) == {3.0}
    # Nothing but the skipped update is missing, and the smoothed curve lies on the falling line, at restarts, too.
    smooth = curves["training loss, mean of 21 updates"].y
    assert [smooth[at - 1] for at in (1, 100, 101, 150, 200)] == pytest.approx([3.99, 3.0, 2.99, 2.5, 2.0])
    assert [(mark.kind, mark.x, mark.colour) for mark in picture.marks] == [
        ("restart", 100, None), ("restart", 150, None), ("phase change", 61, None),
    ]  # fmt: skip
    # Of 200 updates the first ten need not be seen: 4 - 0.11, the eleventh's, less a margin of a twentieth.
    assert picture.limits == pytest.approx((2.0 - 0.0945, 3.89 + 0.0945))
    assert picture.limits is not None and "from 3.99, begins above the picture" in picture.caption


def test_nothing_is_said_of_a_fall_that_is_seen(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "level", [update(number, 3.0) for number in range(1, 50)]))
    assert "above the picture" not in figures.loss([run]).caption


def test_curves_around_restarts(run: Run) -> None:
    first, second = figures.loss_curves_around(run).values()
    # The mean of the ten before update 100 is 4 - 0.955; the restart at 150 bounds the first curve on the right, 100 the second.
    assert (min(first), max(first), min(second), max(second)) == (-49, 50, -49, 50)
    assert [first[offset] for offset in (0, 1, 50)] == pytest.approx([3.0 - 3.045, 2.99 - 3.045, 2.5 - 3.045])
    close = figures.loss_curves_around(replace(run, restarts=[restart(1, 100), restart(2, 110)]))
    assert (max(close[100]), min(close[110])) == (10, -9)
    labels = [series.label for series in figures.around_restarts([run]).series if series.label]
    assert labels == ["restart after update 100", "restart after update 150"]


def test_what_each_update_was_is_drawn_beside_the_mean(run: Run) -> None:
    """Of one run; the axis of a speed begins at 0."""
    picture = figures.speed([run])
    assert [(series.label, series.style) for series in picture.series] == [
        ("tokens/s of each update", "thin"), ("tokens/s, mean of 21 updates", "line"),
    ]  # fmt: skip
    assert picture.limits == pytest.approx((0, 105))
    assert figures.learning_rate([run]).limits == pytest.approx((0, 1.05 * 2e-3))


def test_a_curve_without_a_point_is_left_out(run: Run, tmp_path: Path) -> None:
    other = read_run(write_run(tmp_path / "full", falling(80), method="full"))
    shown = {picture.name: [series.label for series in picture.series] for picture in figures.pictures([run, other])}
    assert shown["perplexity"] == ["relora"] and "full: validation loss" not in shown["loss"]


def test_many_restarts_are_drawn_as_their_mean(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "many", falling(200), [restart(n, 20 * n) for n in range(1, 9)]))
    (curve,) = figures.around_restarts([run]).series
    assert curve.label == "mean of 8 restarts"
    assert dict(zip(curve.x, curve.y, strict=True))[1] == pytest.approx(-5.5), "from the mean of ten before to the next"


def test_merged_change_and_error_in_percent(run: Run) -> None:
    (curve,) = figures.merged_change([run]).series
    assert (list(curve.x), list(curve.y)) == ([100, 150], pytest.approx([70.0, 35.0]))
    (curve,) = figures.merge_error([run]).series
    assert curve.y == pytest.approx([1e-4, 1e-4])


def test_a_merge_error_of_nothing_has_no_picture(tmp_path: Path) -> None:
    exact = read_run(write_run(tmp_path / "fp32", relora_records(), [restart(1, 100, merge_error=0.0)]))
    assert figures.merge_error([exact]).series == ()
    assert "merge_error" not in [picture.name for picture in figures.pictures([exact])]


def test_a_picture_of_nothing_is_left_out(tmp_path: Path) -> None:
    bare = read_run(write_run(tmp_path / "bare", falling(3)))
    assert [picture.name for picture in figures.pictures([bare])] == ["loss", "learning_rate", "speed"]


def test_learning_rates(run: Run) -> None:
    factors, others = figures.learning_rate([run]).series
    assert factors.label == "of the factors" and math.isnan(factors.y[59]) and factors.y[60] == 2e-3
    assert set(others.y) == {1e-3} and others.style == "dashed" and others.colour != factors.colour


def test_perplexities_that_are_far_apart_are_on_a_log_axis(tmp_path: Path, run: Run) -> None:
    assert not figures.perplexity([run]).is_log
    evals = [{"update": n, "eval_loss": 1.0, "eval_perplexity": value, "phase": "full"} for n, value in enumerate([5e4, 40.0], 1)]
    assert figures.perplexity([read_run(write_run(tmp_path / "wide", falling(3) + evals))]).is_log


def test_runs_have_a_colour_each(run: Run, tmp_path: Path) -> None:
    other = read_run(write_run(tmp_path / "full", falling(80), method="full"))
    picture = figures.loss([run, other])
    assert {series.label: series.colour for series in picture.series if series.label} == {
        "relora: training loss": 0, "relora: validation loss": 0, "full: training loss": 1, "full: validation loss": 1,
    }  # fmt: skip
    assert {mark.colour for mark in picture.marks} == {0}
    assert [series.label for series in figures.speed([run, other]).series] == ["relora", "full"]


def test_of_very_many_runs_only_shared_marks_are_drawn(run: Run) -> None:
    assert loss([run] * MOST_MARKED).marks[0].colour == 0
    marks = loss([run] * (MOST_MARKED + 1)).marks
    assert [(mark.kind, mark.x, mark.colour) for mark in marks] == [
        *(("restart", at, None) for at in run.restart_updates), *(("phase change", at, None) for at in run.phase_changes),
    ]  # fmt: skip
    assert (
        run.restart_updates and loss([run] * MOST_MARKED + [replace(run, restarts=[])]).marks == marks[-len(run.phase_changes) :]
    )
