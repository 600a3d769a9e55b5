"""Paths as people write them: with ``~`` and ``$VAR``, wherever one is read."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from relora_ds.environment import expand
from relora_ds.errors import ConfigError


def filled(path: str) -> str:
    """:func:`relora_ds.launch.process_group.expand`, for what can be a path at all. Raises ValueError."""
    if not path or "\0" in path:
        raise ValueError("holds a NUL character, which no path can" if path else "is empty; name a file or a folder")
    return expand(path)


LocalPath = Annotated[str, AfterValidator(filled)]
"""A setting that names a file or a folder, or may name one: it holds what ``~`` and ``$VAR`` stand for."""


def text_argument(text: str) -> str:
    """A path on the command line, for argparse, which names the argument in its error."""
    try:
        return filled(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path_argument(text: str) -> Path:
    """The same as a ``Path``."""
    return Path(text_argument(text))


def refuse_unwritable(key: str, folder: Path) -> None:
    """Raises ConfigError where a folder cannot be written to, or cannot be made: told before hours of work, not after."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists() or place.is_symlink())
    if not there.is_dir():
        raise ConfigError(key, str(folder), f"{there.name} is not a folder", "name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(key, str(folder), f"{there} cannot be written to", "name another folder")


def make_folder(key: str, folder: Path) -> None:
    """Makes a folder with all that it is in, where it is not there. Raises ConfigError."""
    refuse_unwritable(key, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(key, str(folder), f"cannot be made: {error.strerror}", "name another folder") from None
