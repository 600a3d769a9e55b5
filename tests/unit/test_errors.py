"""How errors are worded."""

from __future__ import annotations

from relora_ds.errors import ConfigError, nearest


def test_error_messages_are_one_line_whatever_the_value() -> None:
    error = ConfigError("run.dir", "two\nlines", "is\n  odd", "write\none")
    assert str(error) == r"run.dir='two\nlines': is odd; write one"


def test_nearest_names_one_or_all() -> None:
    assert nearest("rnak", ["rank", "alpha"]) == "did you mean 'rank'?"
    assert nearest("zzz", ["rank", "alpha"]) == "valid names: alpha, rank"
