"""A run with two restarts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.reports.run_folders import relora_records, restart, write_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "relora", relora_records(), [restart(1, 100), restart(2, 150)])
