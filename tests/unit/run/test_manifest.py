"""What makes a folder durable, on file systems that do not all know how; which folders are a run's own."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from relora_ds.run import manifest


def refuse(code: int) -> object:
    def fsync(_: int) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return fsync


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_a_file_system_that_flushes_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(os, "fsync", refuse(code))
    manifest.flush_folder(tmp_path)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(os, "fsync", refuse(code))
    with pytest.raises(OSError, match=os.strerror(code)):
        manifest.flush_folder(tmp_path)


@contextmanager
def no_access(folder: Path) -> Iterator[None]:
    """As another user, where this one is root, who may read everything."""
    folder.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o700)


def test_numbered_folders_in_their_order(tmp_path: Path) -> None:
    """By number, also where a name has outgrown its zeros; what users put beside them is none of them."""
    for name in (
        "update_9999999",
        "update_10000000",
        "update_0000400",
        "update_0000400_copy",
        "damaged_update_0000500",
        "update_",
    ):
        (tmp_path / name).mkdir()
    assert [path.name for path in manifest.numbered(tmp_path, "update")] == [
        "update_0000400",
        "update_9999999",
        "update_10000000",
    ]
    assert manifest.numbered(tmp_path / "nowhere", "update") == []


def test_what_cannot_be_read_is_not_taken_for_empty(tmp_path: Path) -> None:
    with no_access(tmp_path), pytest.raises(PermissionError):
        manifest.numbered(tmp_path, "update")


def test_of_a_link_the_link_alone_goes(tmp_path: Path) -> None:
    mine, other = tmp_path / "update_0000002", tmp_path / "archive"
    other.mkdir()
    manifest.write(other, {"files": {}})
    mine.symlink_to(other)
    manifest.remove(mine)
    assert not mine.is_symlink() and manifest.read_json(other)["files"] == {}
