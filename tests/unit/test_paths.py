"""Paths as people write them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from relora_ds.environment import expand
from relora_ds.errors import ConfigError
from relora_ds.paths import path_argument, refuse_unwritable

ENVIRONMENT = {"SCRATCH": "/scratch/me", "EMPTY": "", "TILDE": "~/x"}
HOME = str(Path.home())


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("$SCRATCH/a", "/scratch/me/a"),
        ("${SCRATCH}_2/$SCRATCH", "/scratch/me_2//scratch/me"),
        ("~", HOME),
        ("~/a b", f"{HOME}/a b"),
        ("$TILDE", f"{HOME}/x"),
        ("a/~/b", "a/~/b"),
        ("./~", "./~"),
        ("./runs//x/", "./runs//x/"),  # left alone: a hub name, or a pattern
        ("org/name", "org/name"),
        ("cost$.txt", "cost$.txt"),
        ("", ""),
    ],
)
def test_paths_are_filled_in_as_a_shell_does(text: str, path: str) -> None:
    assert expand(text, ENVIRONMENT) == path


@pytest.mark.parametrize(
    ("text", "name"),
    [("$EMPTY/a", "EMPTY"), ("a/${UNSET}", "UNSET"), ("~nobody-of-this-name/a", "write ./~nobody-of-this-name")],
)
def test_what_cannot_be_filled_in_is_named(text: str, name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(name)):
        expand(text, ENVIRONMENT)


def test_the_command_line_tells_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "/here")
    monkeypatch.delenv("UNSET", raising=False)
    assert path_argument("$HERE/a") == Path("/here/a")
    with pytest.raises(argparse.ArgumentTypeError, match="the environment variable UNSET is not set, or empty"):
        path_argument("$UNSET/a")


def test_a_folder_that_cannot_be_written_to_is_refused_by_its_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Asked of the nearest folder that is there; root may write anywhere, so the answer is given."""
    asked: list[Path] = []
    monkeypatch.setattr("relora_ds.paths.os.access", lambda path, mode: bool(asked.append(path)))
    with pytest.raises(
        ConfigError, match=re.escape(f"run.dir='{tmp_path / 'a' / 'b'}': {tmp_path} cannot be written to; name another")
    ):
        refuse_unwritable("run.dir", tmp_path / "a" / "b")
    assert asked == [tmp_path]
    monkeypatch.setattr("relora_ds.paths.os.access", lambda path, mode: True)
    refuse_unwritable("run.dir", tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == [], "it only asks"
