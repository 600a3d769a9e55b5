"""What the pictures of spectra show: for each kind of layer a histogram of the singular values, the values by rank, and the ranks by
update. :mod:`relora_ds.reports.drawing` draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from relora_ds.reports.contents import Panels
from relora_ds.reports.drawing import write_panels
from relora_ds.reports.figures import Mark, Picture, Series, thinned
from relora_ds.spectra.changes import Figures, LayerChange, RunChanges
from relora_ds.spectra.spectrum import SMALL

NUM_BINS = 60
DECADES = 6
"""How far below the largest value the sorted curves are drawn."""
PANEL = (5.0, 4.4)
"""Width and height of one in a PNG, in inches."""
BOUND = "rank that the factors allow"


def picture_of(kind: str) -> str:
    """The name of a kind's picture in plots/, without its ending."""
    return f"spectrum_{kind}"


def panels(number: int, kind: str, runs: Sequence[RunChanges]) -> Panels:
    """The pictures of the layers of one kind, all runs over each other.

    Args:
        number: of the kind, which tells its pictures apart in a page.
        kind: of the layers.
        runs: those that have such layers.
    """
    groups = [run.newest.of_kind(kind) for run in runs]
    labels = [run.label for run in runs]
    largest = max(layer.spectrum.largest for group in groups for layer in group) or 1.0
    pictures = [
        _histogram(f"spectrum_{number}_histogram", kind, groups, labels, largest),
        _sorted(f"spectrum_{number}_sorted", kind, groups, labels, largest),
    ]
    if any(run.earlier for run in runs):
        pictures.append(_ranks(f"spectrum_{number}_ranks", kind, runs))
    return Panels(picture_of(kind), kind, pictures)


def draw(path: Path, block: Panels) -> None:
    """Draws panels into one PNG, beside each other."""
    write_panels(block.pictures, path, (PANEL[0] * len(block.pictures), PANEL[1]))


def padded(layer: LayerChange) -> Tensor:
    """All values of a layer, (side,) falling; those that a sketch left out are 0."""
    found = layer.spectrum.values
    return torch.cat([found, found.new_zeros(layer.spectrum.side - len(found))])


def _histogram(name: str, kind: str, groups: Sequence[Sequence[LayerChange]], labels: Sequence[str], largest: float) -> Picture:
    edges = torch.linspace(0.0, largest, NUM_BINS + 1).tolist()
    series, least = [], 1.0
    for colour, (layers, label) in enumerate(zip(groups, labels, strict=True)):
        values = torch.cat([padded(layer) for layer in layers])
        shares = (torch.histc(values, NUM_BINS, 0.0, largest) / len(values)).tolist()
        least = min(least, 1 / len(values))
        # A bin without values goes down to below the axis: 0 has no logarithm.
        steps = [(x, share or least / 100) for at, share in enumerate(shares) for x in edges[at : at + 2]]
        series.append(Series(label, [x for x, _ in steps], [y for _, y in steps], colour))
    marks = (Mark("limit", SMALL, label=f"{SMALL:g}: the table counts what is below"),) if largest >= SMALL else ()
    title, unit = f"{kind}: histogram", "share of the values"
    return Picture(name, title, unit, "", tuple(series), marks, "singular value", (least / 2, 2.0), is_log=True)


def _sorted(name: str, kind: str, groups: Sequence[Sequence[LayerChange]], labels: Sequence[str], largest: float) -> Picture:
    series, marks = [], []
    for colour, (layers, label) in enumerate(zip(groups, labels, strict=True)):
        sides = {layer.spectrum.side for layer in layers}
        rows = [padded(layer)[: min(sides)] for layer in layers]  # layers of one kind have one size in all but odd models
        mean = torch.stack(rows).mean(0).clamp(min=torch.finfo(torch.float32).tiny)  # 0 has no logarithm
        series.append(Series(label, *thinned([float(index) for index in range(1, len(mean) + 1)], mean.tolist()), colour))
        bound = Figures.of(layers).bound
        marks += [] if bound is None else [Mark("bound", bound, colour, BOUND)]
    title, unit = f"{kind}: sorted values", "singular value (mean of the layers)"
    limits = (largest * 10.0**-DECADES, 2 * largest)
    return Picture(name, title, unit, "", tuple(series), tuple(marks), "number of the value", limits, is_log=True)


def _ranks(name: str, kind: str, runs: Sequence[RunChanges]) -> Picture:
    series = []
    for colour, run in enumerate(runs):
        figures = {float(change.now): Figures.of(change.of_kind(kind)) for change in run.all}
        updates = list(figures)
        who = f"{run.label}: " if len(runs) > 1 else ""
        series.append(Series(f"{who}effective rank", updates, [one.effective_rank for one in figures.values()], colour, "dots"))
        series.append(Series(f"{who}stable rank", updates, [one.stable_rank for one in figures.values()], colour, "dashed"))
        bounds = [math.nan if one.bound is None else one.bound for one in figures.values()]
        if not all(map(math.isnan, bounds)):
            series.append(Series(f"{who}{BOUND}", updates, bounds, colour, "thin"))
    highest = max(value for curve in series for value in curve.y if not math.isnan(value))
    limits = (0.0, 1.05 * highest or 1.0)
    return Picture(name, f"{kind}: ranks", "rank (mean of the layers)", "", tuple(series), limits=limits)
