"""What the commands say while they work."""

from __future__ import annotations

import sys
from contextlib import suppress


def say(text: str) -> None:
    """One line to the user."""
    write(f"[relora-ds] {text}\n")


def write(text: str) -> None:
    """Text to the standard error. Nothing ends by what cannot be written there.

    The log may be on the disk that is full; the terminal may be closed; and where the output goes through ``tee``, Ctrl-C ends that
    first, while the run has a checkpoint to write.
    """
    if sys.stderr is None:  # begun with it closed
        return
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):  # ValueError: closed
        # Begun anew: the old one keeps what it could not write, tries again at the end, and makes 120 of the exit code.
        with suppress(OSError, ValueError):
            number = sys.stderr.fileno()
            sys.stderr = open(number, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
