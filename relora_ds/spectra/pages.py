"""``relora-ds spectrum``: spectrum.md and spectrum.html, of the same contents, spectrum.csv with every value, a picture for each kind
of layer."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from relora_ds.paths import make_folder, refuse_unwritable
from relora_ds.reports import html_page, markdown_page
from relora_ds.reports.contents import Block, Panels, Section, Table
from relora_ds.reports.report import refused_by_disk, write_page
from relora_ds.reports.run_records import unique_labels
from relora_ds.spectra import drawing
from relora_ds.spectra.changes import Change, Figures, LayerChange, RunChanges, changes_of
from relora_ds.spectra.spectrum import EXACT_SIDE, NOISE_SHARE, SMALL
from relora_ds.spectra.weights import RunWeights

HEADINGS = ["rank allowed", "above noise", "effective rank", "stable rank", f"below {SMALL:g}", "largest", "error"]
CSV_HEADINGS = ["run", "from", "to", "layer", "index", "value"]
INTRODUCTION = """The weight of a layer is a matrix, and so is what training added to it. The **singular values** of that change say
in how many directions it changes the layer, and how strongly in each. The two thin matrices of LoRA, the *factors*, can change it
in as many directions as their rank, and no more. ReLoRA merges them at every restart and begins with fresh ones, so that its change
may have a higher rank; ordinary training has no such bound."""
HOW_TO_READ = """Every kind of layer has its pictures. The histogram shows how often singular values of each size come: where nearly
all are at 0, the layers changed in few directions only. The sorted values go from the largest to the smallest: where the curve
breaks off, the rank of the change ends."""
NOTES = [
    "The singular values are those of W(to) − W(from), with W the stored weight + s·B·A. A figure is the mean over the layers.",
    "**rank allowed**: by the factors, their rank × (restarts + 1) where the change begins with them; – for full-rank training.",
    f"**above noise**: how many are above {NOISE_SHARE:g} of the largest, and above what rounding in the stored weights makes.",
    "**effective rank**: exp of the entropy of the values as shares of their sum (Roy and Vetterli 2007).",
    "**stable rank**: the sum of all squares over the square of the largest.",
    "**error**: 0 where all values were computed (`torch.linalg.svdvals` in fp32). Else the largest were, by a randomised sketch: a "
    "value is between the computed one and √(computed² + error²), and the others are at most the error. They count as 0. So the "
    f"number above noise and the effective rank are too low, and the share below {SMALL:g} may be too high.",
]


def spectrum(
    run_dirs: Sequence[Path],
    out: Path | None = None,
    *,
    before: int | None = None,
    now: int | None = None,
    every: bool = False,
    exact_side: int = EXACT_SIDE,
    trust: bool = False,
) -> Path:
    """Writes spectrum.md, spectrum.html, spectrum.csv and plots/spectrum_KIND.png; several runs are overlaid.

    Args:
        run_dirs: folders of runs.
        out: the folder to write into; None for the run's own, and for ``spectrum`` where there are several.
        before, now, every, exact_side: see :func:`changes_of`.
        trust: whether the user trusts whoever wrote the checkpoints.

    Returns:
        The path of spectrum.md.

    Raises:
        ConfigError: a run or a checkpoint is not there, or cannot be read; ``out`` cannot be written to.
    """
    folders = list({folder.resolve(): folder for folder in map(Path, run_dirs)}.values())
    weights = [RunWeights(folder, trust=trust) for folder in folders]
    target = out or (folders[0] if len(folders) == 1 else Path("spectrum"))
    refuse_unwritable("--out", target)
    runs = [
        changes_of(run, label, before=before, now=now, every=every, exact_side=exact_side)
        for run, label in zip(weights, unique_labels(folders), strict=True)
    ]
    make_folder("--out", target / "plots")
    kinds = list(dict.fromkeys(kind for run in runs for kind in run.newest.kinds()))
    shown = [
        drawing.panels(number, kind, [run for run in runs if kind in run.newest.kinds()])
        for number, kind in enumerate(kinds, start=1)
    ]
    title, parts = "Spectra of what changed in " + ", ".join(run.label for run in runs), sections(runs, shown)
    with refused_by_disk("--out", target):
        for block in shown:
            drawing.draw(target / "plots" / f"{block.name}.png", block)
        _write_values(target / "spectrum.csv", runs)
        write_page(target / "spectrum.html", html_page.page(title, parts, "relora-ds spectrum"))
        write_page(target / "spectrum.md", markdown_page.page(title, parts))
    return target / "spectrum.md"


def _write_values(path: Path, runs: Sequence[RunChanges]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_HEADINGS)
        for run in runs:
            for change in run.all:
                for layer in change.layers:
                    start = [run.label, change.before, change.now, layer.name]
                    values = enumerate(layer.spectrum.values.tolist(), start=1)
                    writer.writerows([*start, index, f"{value:.7g}"] for index, value in values)


def sections(runs: Sequence[RunChanges], shown: Sequence[Panels]) -> list[Section]:
    """All of the page but its title; ``shown``: the pictures, by kind of layer."""
    kinds = [block.title for block in shown]
    parts = [
        Section("What is this?", [INTRODUCTION, HOW_TO_READ]),
        Section("What was measured", [_runs(runs), _table(["kind", "run", "layers"], _by_kind(runs, kinds)), *NOTES]),
    ]
    for block in shown:
        blocks: list[Block] = [block]
        if any(run.earlier for run in runs):
            blocks.append(_table(["run", "update", "restarts"], _by_update(runs, block.title)))
        parts.append(Section(block.title, blocks))
    return parts + [
        Section(f"Layers of {run.label}", [_table(["layer", "shape"], map(_layer_row, run.newest.layers))]) for run in runs
    ]


def _runs(runs: Sequence[RunChanges]) -> Table:
    rows = [[run.label, run.method, f"{run.newest.before:,}", f"{run.newest.now:,}", str(run.newest.restarts)] for run in runs]
    return Table([["run", "method", "from update", "to update", "restarts"], *rows])


def _by_kind(runs: Sequence[RunChanges], kinds: Sequence[str]) -> Iterable[list[str]]:
    for kind in kinds:
        for run in runs:
            if layers := run.newest.of_kind(kind):
                yield [kind, run.label, str(len(layers)), *_cells(layers)]


def _by_update(runs: Sequence[RunChanges], kind: str) -> Iterable[list[str]]:
    moments: list[tuple[RunChanges, Change]] = [(run, change) for run in runs for change in run.all]
    for run, change in moments:
        if layers := change.of_kind(kind):
            yield [run.label, f"{change.now:,}", str(change.restarts), *_cells(layers)]


def _layer_row(layer: LayerChange) -> list[str]:
    return [layer.name, f"{layer.shape[0]:,} × {layer.shape[1]:,}", *_cells([layer])]


def _table(first: Sequence[str], rows: Iterable[list[str]]) -> Table:
    return Table([[*first, *HEADINGS], *rows])


def _cells(layers: Sequence[LayerChange]) -> list[str]:
    """One cell for each of the headings."""
    figures = Figures.of(layers)
    bound = "–" if figures.bound is None else f"{figures.bound:g}"
    ranks = [f"{rank:.1f}" for rank in (figures.above_noise, figures.effective_rank, figures.stable_rank)]
    return [bound, *ranks, f"{figures.below_small:.1%}", f"{figures.largest:.3g}", f"{figures.error:.2g}"]
