"""What the pictures of a sweep show: where its arms ended, and how they came there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from relora_ds.reports.figures import Picture, Series
from relora_ds.reports.run_records import known, mean

Evaluations = Mapping[int, float]
"""Perplexity by update."""
LOG_RATIO = 3
"""Perplexities further apart than this have a log axis: an arm that went astray must not press the others together."""


def at_the_end(ended: Mapping[str, Sequence[float]]) -> Picture:
    """The last perplexity of each run that is done, a row for each arm.

    Args:
        ended: the perplexities of an arm's runs; an arm without any that is a number has no row.
    """
    ran = {arm: len(values) for arm, values in ended.items()}
    ended = {arm: numbers for arm, values in ended.items() if (numbers := known(values))}
    names = [
        f"{arm}: {mean(values):,.2f}" + ("" if len(values) == ran[arm] else f" ({len(values)} of {ran[arm]})")
        for arm, values in ended.items()
    ]
    dots = [(value, row) for row, values in enumerate(ended.values()) for value in values]
    has_means = any(len(values) > 1 for values in ended.values())
    series = [Series("a run" if has_means else "", *_unzipped(dots), 0, "points")]
    if has_means:
        means = [(mean(values), row) for row, values in enumerate(ended.values())]
        series.append(Series("mean of an arm's runs", *_unzipped(means), 1, "means"))
    caption = "Each dot is a run that is done, at the perplexity of its last evaluation. Further left is better."
    return Picture(
        "arms", "Where the arms ended", "validation perplexity", caption, tuple(series), rows=tuple(names),
        is_log=_falls_far([value for value, _ in dots]),
    )  # fmt: skip


def on_the_way(evaluated: Mapping[str, Sequence[Evaluations]]) -> Picture:
    """Perplexity by update: an arm's mean over its runs, at the updates that all of them were evaluated at, and each run.

    Args:
        evaluated: the evaluations of an arm's runs.
    """
    series: list[Series] = []
    for colour, (arm, runs) in enumerate(evaluated.items()):
        if len(runs) > 1:
            series += [Series("", list(run), list(run.values()), colour, "thin") for run in runs]
        shared = [update for update in runs[0] if all(update in run for run in runs)]
        series.append(Series(arm, shared, [mean(run[update] for run in runs) for update in shared], colour, "dots"))
    caption = "Lower is better. The lines between the points only lead the eye."
    if any(len(runs) > 1 for runs in evaluated.values()):
        caption = f"Thick: the mean of an arm's runs. Thin: each run. {caption}"
    is_log = _falls_far([value for curve in series for value in curve.y])
    return Picture("arms_by_update", "How the arms came there", "validation perplexity", caption, tuple(series), is_log=is_log)


def _unzipped(dots: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in dots], [y for _, y in dots]


def _falls_far(values: Sequence[float]) -> bool:
    return bool(values) and max(values) > LOG_RATIO * min(values)
