"""How rank 0 waits for what the other ranks write. Saving itself is tried in tests/distributed/test_checkpoint.py."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import NoReturn

import pytest

from relora_ds.checkpoint import writer as saver
from tests.unit.run.test_manifest import no_access


def test_files_are_looked_for_in_the_folders_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by name before they are there, they would stay unseen for a minute on NFS."""

    def by_name(self: Path) -> NoReturn:
        raise AssertionError(self)

    listed: list[Path] = []
    real = Path.iterdir
    parts = [tmp_path / "a", tmp_path / "b"]

    def lists(folder: Path) -> object:
        listed.append(folder)
        found = list(real(folder))
        parts[min(len(listed), 2) - 1].touch()  # after the look
        return iter(found)

    for name in ("is_file", "exists", "stat"):
        monkeypatch.setattr(Path, name, by_name)
    monkeypatch.setattr(Path, "touch", lambda self: open(self, "w").close())
    monkeypatch.setattr(Path, "iterdir", lists)
    assert saver._await(parts, threading.Event())
    assert listed == [tmp_path] * 3


def test_a_folder_that_is_away_for_a_while(tmp_path: Path) -> None:
    folder = tmp_path / "folder"

    def comes() -> None:
        folder.mkdir()
        (folder / "a").touch()

    timer = threading.Timer(0.2, comes)
    timer.start()
    assert saver._await([folder / "a"], threading.Event())
    timer.join()


def test_what_is_not_wanted_any_more_is_not_waited_for(tmp_path: Path) -> None:
    abandoned = threading.Event()
    abandoned.set()
    assert not saver._await([tmp_path / "a"], abandoned)


def test_pieces_on_a_disk_that_fails_are_left(tmp_path: Path) -> None:
    """Whether the checkpoint is complete cannot be seen, and the run goes on."""
    target = tmp_path / "run" / "update_0000004"
    target.mkdir(parents=True)
    waiting = object.__new__(saver.Saver)
    job = saver._Job(target, {}, None, {}, {}, None)  # type: ignore[arg-type]
    with no_access(tmp_path / "run"):
        waiting._remove_pieces(job)
    assert target.is_dir()
    waiting._remove_pieces(job)
    assert not target.exists()
