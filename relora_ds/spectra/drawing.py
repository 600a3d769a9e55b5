"""Pictures of spectra: for each kind of layer a histogram of the singular values, the values by rank, and the ranks by update."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from relora_ds.reports.drawing import COLOURS
from relora_ds.spectra.changes import Figures, LayerChange, RunChanges
from relora_ds.spectra.spectrum import SMALL

NUM_BINS = 60
DECADES = 6
"""How far below the largest value the sorted curves are drawn."""


def picture_of(kind: str) -> str:
    """The name of a kind's picture in plots/."""
    return f"spectrum_{kind}.png"


def draw(path: Path, kind: str, runs: Sequence[RunChanges]) -> None:
    """Draws the layers of one kind of all runs over each other.

    Args:
        path: of the picture.
        kind: of the layers.
        runs: those that have such layers.
    """
    over_time = any(run.earlier for run in runs)
    figure = Figure(figsize=(5 * (2 + over_time), 4.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes: list[Axes] = list(figure.subplots(1, 2 + over_time))
    coloured = list(zip(runs, cycle(COLOURS), strict=False))
    layers = {run.label: run.newest.of_kind(kind) for run in runs}
    largest = max(layer.spectrum.largest for group in layers.values() for layer in group) or 1.0
    for run, colour in coloured:
        _histogram(axes[0], layers[run.label], largest, colour)
        _sorted(axes[1], layers[run.label], colour)
        if over_time:
            _ranks(axes[2], kind, run, colour)
    axes[0].axvline(SMALL, color="0.45", linestyle=":", linewidth=1)
    axes[0].set(xlabel="singular value", ylabel="share of the values", yscale="log", title=f"{kind}: histogram")
    axes[1].set(xlabel="index of the value", ylabel="singular value (mean of the layers)", yscale="log", title="sorted")
    axes[1].set_ylim(largest * 10.0**-DECADES, 2 * largest)
    if over_time:
        axes[2].set(xlabel="update", ylabel="rank (mean of the layers)", title="ranks")
        axes[2].set_ylim(bottom=0)
    for axis in axes:
        axis.grid(color="0.93")
        axis.set_axisbelow(True)
    # A dollar sign in a folder name would start a formula.
    handles = [Line2D([], [], linewidth=2, color=colour, label=run.label.replace("$", r"\$")) for run, colour in coloured]
    handles.append(Line2D([], [], color="0.45", linestyle="--", label="rank that the factors allow"))
    if over_time:
        handles.append(Line2D([], [], color="0.45", marker="o", markersize=4, label="effective rank"))
        handles.append(Line2D([], [], color="0.45", marker="x", markersize=4, linestyle=":", label="stable rank"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def padded(layer: LayerChange) -> Tensor:
    """All values of a layer, (side,) falling; those that a sketch left out are 0."""
    found = layer.spectrum.values
    return torch.cat([found, found.new_zeros(layer.spectrum.side - len(found))])


def _histogram(axis: Axes, layers: Sequence[LayerChange], largest: float, colour: str) -> None:
    values = torch.cat([padded(layer) for layer in layers])
    counts = torch.histc(values, NUM_BINS, 0.0, largest) / len(values)
    edges = torch.linspace(0.0, largest, NUM_BINS + 1)
    axis.stairs(counts.numpy(), edges.numpy(), color=colour, linewidth=1.5, fill=False)
    axis.stairs(counts.numpy(), edges.numpy(), color=colour, alpha=0.2, fill=True)


def _sorted(axis: Axes, layers: Sequence[LayerChange], colour: str) -> None:
    sides = {layer.spectrum.side for layer in layers}
    rows = [padded(layer)[: min(sides)] for layer in layers]  # layers of one kind have one size in all but odd models
    mean = torch.stack(rows).mean(0).clamp(min=torch.finfo(torch.float32).tiny)  # 0 has no logarithm
    axis.plot(torch.arange(1, len(mean) + 1).numpy(), mean.numpy(), color=colour, linewidth=1.7)
    bound = Figures.of(layers).bound
    if bound is not None:
        axis.axvline(bound, color=colour, linestyle="--", linewidth=1)


def _ranks(axis: Axes, kind: str, run: RunChanges, colour: str) -> None:
    figures = {change.now: Figures.of(change.of_kind(kind)) for change in run.all}
    updates = list(figures)
    axis.plot(updates, [one.effective_rank for one in figures.values()], color=colour, marker="o", markersize=4)
    axis.plot(updates, [one.stable_rank for one in figures.values()], color=colour, marker="x", markersize=4, linestyle=":")
    bounds = [one.bound for one in figures.values() if one.bound is not None]
    if len(bounds) == len(updates):
        axis.plot(updates, bounds, color=colour, linestyle="--", linewidth=1, drawstyle="steps-post")
