"""What each picture of a report shows: curves, marks, units and a sentence, as numbers and words. :mod:`.drawing` draws them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from relora_ds.reports.restarts import NEAR, WINDOW, right_at_restarts
from relora_ds.reports.run_records import Run, column, known, mean

Style = Literal["line", "thin", "dashed", "dots", "points", "means"]
"""dots: joined by lines. points: not joined. means: short strokes among points."""
Curve = tuple[Sequence[float], Sequence[float]]

SMOOTH = 2 * NEAR + 1
"""Updates that the mean of a curve covers, as many before as after: one that looks back only would lie above a falling loss."""
LOG_RATIO = 10
"""Values that differ by more than this factor are drawn on a log axis."""
MOST_POINTS = 1200
"""Points of a curve; of more, the smallest and the largest of each stretch are drawn, so that no spike is lost."""
MOST_RESTARTS = 6
"""Restarts that are told apart by colour."""
MOST_MARKED = 7
"""Runs whose restarts are told apart by colour; of more, only what is at the same update in all of them is marked."""
AS_BEFORE = f"Thin: each update. Thick: the mean of {SMOOTH} updates, as in the picture of the loss."
SMOOTHED = (
    f"Thin: each update, as it was measured. Thick: the mean of {SMOOTH} updates, {NEAR} before and {NEAR} after each. "
    "It never reaches across a restart, so that a jump there would show; right beside one it is a straight line through the "
    "updates on its side."
)


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
    """A vertical line at ``x``; in the colour of a run, or grey where there is only one run.

    Attributes:
        kind: ``bound`` is one that values cannot pass, ``limit`` one by which they are judged.
        label: what the legend calls it; "" for the usual name of its kind.
    """

    kind: Literal["restart", "phase change", "bound", "limit"]
    x: float
    colour: int | None = None
    label: str = ""


@dataclass(frozen=True)
class Picture:
    """What a picture shows.

    Attributes:
        name: of its file, without the ending.
        title, unit, x_unit: what is drawn, and in what.
        caption: how to read it, for somebody who sees such a picture for the first time.
        series, marks: what is in it.
        limits: of the y axis; None for those of the data.
        is_log: whether the axis of the values is logarithmic.
        rows: where values lie along x, a row for each thing that has some: what these are called, for y = 0, 1, … from the top;
            ``unit`` is then that of x.
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
    rows: tuple[str, ...] = ()


def centred_mean(values: Sequence[float], breaks: Sequence[int] = (), window: int = SMOOTH) -> list[float]:
    """Mean of each value and its neighbours, as many before as after; NaN values do not count.

    Near an end, and near a break, there are fewer on one side: there it is the straight line through what a window holds (least
    squares). A mean of these would lie beside a falling curve, and one over fewer values would end in the noise of the last.

    Args:
        values: to be smoothed.
        breaks: indices at which something new begins, as after a restart: no mean reaches across. So a jump there stays one.
        window: an odd number, how many values a mean covers.
    """
    means: list[float] = []
    for begin, end in zip([0, *breaks], [*breaks, len(values)], strict=True):
        for at in range(begin, end):
            first, last = max(begin, at - window // 2), min(end, at + window // 2 + 1)
            is_whole = last - first == window
            means.append(mean(values[first:last]) if is_whole else _line_at(at - first, values[first:last]))
    return means


def _line_at(place: int, values: Sequence[float]) -> float:
    """The straight line through values, at the place of one of them; with fewer than two that are known, this one."""
    there = [at for at, value in enumerate(values) if not math.isnan(value)]
    if len(there) < 2:
        return values[place]
    middle, level = mean(there), mean(values)
    slope = sum((at - middle) * (values[at] - level) for at in there) / sum((at - middle) ** 2 for at in there)
    return level + slope * (place - middle)


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
    """All pictures of a report on these runs; a curve without a point is left out, and so is a picture without a curve."""
    drawn = [loss(runs), around_restarts(runs), perplexity(runs), merged_change(runs), merge_error(runs)]
    drawn += [learning_rate(runs), gradient_norm(runs), speed(runs)]
    drawn = [replace(picture, series=tuple(series for series in picture.series if known(series.y))) for picture in drawn]
    return [picture for picture in drawn if picture.series]


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
        f"validation loss that of text it never trains on. {SMOOTHED} {cut}"
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
                smooth = centred_mean(changes, [at for at, offset in enumerate(offsets) if at and offset == 1])
                series.append(Series(f"restart after update {update:,}", offsets, smooth, number))
        elif curves:
            offsets = [float(offset) for offset in range(1 - WINDOW, WINDOW + 1)]
            means = [mean(curve.get(offset, math.nan) for curve in curves.values()) for offset in offsets]
            label = f"{run.label}: mean of {len(curves)} restart(s)" if len(runs) > 1 else f"mean of {len(curves)} restarts"
            series.append(Series(label, offsets, means, colour))
    drawn = AS_BEFORE if is_single else "A mean over the restarts, update by update."
    caption = (
        f"Training loss of the {WINDOW} updates before and after a restart, less the mean of the {NEAR} right before it. The "
        f"restart is at 0. A restart that does harm would show as a step or a spike upwards right behind it. {drawn}"
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
    caption += " The lines between the points only lead the eye."
    is_log = max(shown) > LOG_RATIO * min(shown)
    return Picture("perplexity", "Validation perplexity", "perplexity", caption, series, _marks(runs), is_log=is_log)


def _evaluations(run: Run) -> Curve:
    return column(run.evals, "update"), column(run.evals, "eval_perplexity")


def merged_change(runs: Sequence[Run]) -> Picture:
    """How large the change is that each restart merged."""
    series = _of_each(runs, "merged change", partial(_percent_at_restarts, key="merged_change"), "dots")
    caption = (
        "How much the factors had changed the weights when a restart merged them: the norm of the merged s·B·A over the norm "
        "of W, over all layers. It shows whether the factors still learn something between two restarts. The lines only lead the eye."
    )
    return Picture(
        "merged_change", "What each restart merged", "% of the weights' norm", caption, series, limits=_from_zero(series)
    )


def merge_error(runs: Sequence[Run]) -> Picture:
    """What rounding lost of it; empty where that is nothing in all runs, as with weights in fp32."""
    series = _of_each(runs, "merge error", partial(_percent_at_restarts, key="merge_error"), "dots")
    if not any(value > 0 for curve in series for value in curve.y):
        series = ()
    caption = "The share of the merged change that rounding to the stored weights lost."
    return Picture(
        "merge_error", "What rounding lost of it", "% of the merged change", caption, series, limits=_from_zero(series)
    )


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
    if has_lora and any(run.climbs_after_restarts for run in runs):
        caption += " After a restart the fresh factors begin with small steps: the learning rate climbs from 0 again."
    drawn, marks, limits = tuple(series), _marks(runs), _from_zero(series)
    return Picture("learning_rate", "Learning rate", "learning rate", caption, drawn, marks, limits=limits)


def gradient_norm(runs: Sequence[Run]) -> Picture:
    """The norm of the gradients, before clipping."""
    series, said = _measured(runs, "gradient norm", "grad_norm")
    caption = (
        "How steep the loss is, before clipping. Its level changes with the phase, since it is the norm over other parameters. "
        f"Growth without end announces a run that diverges. {said}"
    )
    return Picture("gradient_norm", "Gradient norm", "norm", caption, series, _marks(runs))


def speed(runs: Sequence[Run]) -> Picture:
    """Tokens per second of each update, over all ranks."""
    series, said = _measured(runs, "tokens/s", "tokens_per_s")
    caption = (
        "Tokens trained on per second, over all ranks: higher is better. The time of a restart counts to the update before it; "
        f"that of starts, evaluations and checkpoints is not in it. {said}"
    )
    return Picture("speed", "Throughput", "tokens/s", caption, series, _marks(runs), limits=_from_zero(series))


def _measured(runs: Sequence[Run], name: str, key: str) -> tuple[tuple[Series, ...], str]:
    """What is measured at every update: of one run each value and their mean, of several the means; and a sentence on that."""
    if len(runs) == 1:
        each = _of_each(runs, f"{name} of each update", partial(_values, key=key), "thin")
        return (*each, *_of_each(runs, f"{name}, mean of {SMOOTH} updates", partial(_smooth, key=key))), AS_BEFORE
    return _of_each(runs, name, partial(_smooth, key=key)), f"Each line is the mean of {SMOOTH} updates."


def _values(run: Run, key: str) -> Curve:
    return thinned(column(run.updates, "update"), column(run.updates, key))


def _smooth(run: Run, key: str) -> Curve:
    return thinned(column(run.updates, "update"), centred_mean(column(run.updates, key), breaks_of(run)))


def _from_zero(series: Sequence[Series]) -> tuple[float, float]:
    """Limits of an axis on which the height of a curve is the value itself."""
    return 0.0, 1.05 * max(known(value for curve in series for value in curve.y), default=1.0) or 1.0


def _of_each(runs: Sequence[Run], name: str, curve: Callable[[Run], Curve], style: Style = "line") -> tuple[Series, ...]:
    """A curve for each run, in its colour; the only run's has the name of what it shows."""
    return tuple(Series(name if len(runs) == 1 else run.label, *curve(run), colour, style) for colour, run in enumerate(runs))


def _marks(runs: Sequence[Run]) -> tuple[Mark, ...]:
    """Restarts and changes of phase: of each run in its colour, or of very many those that all have."""
    if len(runs) > MOST_MARKED:
        restarts, changes = (
            set.intersection(*map(set, at)) for at in zip(*((r.restart_updates, r.phase_changes) for r in runs), strict=True)
        )
        return (*(Mark("restart", at) for at in sorted(restarts)), *(Mark("phase change", at) for at in sorted(changes)))
    marks = []
    for number, run in enumerate(runs):
        # One run's marks are grey: in the curve's own colour they would compete with it.
        colour = None if len(runs) == 1 else number
        marks += [Mark("restart", update, colour) for update in run.restart_updates]
        marks += [Mark("phase change", update, colour) for update in run.phase_changes]
    return tuple(marks)
