"""docs/configuration.md lists every key with its default, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from relora_ds.config import Config, read_yaml

ROOT = Path(__file__).resolve().parents[2]


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + (field.alias or name), field.default


def test_every_key_with_its_default() -> None:
    rows = re.findall(r"^\| `([a-z_.]+)` \| (?:`(.*?)`)? ?\|", (ROOT / "docs" / "configuration.md").read_text(), re.MULTILINE)
    documented = {key: read_yaml(default, key) if default else PydanticUndefined for key, default in rows}
    assert documented == dict(keys(Config))
