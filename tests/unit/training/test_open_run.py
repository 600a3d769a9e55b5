"""The run's folder at the start, on a disk that is full or fails."""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
from transformers import LlamaConfig

from relora_ds.errors import ConfigError, StartError
from relora_ds.run.folder import RunFolder
from relora_ds.training import open_run
from tests.unit.test_config import judge


def fill(disk: Path) -> None:
    with suppress(OSError), open(disk / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


def test_a_full_disk_leaves_the_architecture_that_was_there(small_disk: Path) -> None:
    folder = RunFolder(small_disk)
    folder.model.mkdir()
    open_run._write_architecture(LlamaConfig(hidden_size=64), folder)
    fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        open_run._write_architecture(LlamaConfig(hidden_size=32), folder)
    assert json.loads((folder.model / "config.json").read_text())["hidden_size"] == 64
    assert [path.name for path in folder.model.iterdir() if not path.name.startswith(".")] == ["config.json"]


def test_a_start_puts_the_architecture_in_the_place_of_the_old(recipe: Path, tmp_path: Path) -> None:
    checked, folder = judge(recipe), RunFolder(tmp_path / "run")
    open_run._write(checked, folder, is_new=True)
    with open(folder.model / "config.json", encoding="utf-8") as old:
        open_run._write(checked, folder, is_new=False)
        assert os.fstat(old.fileno()).st_nlink == 0 and json.load(old)["model_type"] == "llama"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOTDIR])
def test_a_folder_that_may_not_be_written_is_a_wrong_setting(code: int, tmp_path: Path) -> None:
    found = open_run._explained(OSError(code, os.strerror(code)), RunFolder(tmp_path))
    assert isinstance(found, ConfigError) and f"{os.strerror(code)}; name a folder that can be written" in str(found)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_is_not(code: int, tmp_path: Path) -> None:
    """In a SLURM job a wrong setting is the end; this is worth another start."""
    found = open_run._explained(OSError(code, os.strerror(code)), RunFolder(tmp_path))
    assert isinstance(found, StartError) and str(found) == f"run.dir={str(tmp_path)!r}: {os.strerror(code)}"
