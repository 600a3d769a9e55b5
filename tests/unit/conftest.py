"""A run that is not there yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from relora_ds.config import Config, parse
from relora_ds.run.folder import RunFolder


@pytest.fixture
def config(settings: dict[str, Any]) -> Config:
    return parse(settings)


@pytest.fixture
def run(config: Config) -> RunFolder:
    return RunFolder(Path(config.run.dir))
