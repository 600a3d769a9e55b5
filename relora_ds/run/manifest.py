"""Manifests: JSON files that say what a folder holds, written last. A folder is complete when its manifest is there, and whole when
every file that the manifest lists has the size and the SHA-256 that it gives."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from relora_ds.run.folder import write_atomically
from relora_ds.text import json_text

NAME = "manifest.json"
FORMAT = 1
CHUNK = 1 << 22
UNKNOWN_TO_IT = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
"""What a file system says of a call that it does not have."""
Files = dict[str, dict[str, Any]]
"""{name: {"bytes": size, "sha256": hex digest}}"""
Count = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[int, Field(gt=0, strict=True)]


class ManifestError(ValueError):
    """A manifest that cannot be read."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is.

    Attributes:
        update, phase, restarts: where the run was: updates done, ``full`` or ``lora``, restarts done.
        lora_updates: updates of the LoRA phase that the optimizer has counted.
        world_size, zero_stage, precision: of the engine that wrote it.
        config_sha256: of the run's config.yaml as it was then.
        data: {"epoch_seed", "sequences", "sha256"}: the data order is a function of the seed, and so many sequences have been used,
            of tokens with these digests by split (checkpoints of earlier versions say none).
        rng: {"seed"}: every random number is a function of it, the update, the rank and the layer.
        progress: tokens and skipped updates so far.
        base: {"folder": relative to the run's folder, "sha256": of its manifest}, or None where no frozen weights are needed.
        versions: of Python and the packages.
        files: everything in the folder but this manifest.
    """

    update: Count
    phase: Annotated[str, Field(pattern="^(full|lora)$")]
    restarts: Count
    lora_updates: Count
    world_size: Positive
    zero_stage: Count
    precision: str
    config_sha256: str
    data: dict[str, Any]
    rng: dict[str, Any]
    progress: dict[str, Any]
    base: dict[str, str] | None
    versions: dict[str, str]
    files: Files = field(default_factory=dict)
    format: int = FORMAT

    __pydantic_config__ = ConfigDict(extra="forbid")


_READER = TypeAdapter(Manifest)


def read(folder: Path) -> Manifest:
    """Raises ManifestError when the manifest is missing, empty, cut off or of another format."""
    content = read_json(folder)
    try:
        found = _READER.validate_python(content)
    except ValidationError as error:
        fault = json_text.first_fault(error)
        raise ManifestError(f"{folder / NAME}: is not a manifest of format {FORMAT}: {fault}") from None
    if found.base is not None and {"folder", "sha256"} - found.base.keys():
        raise ManifestError(f"{folder / NAME}: is not a manifest of format {FORMAT}: base: names no folder and its checksum")
    return found


def numbered(parent: Path, name: str) -> list[Path]:
    """The folders ``<name>_<number>`` in one folder, by number, with a manifest or without; none where ``parent`` is not there.

    What users put beside them (``update_0000400_copy``) is not among them: nothing here may take it for one, or remove it.

    Raises:
        OSError: ``parent`` cannot be read. (Path.glob would find nothing, and a run begin anew over its checkpoints.)
    """
    try:
        found = list(parent.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((path for path in found if re.fullmatch(rf"{name}_[0-9]+", path.name)), key=number)


def number(folder: Path) -> int:
    """That of a folder which :func:`numbered` finds."""
    return int(folder.name.rpartition("_")[2])


def remove(folder: Path) -> None:
    """Removes a folder with all that is in it, its manifest first: half removed it must not look whole. What cannot be removed stays.

    Of a link the link alone goes: what it leads to is not this run's to remove.
    """
    try:
        if folder.is_symlink():
            folder.unlink()
            return
        (folder / NAME).unlink(missing_ok=True)
    except OSError:
        return
    shutil.rmtree(folder, ignore_errors=True)


def newest(checkpoints: Path) -> tuple[Path, Manifest] | None:
    """The newest checkpoint in a run's checkpoints/ whose manifest can be read, and what that says; contents are not looked at.

    Raises:
        OSError: the folder cannot be read.
    """
    for path in reversed(numbered(checkpoints, "update")):
        with suppress(ManifestError):
            return path, read(path)
    return None


def read_json(folder: Path) -> dict[str, Any]:
    """The content of any manifest. Raises ManifestError."""
    path = folder / NAME
    try:
        content = json_text.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise ManifestError(f"{path}: is not whole") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or not _lists_files(content):
        raise ManifestError(f"{path}: is not a manifest of format {FORMAT}")
    return content


def _lists_files(content: Mapping[str, Any]) -> bool:
    """Whether a manifest lists files with their sizes and checksums."""
    files = content.get("files")
    return isinstance(files, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        for entry in files.values()
    )


def write(folder: Path, content: Manifest | Mapping[str, Any]) -> str:
    """Writes a manifest durably, in one step; returns its SHA-256."""
    fields = asdict(content) if isinstance(content, Manifest) else {**content, "format": FORMAT}
    text = json.dumps(fields, indent=1)
    write_atomically(folder / NAME, text)
    flush_folder(folder)
    return hashlib.sha256(text.encode()).hexdigest()


def flush_folder(folder: Path) -> None:
    """Makes the names in a folder durable, where the file system knows how: some (FUSE, CIFS, object stores) flush files alone."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNKNOWN_TO_IT:
            raise
    finally:
        os.close(handle)


def flush_and_describe(path: Path) -> dict[str, Any]:
    """Makes a file's content durable; returns its size and SHA-256."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": digest(path)}


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            total.update(chunk)
    return total.hexdigest()


def faults(folder: Path, files: Files, *, deep: bool = True) -> Iterator[str]:
    """What is wrong with the files of a folder, one line each, by name.

    Args:
        folder: holds the files.
        files: as its manifest lists them.
        deep: whether contents are read, too, and not only sizes.
    """

    def fault(item: tuple[str, dict[str, Any]]) -> str | None:
        name, entry = item
        path = folder / name
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                return f"{path}: has {size:,} of {entry['bytes']:,} bytes"
            if deep and digest(path) != entry["sha256"]:
                return f"{path}: holds other bytes than were written"
        except OSError as error:
            return f"{path}: {'is missing' if isinstance(error, FileNotFoundError) else error.strerror}"
        return None

    with ThreadPoolExecutor(max_workers=8) as pool:
        yield from (found for found in pool.map(fault, files.items()) if found is not None)
