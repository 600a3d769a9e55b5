"""JSON that somebody else wrote, or that was cut off. PURE."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError


def parse(text: str, **how: Any) -> Any:
    """As ``json.loads``, with its keyword arguments.

    Raises:
        ValueError: for whatever is no JSON, and for what nests too deep to be read, of which ``json`` makes another error.
    """
    try:
        return json.loads(text, **how)
    except RecursionError:
        raise ValueError("it nests too deep") from None


def first_fault(error: ValidationError) -> str:
    """The first thing that is wrong with the content of such JSON, in words: its place in it, and what was expected there."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'all'}: {first['msg']}"
