"""Where arms ended and how they came there: dots by row, means over the updates that all runs share."""

from __future__ import annotations

import math

from relora_ds.sweeps.pictures import at_the_end, on_the_way


def test_where_the_arms_ended() -> None:
    picture = at_the_end({"full": [20.0], "not_begun": [], "relora": [24.0, 26.0]})
    dots, means = picture.series
    assert picture.rows == ("full: 20.00", "relora: 25.00")
    assert (dots.x, dots.y, dots.style) == ([20.0, 24.0, 26.0], [0, 1, 1], "points")
    assert (means.x, means.y, means.style) == ([20.0, 25.0], [0, 1], "means")
    assert not picture.is_log and dots.label and means.label


def test_runs_of_one_seed_have_no_means() -> None:
    picture = at_the_end({"full": [20.0], "astray": [200.0]})
    assert [series.style for series in picture.series] == ["points"] and picture.series[0].label == ""
    assert picture.is_log


def test_how_the_arms_came_there() -> None:
    picture = on_the_way({"full": [{5: 30.0, 10: 20.0}], "relora": [{5: 40.0, 10: 24.0}, {5: 42.0}]})
    full, *runs, mean = picture.series
    assert (full.label, full.x, full.y, full.colour) == ("full", [5, 10], [30.0, 20.0], 0)
    assert [(run.label, run.x, run.style, run.colour) for run in runs] == [("", [5, 10], "thin", 1), ("", [5], "thin", 1)]
    assert (mean.label, mean.x, mean.y, mean.colour) == ("relora", [5], [41.0], 1)
    assert "Thick" in picture.caption


def test_a_run_that_ended_at_no_number_is_told_and_is_no_dot() -> None:
    picture = at_the_end({"a": [math.nan, 20.0], "b": [math.nan], "c": [30.0, 31.0]})
    assert picture.rows == ("a: 20.00 (1 of 2)", "c: 30.50")
    assert list(picture.series[0].x) == [20.0, 30.0, 31.0]
