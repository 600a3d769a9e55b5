"""A run that is not there yet, and a folder with one that was trained."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from relora_ds.config import Config, parse
from relora_ds.run.folder import RunFolder
from tests.conftest import tiny_settings


@pytest.fixture
def config(settings: dict[str, Any]) -> Config:
    return parse(settings)


@pytest.fixture
def run(config: Config) -> RunFolder:
    return RunFolder(Path(config.run.dir))


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory, token_folder: Path) -> Path:
    """A folder with all that a command may read: recipe.yaml, its tokens, their text, and run/, of three updates and a restart."""
    place = tmp_path_factory.mktemp("good")
    shutil.copytree(token_folder, place / "tokens")
    shutil.copyfile(token_folder.parent / "text.jsonl", place / "text.jsonl")
    content = tiny_settings(Path("run"), Path("tokens"))
    content["relora"] |= {"restart_every": 3, "restart_warmup": 1}
    content["train"] |= {"updates": 4, "checkpoint_every": 2}
    content["optimizer"] |= {"warmup": 1}
    content["wandb"] = {"mode": "disabled"}
    (place / "recipe.yaml").write_text(yaml.safe_dump(content))
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "relora_ds", "train", "recipe.yaml", "--nproc", "1"]
    subprocess.run(command, cwd=place, env=environment, check=True, timeout=300, capture_output=True)
    for newer in ("checkpoints/update_0000004", "base/restart_0001"):
        shutil.rmtree(place / "run" / newer)  # what is left has one checkpoint, so that spoiling it leaves none
    return place


@pytest.fixture
def place(tmp_path: Path, good: Path) -> Path:
    """A copy of :func:`good` that may be spoilt."""
    shutil.copytree(good, tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    return tmp_path / "home"
