"""What each picture of a report shows: curves, marks, units and a sentence, as numbers and words. :mod:`.drawing` draws them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from relora_ds.reports.restarts import NEAR, WINDOW, right_at_restarts
from relora_ds.reports.run_records import Run, column, known, mean

Style = Literal["line", "thin", "dashed", "dots"]
Curve = tuple[Sequence[float], Sequence[float]]

SMOOTH = 2 * NEAR + 1
"""Updates that the mean of a curve covers, as many before as after: one that looks back only would lie above a falling loss."""
LOG_RATIO = 10
"""Values that differ by more than this factor are drawn on a log axis."""
MOST_POINTS = 1200
"""Points of a curve; of more, the smallest and the largest of each stretch are drawn, so that no spike is lost."""
MOST_RESTARTS = 6
"""Restarts that are told apart by colour."""


@dataclass(frozen=True)
class Series:
    """A curve: ``y`` over ``x``, NaN for a gap. One without a label is not in the legend; ``colour`` counts from 0."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    style: Style = "line"


@dataclass(frozen=True)
class Mark:
    """A vertical line at ``x``; in the colour of a run, or grey where there is only one run."""

    kind: Literal["restart", "phase change"]
    x: float
    colour: int | None = None


@dataclass(frozen=True)
class Picture:
    """What a picture shows.

    Attributes:
        name: of its file, without the ending.
        title, unit, x_unit: what is drawn, and in what.
        caption: how to read it, for somebody who sees such a picture for the first time.
        series, marks: what is in it.
        limits: of the y axis; None for those of the data.
        is_log: whether the y axis is logarithmic.
    """

    name: str
    title: str
    unit: str
    caption: str
    series: tuple[Series, ...]
    marks: tuple[Mark, ...] = ()
    x_unit: str = "update"
    limits: tuple[float, float] | None = None
    is_log: bool = False


def centred_mean(values: Sequence[float], breaks: Sequence[int] = (), window: int = SMOOTH) -> list[float]:
    """Mean of each value and its neighbours, as many before as after; NaN values do not count.

    Args:
        values: to be smoothed.
        breaks: indices at which something new begins, as after a restart: no mean reaches across. So a jump there stays one.
        window: an odd number, how many values a mean covers. Near an end, and near a break, it covers fewer.
    """
    means: list[float] = []
    for begin, end in zip([0, *breaks], [*breaks, len(values)], strict=True):
        for at in range(begin, end):
            half = min(window // 2, at - begin, end - 1 - at)
            means.append(mean(values[at - half : at + half + 1]))
    return means


def thinned(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """At most ``most`` points of a curve: of each stretch the smallest and the largest value, in their order; or its gap."""
    if len(x) <= most:
        return list(x), list(y)
    stretch = math.ceil(len(x) / (most // 2))
    kept: list[int] = []
    for begin in range(0, len(x), stretch):
        there = [at for at in range(begin, min(begin + stretch, len(x))) if not math.isnan(y[at])]
        kept += sorted({min(there, key=y.__getitem__), max(there, key=y.__getitem__)}) if there else [begin]
    return [x[at] for at in kept], [y[at] for at in kept]


def breaks_of(run: Run) -> list[int]:
    """The indices of the updates with which something new begins: after a restart, and with a phase."""
    begins = {update + 1 for update in run.restart_updates} | set(run.phase_changes)
    return [at for at, record in enumerate(run.updates) if at and record["update"] in begins]


def pictures(runs: Sequence[Run]) -> list[Picture]:
    """All pictures of a report on these runs; one that would be empty is left out."""
    drawn = [loss(runs), around_restarts(runs), perplexity(runs), merged_change(runs), merge_error(runs)]
    drawn += [learning_rate(runs), gradient_norm(runs), speed(runs)]
    return [picture for picture in drawn if any(known(series.y) for series in picture.series)]


def loss(runs: Sequence[Run]) -> Picture:
    """Training loss, each update's and smoothed, and validation loss."""
    series: list[Series] = []
    for colour, run in enumerate(runs):
        alone = len(runs) == 1
        at, values = column(run.updates, "update"), column(run.updates, "loss")
        series.append(Series("training loss of each update" if alone else "", *thinned(at, values), colour, "thin"))
        label = f"training loss, mean of {SMOOTH} updates" if alone else f"{run.label}: training loss"
        series.append(Series(label, *thinned(at, centred_mean(values, breaks_of(run))), colour))
        label = "validation loss" if alone else f"{run.label}: validation loss"
        series.append(Series(label, column(run.evals, "update"), column(run.evals, "eval_loss"), colour + alone, "dots"))
    limits, cut = _without_the_fall(runs)
    caption = (
        "How badly the model predicts the next token: lower is better. Training loss is that of the text just trained on, "
        f"validation loss that of text it never trains on. The line is the mean of {SMOOTH} updates, {NEAR} before and {NEAR} "
        f"after each, and never reaches across a restart, so that a jump there would show. {cut}"
    )
    return Picture(
        "loss", "Training and validation loss", "nats per token", caption.strip(), tuple(series), _marks(runs), limits=limits
    )


def _without_the_fall(runs: Sequence[Run]) -> tuple[tuple[float, float], str]:
    """The y axis without the steep fall of the first updates, which would flatten the rest; and a sentence that says so."""
    early = [len(run.updates) // 20 for run in runs]
    shown = known(
        loss
        for run, begin in zip(runs, early, strict=True)
        for loss in (*column(run.updates[begin:], "loss"), *column(run.evals, "eval_loss"))
    ) or [0.0]
    margin = 0.05 * (max(shown) - min(shown)) or 0.1
    low, high = min(shown) - margin, max(shown) + margin
    hidden = max(known(loss for run in runs for loss in column(run.updates, "loss")) or [0.0])
    sentence = f"The steep fall of the first updates, from {hidden:.2f}, begins above the picture." if hidden > high else ""
    return (low, high), sentence


def around_restarts(runs: Sequence[Run]) -> Picture:
    """The training loss around every restart, less its mean right before it."""
    series: list[Series] = []
    is_single = len(runs) == 1 and len(runs[0].restarts) <= MOST_RESTARTS
    for colour, run in enumerate(runs):
        curves = loss_curves_around(run)
        if is_single:
            for number, (update, curve) in enumerate(curves.items()):
                offsets, changes = list(curve), list(curve.values())
                series.append(Series("", offsets, changes, number, "thin"))
                smooth = centred_mean(changes, [at for at, offset in enumerate(offsets) if at and offset == 1], NEAR + 1)
                series.append(Series(f"restart after update {update:,}", offsets, smooth, number))
        elif curves:
            offsets = [float(offset) for offset in range(1 - WINDOW, WINDOW + 1)]
            means = [mean(curve.get(offset, math.nan) for curve in curves.values()) for offset in offsets]
            label = f"{run.label}: mean of {len(curves)} restart(s)" if len(runs) > 1 else f"mean of {len(curves)} restarts"
            series.append(Series(label, offsets, means, colour))
    thin = f"Thin: each update; thick: mean of {NEAR + 1}." if is_single else "A mean over the restarts, update by update."
    caption = (
        f"Training loss of the {WINDOW} updates before and after a restart, less the mean of the {NEAR} right before it. The "
        f"restart is at 0. A restart that does harm would show as a step or a spike upwards right behind it. {thin}"
    )
    marks = (Mark("restart", 0.5),) if series else ()
    title = "Training loss around the restarts"
    return Picture("restarts", title, "nats per token, change", caption, tuple(series), marks, x_unit="updates from the restart")


def loss_curves_around(run: Run) -> dict[int, dict[float, float]]:
    """For the update of each restart: the loss by offset, 1 for the first update after it, less the mean of the last few before it.

    No curve reaches across another restart.
    """
    losses = dict(zip(column(run.updates, "update"), column(run.updates, "loss"), strict=True))
    curves = {}
    at = run.restart_updates
    level = [around.before for around in right_at_restarts(run.updates, at, NEAR)]
    for previous, update, following, before in zip([0, *at], at, [*at[1:], math.inf], level, strict=False):
        begin, end = max(previous, update - WINDOW) + 1, min(following, update + WINDOW)
        curves[update] = {float(here - update): losses[here] - before for here in range(begin, int(end) + 1) if here in losses}
    return curves


def perplexity(runs: Sequence[Run]) -> Picture:
    """Validation perplexity, on a log axis where it falls far."""
    series = _of_each(runs, "validation perplexity", _evaluations, "dots")
    shown = known(value for curve in series for value in curve.y) or [1.0]
    caption = (
        "exp of the validation loss: among how many tokens the model is undecided, as it were. Lower is better, and a model "
        "that knows nothing has the size of its vocabulary."
    )
    if any(run.restarts for run in runs):
        caption += (
            " Evaluations seldom come right before and after a restart: what it does at once is in the picture before this."
        )
    is_log = max(shown) > LOG_RATIO * min(shown)
    return Picture("perplexity", "Validation perplexity", "perplexity", caption, series, _marks(runs), is_log=is_log)


def _evaluations(run: Run) -> Curve:
    return column(run.evals, "update"), column(run.evals, "eval_perplexity")


def merged_change(runs: Sequence[Run]) -> Picture:
    """How large the change is that each restart merged."""
    series = _of_each(runs, "merged change", partial(_percent_at_restarts, key="merged_change"), "dots")
    caption = (
        "How much the factors had changed the weights when a restart merged them: the norm of the merged s·B·A over the norm "
        "of W, over all layers. It shows whether the factors still learn something between two restarts."
    )
    return Picture("merged_change", "What each restart merged", "% of the weights' norm", caption, series)


def merge_error(runs: Sequence[Run]) -> Picture:
    """What rounding lost of it; empty where that is nothing in all runs, as with weights in fp32."""
    series = _of_each(runs, "merge error", partial(_percent_at_restarts, key="merge_error"), "dots")
    if not any(value > 0 for curve in series for value in curve.y):
        series = ()
    caption = "The share of the merged change that rounding to the stored weights lost."
    return Picture("merge_error", "What rounding lost of it", "% of the merged change", caption, series)


def _percent_at_restarts(run: Run, key: str) -> Curve:
    return column(run.restarts, "update"), [100 * value for value in column(run.restarts, key)]


def learning_rate(runs: Sequence[Run]) -> Picture:
    """Both learning rates: of the factors, and of what is trained beside them."""
    has_lora = any("lora_lr" in record for run in runs for record in run.updates)
    series: list[Series] = []
    for colour, run in enumerate(runs):
        name = "" if len(runs) == 1 else f"{run.label}: "
        others = "of embeddings, norms, head; in the warm start of all" if has_lora else "learning rate"
        if any("lora_lr" in record for record in run.updates):
            at, values = thinned(column(run.updates, "update"), column(run.updates, "lora_lr"))
            series.append(Series(f"{name}of the factors", at, values, colour))
        at, values = thinned(column(run.updates, "update"), column(run.updates, "lr"))
        colour_of_others = colour + 1 if has_lora and len(runs) == 1 else colour
        series.append(Series(f"{name}{others}", at, values, colour_of_others, "dashed" if has_lora else "line"))
    caption = "How large the steps are."
    if has_lora:
        caption += " After a restart the fresh factors begin with small steps: the learning rate climbs from 0 again."
    return Picture("learning_rate", "Learning rate", "learning rate", caption, tuple(series), _marks(runs))


def gradient_norm(runs: Sequence[Run]) -> Picture:
    """The norm of the gradients, smoothed."""
    caption = (
        f"How steep the loss is, before clipping; mean of {SMOOTH} updates. Its level changes with the phase, since it is the "
        "norm over other parameters. Growth without end announces a run that diverges."
    )
    series = _of_each(runs, "gradient norm", partial(_smooth, key="grad_norm"))
    return Picture("gradient_norm", "Gradient norm", "norm", caption, series, _marks(runs))


def speed(runs: Sequence[Run]) -> Picture:
    """Tokens per second, smoothed."""
    caption = (
        f"Tokens trained on per second, over all ranks; mean of {SMOOTH} updates. Without the time of starts, evaluations and "
        "checkpoints."
    )
    series = _of_each(runs, "tokens/s", partial(_smooth, key="tokens_per_s"))
    return Picture("speed", "Throughput", "tokens/s", caption, series, _marks(runs))


def _smooth(run: Run, key: str) -> Curve:
    return thinned(column(run.updates, "update"), centred_mean(column(run.updates, key), breaks_of(run)))


def _of_each(runs: Sequence[Run], name: str, curve: Callable[[Run], Curve], style: Style = "line") -> tuple[Series, ...]:
    """A curve for each run, in its colour; the only run's has the name of what it shows."""
    return tuple(Series(name if len(runs) == 1 else run.label, *curve(run), colour, style) for colour, run in enumerate(runs))


def _marks(runs: Sequence[Run]) -> tuple[Mark, ...]:
    """Restarts and changes of phase of all runs."""
    marks = []
    for number, run in enumerate(runs):
        colour = (
            None if len(runs) == 1 else number
        )  # one run's marks are grey: in the curve's own colour they would compete with it
        marks += [Mark("restart", update, colour) for update in run.restart_updates]
        marks += [Mark("phase change", update, colour) for update in run.phase_changes]
    return tuple(marks)
