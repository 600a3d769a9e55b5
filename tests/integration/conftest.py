"""A run that nothing happened to, and a folder for the recipes and runs of each test."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.command_line import relora, write_recipe


@pytest.fixture
def recipe(token_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """:func:`tests.command_line.write_recipe` into this test's own folder."""
    return partial(write_recipe, tmp_path, token_folder)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, token_folder: Path) -> Path:
    """The folder of an uninterrupted run with two processes."""
    folder = tmp_path_factory.mktemp("whole")
    path = write_recipe(folder, token_folder, "run")
    done = relora("train", path, "--nproc", 2, TORCH_EXTENSIONS_DIR=str(folder / "extensions"))
    (folder / "told").write_text(done.stderr)
    return folder / "run"
