"""Draws a report's pictures by matplotlib: as PNG for Markdown, and as SVG for a page whose style sheet gives colours and letters."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from relora_ds.reports.figures import Picture, Style

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito: for any colour vision
LINES: dict[Style, dict[str, Any]] = {
    "line": {"linewidth": 1.5},
    "thin": {"linewidth": 0.6, "alpha": 0.35},
    "dashed": {"linewidth": 1.2, "linestyle": "--"},
    "dots": {"linewidth": 0.8, "marker": "o", "markersize": 4},
    "points": {"linestyle": "none", "marker": "o", "markersize": 4.5},
    "means": {"linestyle": "none", "marker": "|", "markersize": 13, "markeredgewidth": 1.6},
}
SHAPES = ("o", "s", "^", "D")
"""Of a curve's dots each time that the colours begin anew; a line without dots gets some then."""
SPACED = 0.09
"""How far apart those lie, as a share of the picture's diagonal."""
MARKS: dict[str, dict[str, Any]] = {
    "restart": {"linestyle": "--", "linewidth": 0.8},
    "phase change": {"linestyle": ":", "linewidth": 1.6},
    "bound": {"linestyle": "--", "linewidth": 1.0},
    "limit": {"linestyle": ":", "linewidth": 1.2},
}
MARK_LABELS = {"restart": "restart", "phase change": "end of the warm start"}
SIZE = (7.2, 3.4)
"""Of an SVG in inches: 518 x 245 of its units, to which a page's letters are measured."""
PLOT = (0.125, 0.105, 0.865, 0.875)
"""Left, bottom, width and height of the axes in it; beside them is room for numbers in the larger letters of small screens."""
ROW, AROUND = 0.38, 0.5
"""Height of a row, in inches, and of what is above and below the rows of a picture that has them."""
LEGEND_LINES, LEGEND_LINE = 5, 0.21
"""Of a PNG's legend: for how many a picture has room, and the height of one in inches."""
LEGEND_KEY, LEGEND_LETTER = 0.6, 0.08
"""Widths in inches: of what stands before and behind a label, and about of a letter."""
FEW = 100
"""A log axis that reaches less far has numbers between the powers of ten."""


@dataclass(frozen=True)
class Palette:
    """Colours of the series, in turn, and of the rest."""

    series: tuple[str, ...]
    ink: str
    mark: str
    grid: str

    def of(self, number: int | None) -> str:
        """The colour of a series; that of marks where it has none of its own."""
        return self.mark if number is None else self.series[number % len(self.series)]


def turn(number: int | None) -> int:
    """How often the colours began anew before that of a series: curves of one colour have dots of other shapes."""
    return 0 if number is None else number // len(COLOURS) % len(SHAPES)


ON_WHITE = Palette(COLOURS, ink="#262626", mark="#737373", grid="#ededed")
# Names that matplotlib takes for colours; each becomes a variable of the page's style sheet. None is black, which an SVG leaves out.
BY_STYLE = Palette(
    tuple(f"#{number:06x}" for number in range(1, len(COLOURS) + 1)), ink="#0000a1", mark="#0000a2", grid="#0000a3"
)
VARIABLES = {name: f"var(--series-{number})" for number, name in enumerate(BY_STYLE.series)} | {
    BY_STYLE.ink: "var(--soft)",
    BY_STYLE.mark: "var(--mark)",
    BY_STYLE.grid: "var(--grid)",
}


@dataclass(frozen=True)
class Entry:
    """A line of a legend: what a line of this style (of a series, or the kind of a mark) and colour is."""

    label: str
    style: str
    colour: int | None


def legend(picture: Picture) -> list[Entry]:
    """What is to be told of the curves and marks of a picture; marks of several runs are told once, in grey."""
    entries = [Entry(series.label, series.style, series.colour) for series in picture.series if series.label]
    marks = dict.fromkeys((mark.label or MARK_LABELS.get(mark.kind, mark.kind), mark.kind) for mark in picture.marks)
    return entries + [Entry(label, kind, None) for label, kind in marks]


def write_png(picture: Picture, path: Path) -> None:
    """Draws a picture with its title, units and legend, on white."""
    write_panels([picture], path, (9, 1.1 + 0.3 * len(picture.rows) if picture.rows else 4.65))


def write_panels(pictures: Sequence[Picture], path: Path, size: tuple[float, float]) -> None:
    """Draws pictures beside each other, with their titles and units and one legend, on white.

    Args:
        pictures: to be drawn.
        path: of the PNG.
        size: width and height in inches; a legend of many lines makes it higher.
    """
    entries = list(dict.fromkeys(entry for picture in pictures for entry in legend(picture)))
    columns = _legend_columns(entries, size[0], 3 + (len(pictures) > 1))
    more = LEGEND_LINE * max(0, math.ceil(len(entries) / columns) - LEGEND_LINES)
    figure = Figure(figsize=(size[0], size[1] + more), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, picture in zip(figure.subplots(1, len(pictures), squeeze=False)[0], pictures, strict=True):
        _draw(axis, picture, ON_WHITE)
        axis.set_title(picture.title, loc="left", fontweight="bold")
        axis.set(xlabel=picture.unit if picture.rows else picture.x_unit, ylabel="" if picture.rows else picture.unit)
    handles = [
        Line2D([], [], color=ON_WHITE.of(entry.colour), label=_plain(entry.label), **_line(entry.style, entry.colour))
        for entry in entries
    ]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path)


def _legend_columns(entries: Sequence[Entry], width: float, most: int) -> int:
    """How many columns of a legend fit into a width in inches, at most so many."""
    longest = max((len(entry.label) for entry in entries), default=0)
    return max(1, min(most, int(width / (LEGEND_KEY + LEGEND_LETTER * longest))))


def svg(picture: Picture) -> str:
    """The curves of a picture as an ``<svg>`` element for an HTML page, which says title, units and legend itself.

    It has no size, font or colour of its own. Colours are the variables ``--series-0`` … ``--series-6``, ``--soft`` (numbers),
    ``--mark`` and ``--grid`` of the page's style sheet. Every id in it begins with the picture's name, and those of its curves go on
    with ``-series-``.
    """
    size, place = SIZE, PLOT
    if picture.rows:
        height = AROUND + ROW * len(picture.rows)
        size, place = (SIZE[0], height), (0.02, 0.7 * AROUND / height, 0.96, ROW * len(picture.rows) / height)
    figure = Figure(figsize=size)
    figure.patch.set_visible(False)
    _draw(figure.add_axes(place), picture, BY_STYLE)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": picture.name}):
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _for_page(file.getvalue(), picture)


def _plain(text: str) -> str:
    """A dollar sign, as in a folder's name, would start a formula."""
    return text.replace("$", r"\$")


def _line(style: str, colour: int | None) -> dict[str, Any]:
    if style in MARKS:
        return MARKS[style]
    line = LINES[style]  # type: ignore[index]
    if not turn(colour) or style in ("thin", "means"):
        return line
    return {"markersize": 4, "markevery": None if "marker" in line else SPACED} | line | {"marker": SHAPES[turn(colour)]}


def _draw(axis: Axes, picture: Picture, palette: Palette) -> None:
    """Curves, marks, axes and their numbers."""
    for number, series in enumerate(picture.series):
        line = axis.plot(series.x, series.y, color=palette.of(series.colour), **_line(series.style, series.colour))
        line[0].set_gid(f"series-{number}")
    # The marks lie above the grid and below the curves.
    for number, mark in enumerate(picture.marks):
        axis.axvline(mark.x, color=palette.of(mark.colour), zorder=1.8, gid=f"mark-{number}", **_line(mark.kind, None))
    if picture.rows:
        _lay_out_rows(axis, picture, palette)
    else:
        _lay_out(axis, picture)
    axis.grid(color=palette.grid, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.patch.set_visible(palette is ON_WHITE)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(palette.mark)
    axis.tick_params(length=0, pad=5, labelcolor=palette.ink)


def _lay_out(axis: Axes, picture: Picture) -> None:
    """Scales, limits and numbers of both axes."""
    if picture.is_log:
        axis.set_yscale("log")
    axis.yaxis.set_major_locator(MaxNLocator(5))
    is_counted = all(float(x).is_integer() for series in picture.series for x in series.x)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=is_counted))
    for ruler in (axis.xaxis, axis.yaxis):
        ruler.set_major_formatter(FuncFormatter(lambda value, _: axis_number(value)))
        ruler.set_minor_locator(NullLocator())
    axis.set_ylim(picture.limits)
    if picture.is_log:
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(_powers(low, high))


def _powers(low: float, high: float) -> LogLocator:
    return LogLocator(subs=(1,) if high > FEW * low else (1, 2, 5), numticks=9)


def _lay_out_rows(axis: Axes, picture: Picture, palette: Palette) -> None:
    """A row's name stands above its values, so that a phone has room for both."""
    axis.set_ylim(len(picture.rows) - 0.65, -0.65)
    axis.set_yticks(range(len(picture.rows)), [""] * len(picture.rows))
    for number, name in enumerate(picture.rows):
        across = axis.get_yaxis_transform()
        axis.text(0, number - 0.22, _plain(name), transform=across, color=palette.ink, fontsize=9, zorder=3)
    if picture.is_log:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(_powers(*axis.get_xlim()))
    else:
        axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: axis_number(value)))
    axis.xaxis.set_minor_locator(NullLocator())


def axis_number(value: float) -> str:
    """A number at an axis, short enough for a phone: 0.25, 20,000, 1.5M, 2.5e-5."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:,.6g}M"
    if 0 < abs(value) < 1e-4:
        digits, _, power = f"{value:.3e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:,.6g}"


def _for_page(drawn: str, picture: Picture) -> str:
    """What matplotlib wrote, without what is not to be in a page: its style sheet, metadata, names, sizes, fonts and colours."""
    root = ElementTree.fromstring(drawn)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        own = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update({name: _value(name, value, element.tag, picture.name) for name, value in own.items()})
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": f"{picture.title}, {picture.unit} by {picture.x_unit}"}
    return ElementTree.tostring(root, encoding="unicode")


def _value(name: str, value: str, tag: str, prefix: str) -> str:
    """An attribute's value: ids with a prefix, colours as variables, two decimals, a text's style without its font."""
    if name == "id":
        return f"{prefix}-{value}"
    if name in ("href", "clip-path"):
        return value.replace("#", f"#{prefix}-")
    if name == "style":
        rules = [rule.strip() for rule in value.split(";") if rule.strip()]
        if tag == "text":
            rules = [rule for rule in rules if rule.startswith(("fill", "text-anchor"))]
        return "; ".join(re.sub(r"#[0-9a-f]{6}\b", lambda found: VARIABLES.get(found[0], found[0]), rule) for rule in rules)
    return re.sub(r"(\.\d\d)\d+", r"\1", value) if name in ("d", "x", "y", "transform") else value
