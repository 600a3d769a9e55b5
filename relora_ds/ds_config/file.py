"""DeepSpeed's JSON as it is written. PURE, and without torch: a login node may be too small for that."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from relora_ds.errors import ConfigError
from relora_ds.text import json_text

COMMENTS = re.compile(r'("(?:\\.|[^"\\])*")|//[^\n]*|#[^\n]*|/\*.*?\*/', re.DOTALL)
"""Strings, which may look like comments within, and the comments that DeepSpeed allows in its files."""


def read(source: str | Path | Mapping[str, Any], *near: Path) -> dict[str, Any]:
    """DeepSpeed's configuration as a dictionary of its own.

    Args:
        source: its content, or the path of the JSON file; a relative path is looked for in the current folder, then in ``near``.

    Raises:
        ConfigError: no such file, or not a JSON object.
    """
    if isinstance(source, Mapping):
        return deepcopy(dict(source))
    path = next((place for place in (Path(source), *(folder / source for folder in near)) if place.is_file()), None)
    if path is None:
        raise ConfigError("deepspeed", str(source), "no such file", "name a DeepSpeed JSON file, e.g. ds_configs/zero2_bf16.json")
    try:
        text = COMMENTS.sub(lambda found: found[1] or "\n" * found[0].count("\n"), path.read_text(encoding="utf-8-sig"))
        content = json_text.parse(text, object_pairs_hook=_without_twins)
    except ValueError as error:
        raise ConfigError("deepspeed", str(path), f"is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError("deepspeed", str(path), "does not hold a JSON object")
    return content


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError where a key is given twice, of which json would drop the first."""
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{twice!r} is given twice in one object")
    return dict(pairs)
