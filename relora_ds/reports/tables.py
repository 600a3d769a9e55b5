"""Tables for terminals and for Markdown, of cells that are text already."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns under each other: the first on the left, the others on the right. A row may be shorter than others."""
    count = max(len(row) for row in rows)
    widths = [max((len(row[column]) for row in rows if column < len(row)), default=0) for column in range(count)]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        )
        for row in rows
    ]
    return [line.rstrip() for line in lines]


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first row is the heading. A bar, which would start another column, is escaped."""
    cells = [[cell.replace("|", r"\|") for cell in row] for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    return [f"| {' | '.join(row)} |" for row in cells]
