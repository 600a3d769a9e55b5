"""JSON that somebody else wrote, or that was cut off. PURE."""

from __future__ import annotations

import json
from typing import Any


def parse(text: str, **how: Any) -> Any:
    """As ``json.loads``, with its keyword arguments.

    Raises:
        ValueError: for whatever is no JSON, and for what nests too deep to be read, of which ``json`` makes another error.
    """
    try:
        return json.loads(text, **how)
    except RecursionError:
        raise ValueError("it nests too deep") from None
