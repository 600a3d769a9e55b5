"""A report as Markdown: report.md, beside the pictures that it shows."""

from __future__ import annotations

from collections.abc import Sequence

from relora_ds.reports.contents import Block, Panels, Recipe, Section, Table
from relora_ds.reports.figures import Picture
from relora_ds.reports.tables import markdown


def page(title: str, sections: Sequence[Section], folder: str = "plots") -> str:
    """The whole file; its pictures lie in ``folder`` beside it. A recipe is named, not copied: it lies in the run's folder."""
    lines = [f"# {title}"]
    for section in sections:
        lines += ["", f"## {section.title}"]
        for block in section.blocks:
            lines += ["", *_lines(block, folder)]
    return "\n".join(lines) + "\n"


def _lines(block: Block, folder: str) -> list[str]:
    if isinstance(block, Table):
        return markdown(block.rows)
    if isinstance(block, (Picture, Panels)):
        return [f"![{block.title}]({folder}/{block.name}.png)"]
    if isinstance(block, Recipe):
        return [f"It is in `{block.name}`."]
    return [block]
