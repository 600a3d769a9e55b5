"""A report on one run or several: ``report.md`` and ``report.html``, of the same contents, and pictures.

It reads only what a run leaves in its folder, so it works without a GPU, on a run that is still going and on one that was killed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from relora_ds.errors import ConfigError
from relora_ds.paths import make_folder
from relora_ds.reports import contents, drawing, figures, html_page, markdown_page
from relora_ds.reports.contents import Section
from relora_ds.reports.figures import Picture
from relora_ds.reports.run_records import read_run, unique_labels
from relora_ds.run.folder import write_atomically


def report(
    run_dirs: Sequence[Path], out: Path | None = None, *, title: str = "", first: Sequence[Section] = (), key: str = "--out"
) -> Path:
    """Writes ``report.md``, ``plots/*.png`` for it, and ``report.html``, which needs no other file.

    Several runs are drawn over each other.

    Args:
        run_dirs: folders of runs.
        out: the folder to write into; None for the run's own, and for ``report`` where there are several.
        title: of the pages; "" for one that names the runs.
        first: sections that stand before those on the runs.
        key: what the user calls ``out``.

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
    make_folder(key, target / "plots")
    title, sections = title or contents.title(runs), [*first, *contents.sections(runs, figures.pictures(runs))]
    with refused_by_disk(key, target):
        for picture in (block for section in sections for block in section.blocks if isinstance(block, Picture)):
            drawing.write_png(picture, target / "plots" / f"{picture.name}.png")
        write_page(target / "report.html", html_page.page(title, sections))
        write_page(target / "report.md", markdown_page.page(title, sections))
    return target / "report.md"


@contextmanager
def refused_by_disk(key: str, folder: Path) -> Iterator[None]:
    """Turns what the disk says against writing into ``folder`` (it is full, a name is taken) into a ConfigError."""
    try:
        yield
    except OSError as error:
        problem = f"{error.filename2 or error.filename or folder} cannot be written: {error.strerror}"
        raise ConfigError(key, str(folder), problem, "name another folder") from None


def write_page(path: Path, text: str) -> None:
    """Writes a page in one step. What UTF-8 cannot hold, as a file's name that is no UTF-8 has it, becomes a question mark."""
    write_atomically(path, text.encode("utf-8", "replace").decode("utf-8"))
