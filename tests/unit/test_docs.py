"""docs/configuration.md lists every key with its default, and no other; docs/scripts.md every public name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import relora_ds
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


def test_every_public_name() -> None:
    page = (ROOT / "docs" / "scripts.md").read_text().partition("## All public names")[2]
    assert set(re.findall(r"`relora_ds\.(\w+)`", page)) == set(relora_ds.__all__)
    assert all(getattr(relora_ds, name) is not None for name in relora_ds.__all__)
