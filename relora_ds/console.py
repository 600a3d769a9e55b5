"""What the commands say while they work."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """One line to the user."""
    print(f"[relora-ds] {text}", file=sys.stderr, flush=True)
