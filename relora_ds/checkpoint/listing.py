"""``relora-ds checkpoints``: what a run's folder holds to go on from, in one table."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from relora_ds.checkpoint import base as bases
from relora_ds.checkpoint import reader as checkpoints
from relora_ds.errors import ConfigError
from relora_ds.run import manifest as manifests
from relora_ds.run.folder import RunFolder

HEAD = ("checkpoint", "update", "phase", "restarts", "ranks", "size", "needs", "state")


def listing(run: RunFolder, *, deep: bool) -> tuple[list[str], bool]:
    """The table, and whether everything in it is whole.

    Args:
        run: the run's folder.
        deep: whether contents are compared with their checksums; else only names and sizes.

    Raises:
        ConfigError: no run is there.
    """
    if not run.exists():
        raise ConfigError("RUN_DIR", str(run.path), "holds no run", "name the folder given as run.dir")
    rows: list[tuple[str, ...]] = [HEAD]
    faults: list[str] = []
    for path in checkpoints.find_all(run):
        found = list(checkpoints.faults(path, deep=deep))
        if found and not (path / manifests.NAME).is_file():
            continue  # a run that goes on has removed it meanwhile
        faults += found
        rows.append(_row(path, "damaged" if found else "whole" if deep else "complete"))
    for folder in bases.entries(run):
        unused = "the start of the factors" if folder == bases.folder_of(run, 0) else "needed by none"
        used = "" if any(row[6] == folder.name for row in rows) else unused
        rows.append((f"base/{folder.name}", "", "", "", "", _size(folder), "", used))
    if run.universal.is_dir():
        rows += [
            (f"universal/{folder.name}", "", "", "", "", _size(folder), "", "conversion") for folder in run.universal.iterdir()
        ]
    if len(rows) == 1:
        return [f"{run.path} holds no checkpoint yet"], True
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, *dict.fromkeys(faults)], not faults


def _row(path: Path, state: str) -> tuple[str, ...]:
    try:
        content = manifests.read(path)
    except manifests.ManifestError:
        return (path.name, "", "", "", "", _size(path), "", state)
    needs = Path(content.base["folder"]).name if content.base is not None else "nothing else"
    numbers = (str(content.update), content.phase, str(content.restarts), str(content.world_size))
    return (path.name, *numbers, _size(path), needs, state)


def _size(folder: Path) -> str:
    return readable(sum(_bytes(folder)))


def _bytes(folder: Path) -> Iterator[int]:
    """Of each file in it; what a run that goes on removes meanwhile is passed over."""
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                yield (Path(place) / name).stat().st_size


def readable(num_bytes: float) -> str:
    """Bytes for people: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
