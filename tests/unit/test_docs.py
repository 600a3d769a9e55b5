"""The pages: every key of a recipe with its default, every public name, every file of a run; and links that lead somewhere."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import relora_ds
from relora_ds.config import Config, read_yaml
from relora_ds.optimizer.wrapper import RestartRecord
from relora_ds.run.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *ROOT.glob("*.md"),
    *(page for folder in ("docs", "ds_configs", "benchmarks", "recipes") for page in (ROOT / folder).rglob("*.md")),
]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), target
        if anchor:
            assert anchor in {as_anchor(title) for title in re.findall(r"^#+ (.+)$", there.read_text("utf-8"), re.MULTILINE)}, (
                target
            )


def as_anchor(title: str) -> str:
    """The anchor that a heading gets on GitHub."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_every_file_of_a_run_and_every_figure_of_a_restart() -> None:
    page = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    paths = [value.fget(RunFolder(Path())) for value in vars(RunFolder).values() if isinstance(value, property)]
    assert paths and all(re.search(rf"`{path}\b", page) for path in paths)
    part = page.partition("## restarts.jsonl")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", part, re.MULTILINE)) == {"update", *(f.name for f in dataclasses.fields(RestartRecord))}
