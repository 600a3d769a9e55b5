"""Paths as people write them: with ``~`` and ``$VAR``, wherever one is read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from relora_ds.environment import expand

LocalPath = Annotated[str, AfterValidator(expand)]
"""A setting that names a file or a folder, or may name one: it holds what ``~`` and ``$VAR`` stand for."""


def text_argument(text: str) -> str:
    """A path on the command line, for argparse, which names the argument in its error."""
    try:
        return expand(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path_argument(text: str) -> Path:
    """The same as a ``Path``."""
    return Path(text_argument(text))
