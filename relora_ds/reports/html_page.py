"""A report as one HTML file: report.html, which needs no other file, no network and no script.

Whatever comes from a run's folder is text, and escaped. The page's own policy keeps a browser from loading or running anything.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib.resources import files

from relora_ds.reports.contents import Block, Panels, Recipe, Section, Table
from relora_ds.reports.drawing import COLOURS, Entry, legend, svg, turn
from relora_ds.reports.figures import Picture
from relora_ds.version import __version__

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""Nothing is loaded from anywhere, and no script runs; style sheets and styles are those in the page itself."""

MOST_COLUMNS = 8
"""Of a table with one row; with more it would not fit a screen."""
LONGEST, LONG = 12, ' class="long"'
"""Letters of a column's heading that stay on one line, and half of those of a row's; a longer one is broken into lines."""


def page(title: str, sections: Sequence[Section], writer: str = "relora-ds report") -> str:
    """The whole file; ``writer``: the command that writes it."""
    parts = [_section(number, section) for number, section in enumerate(sections, start=1)]
    places = "".join(
        f'<li><a href="#part-{number}">{_words(section.title)}</a></li>' for number, section in enumerate(sections, start=1)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{_style_sheet()}</style>
</head>
<body>
<header><h1>{_words(title)}</h1></header>
<nav aria-label="Contents"><details><summary>Contents</summary><ol>{places}</ol></details></nav>
<main>
{"".join(parts)}</main>
<footer><p>Written by <code>{escape(writer)}</code>, version {escape(__version__)}.</p></footer>
</body>
</html>
"""


@cache
def _style_sheet() -> str:
    return files("relora_ds.reports").joinpath("page.css").read_text(encoding="utf-8")


def _section(number: int, section: Section) -> str:
    blocks = "\n".join(_block(block) for block in section.blocks)
    return f'<section id="part-{number}">\n<h2>{_words(section.title)}</h2>\n{blocks}\n</section>\n'


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Picture):
        return _figure(block)
    if isinstance(block, Panels):
        return "\n".join(f"<h3>{_words(picture.title)}</h3>\n{_figure(picture)}" for picture in block.pictures)
    if isinstance(block, Recipe):
        return f"<details><summary>{escape(block.name)}</summary><pre>{escape(block.text)}</pre></details>"
    return f"<p>{_words(block)}</p>"


def _words(text: str) -> str:
    """A sentence, escaped, with what it has of strong words and code."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"(?<!\w)\*([^*\s][^*]*)\*(?!\w)", r"<em>\1</em>", text)


def _table(table: Table) -> str:
    """A wide one scrolls by itself, with the keyboard, too. A long row that is alone stands upright."""
    heading, *rows = table.rows
    is_upright = table.is_upright
    if len(rows) == 1 and len(heading) > MOST_COLUMNS:
        pairs: list[Sequence[str]] = list(zip(heading, rows[0], strict=True))
        (heading, *rows), is_upright = pairs, True
    head = "".join(f'<th scope="col"{LONG * (len(cell) > LONGEST)}>{escape(cell)}</th>' for cell in heading)
    body = "".join(_row(row) for row in rows)
    kind = "facts" if is_upright else "figures"
    return (
        f'<div class="wide" tabindex="0"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _row(row: Sequence[str]) -> str:
    first, *rest = row
    cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
    return f'<tr><th scope="row"{LONG * (len(first) > 2 * LONGEST)}>{escape(first)}</th>{cells}</tr>'


def _figure(picture: Picture) -> str:
    entries = "".join(_entry(entry) for entry in legend(picture))
    units = ("", picture.unit) if picture.rows else (picture.unit, picture.x_unit)
    above, below = (
        f'<p class="unit{place}">{escape(unit)}</p>' if unit else "" for place, unit in zip(("", " below"), units, strict=True)
    )
    return f'<figure id="picture-{picture.name}"><ul class="legend">{entries}</ul>{above}\n{svg(picture)}\n{below}</figure>'


def _entry(entry: Entry) -> str:
    colour = "mark" if entry.colour is None else f"series-{entry.colour % len(COLOURS)}"
    style = entry.style.replace(" ", "-") if not turn(entry.colour) else f"shape-{turn(entry.colour)}"
    return f'<li><span class="key {style}" style="--colour: var(--{colour})"></span>{escape(entry.label)}</li>'
