"""The outcome of a comparison of traffic: one table for the terminal and for Markdown, one picture, one JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from relora_ds.bandwidth.comparison import ARMS, BASELINE, Measurement
from relora_ds.reports.tables import markdown
from relora_ds.run.folder import write_atomically
from relora_ds.units import human_bytes

PARTS = {"gradient": "#0072B2", "parameters": "#56B4E9", "restart": "#D55E00", "norm, loss": "0.4"}
"""What an update's bytes are drawn and listed as; colours of Okabe and Ito."""
NOTE = """Bytes that a rank sends in an update, on the mean over the ranks. Counted: the collectives' tensors, as rings send them.
Restarts: one, divided by the updates between two. On the wire: what the interfaces of all nodes sent, headers included, divided
by the ranks; what stays inside a node is not there, and what others sent is. Seconds at a speed: those measured here, and the
bytes at that speed on top."""


def parts(result: Measurement) -> dict[str, float]:
    """The bytes of an update by part of :data:`PARTS`."""
    named = {name: result.counted.get(name, 0.0) for name in ("gradient", "parameters", "restart")}
    return {**named, "norm, loss": sum(result.counted.values()) - sum(named.values())}


def table(results: Sequence[Measurement], links: Mapping[str, float]) -> list[list[str]]:
    """Header and rows, ready to print.

    Args:
        results: one an arm.
        links: bytes per second, by the name of a link's speed.
    """
    baseline = next((result for result in results if result.arm == BASELINE), None)
    header = ["", "trainable", *PARTS, "per update", "per token", "of defaults", "/ formula", "wire / counted", "s here"]
    lines = [[*header, *(f"s at {name}" for name in links)]]
    for result in results:
        share = f"{result.total_bytes / baseline.total_bytes:.1%}" if baseline and baseline.total_bytes else "–"
        lines.append([
            ARMS[result.arm],
            f"{result.trainable:,}",
            *(human_bytes(value) for value in parts(result).values()),
            human_bytes(result.total_bytes),
            human_bytes(result.total_bytes / result.tokens),
            share,
            _ratio(result.total_bytes, result.formula),
            _ratio(result.wire, result.total_bytes),
            f"{result.seconds:.3f}",
            *(f"{result.seconds + result.total_bytes / speed:.3f}" for speed in links.values()),
        ])  # fmt: skip
    return lines


def _ratio(value: float, against: float) -> str:
    return f"{value / against:.4f}" if against else "–"


def write(out: Path, results: Sequence[Measurement], links: Mapping[str, float], about: Mapping[str, Any]) -> None:
    """Writes comparison.json, comparison.md and comparison.png into ``out``; ``about`` tells of machine and settings."""
    out.mkdir(parents=True, exist_ok=True)
    content = {"about": dict(about), "links_bytes_per_s": dict(links), "arms": [result.as_dict() for result in results]}
    write_atomically(out / "comparison.json", json.dumps(content, indent=1))
    told = "\n".join(f"- {key}: {value}" for key, value in about.items())
    rows = "\n".join(markdown(table(results, links)))
    text = f"# Traffic of an update\n\n{told}\n\n{rows}\n\n{NOTE}\n\n![bytes](comparison.png)\n"
    write_atomically(out / "comparison.md", text)
    _draw(out / "comparison.png", results)


def _draw(path: Path, results: Sequence[Measurement]) -> None:
    """One bar an arm, its parts side by side."""
    figure = Figure(figsize=(9, 1.6 + 0.5 * len(results)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    start = [0.0] * len(results)
    names = [ARMS[result.arm] for result in results]
    for part, colour in PARTS.items():
        values = [parts(result)[part] / 1e6 for result in results]
        axis.barh(names, values, left=start, color=colour, label=part)
        start = [before + value for before, value in zip(start, values, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel("MB sent by a rank in an update")
    axis.set_title("Traffic of an update", loc="left", fontweight="bold")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)
