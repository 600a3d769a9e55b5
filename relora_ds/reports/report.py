"""A report on one run or several: ``report.md`` and ``report.html``, of the same contents, and pictures.

It reads only what a run leaves in its folder, so it works without a GPU, on a run that is still going and on one that was killed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from relora_ds.errors import ConfigError
from relora_ds.paths import make_folder
from relora_ds.reports import contents, drawing, figures, html_page, markdown_page
from relora_ds.reports.contents import Section
from relora_ds.reports.figures import Picture
from relora_ds.reports.run_records import read_run, unique_labels


def report(run_dirs: Sequence[Path], out: Path | None = None, *, title: str = "", first: Sequence[Section] = ()) -> Path:
    """Writes ``report.md``, ``plots/*.png`` for it, and ``report.html``, which needs no other file.

    Several runs are drawn over each other.

    Args:
        run_dirs: folders of runs.
        out: the folder to write into; None for the run's own, and for ``report`` where there are several.
        title: of the pages; "" for one that names the runs.
        first: sections that stand before those on the runs.

    Returns:
        The path of ``report.md``.

    Raises:
        ConfigError: a folder holds no run, or a damaged one; ``out`` cannot be written to.
    """
    folders = list({folder.resolve(): folder for folder in map(Path, run_dirs)}.values())
    if not folders:
        raise ConfigError("RUN_DIR", "", "no run folder is given", "name at least one")
    runs = [read_run(folder, label) for folder, label in zip(folders, unique_labels(folders), strict=True)]
    target = out or (folders[0] if len(folders) == 1 else Path("report"))
    make_folder("--out", target / "plots")
    title, sections = title or contents.title(runs), [*first, *contents.sections(runs, figures.pictures(runs))]
    for picture in (block for section in sections for block in section.blocks if isinstance(block, Picture)):
        drawing.write_png(picture, target / "plots" / f"{picture.name}.png")
    (target / "report.html").write_text(html_page.page(title, sections), encoding="utf-8")
    (target / "report.md").write_text(markdown_page.page(title, sections), encoding="utf-8")
    return target / "report.md"
