"""Errors that users see.

Everything a user can mend by editing a recipe, a command line or a folder is a :class:`ConfigError`: the command line prints it as
one line and exits with code 2, before any process group starts.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_CONFIG = 2
EXIT_STOPPED = 75
"""A signal stopped the run and a checkpoint is written: the same command goes on from there (``EX_TEMPFAIL`` of sysexits.h)."""


class ConfigError(ValueError):
    """One setting that cannot be used.

    Args:
        key: the setting as the user writes it, e.g. ``relora.rank`` or ``--nproc``.
        value: what the user gave.
        problem: what is wrong with it.
        way_out: what to write instead.
    """

    def __init__(self, key: str, value: object, problem: str, way_out: str = "") -> None:
        self.key = key
        self.value = value
        self._parts = (key, value, problem, way_out)
        text = f"{key}={value!r}: {problem}"
        super().__init__(" ".join(f"{text}; {way_out}".split()) if way_out else " ".join(text.split()))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str, str]]:
        """What rank 0 finds is raised on all ranks: the error travels."""
        return type(self), self._parts


class RankError(ConfigError):
    """One that this rank finds and others may not, so that it cannot leave it to rank 0 to tell."""


class RestartError(RuntimeError):
    """A restart left the ranks with different weights; the message names the layer and the ranks."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint such as ``did you mean 'rank'?``, or the list of valid names when none is near."""
    names = list(valid)
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {matches[0]!r}?" if matches else f"valid names: {', '.join(sorted(names))}"


def refuse_rest(rest: Sequence[str], known: Sequence[str] = ()) -> None:
    """Raises ConfigError for the first of the words that the command line has no place for, with the nearest of ``known``."""
    if rest:
        raise ConfigError(
            rest[0].partition("=")[0],
            rest[0].partition("=")[2] or None,
            "unknown option",
            nearest(rest[0], known) if known else "",
        )


def with_rest(overrides: Sequence[str], rest: Sequence[str], known: Sequence[str]) -> list[str]:
    """The ``key.sub=value`` words of a command line, those behind its options included, which argparse leaves over.

    Raises:
        ConfigError: one of the rest is an option that the command does not have; with the nearest of ``known``.
    """
    refuse_rest([word for word in rest if word.startswith("-")], known)
    return [*overrides, *rest]
