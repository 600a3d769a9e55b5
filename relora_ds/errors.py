"""Errors that users see.

Everything a user can mend by editing a recipe, a command line or a folder is a :class:`ConfigError`: the command line prints it as
one line and exits with code 2, before any process group starts.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

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
        self.problem = problem
        self._parts = (key, value, problem, way_out)
        text = f"{key}={value!r}: {problem}"
        super().__init__(" ".join(f"{text}; {way_out}".split()) if way_out else " ".join(text.split()))

    def within(self, where: str) -> ConfigError:
        """The same, with the place where the setting is: ``arms.lora: relora.rank``."""
        key, value, problem, way_out = self._parts
        return ConfigError(f"{where}: {key}", value, problem, way_out)

    def __reduce__(self) -> tuple[Any, ...]:
        """What rank 0 finds is raised on all ranks: the error travels."""
        return type(self), self._parts


class AllError(ConfigError):
    """What all ranks find, in the words of rank 0, who tells it."""

    def __init__(self, text: str) -> None:
        super().__init__("", None, text)
        self.args = (text,)

    def __reduce__(self) -> tuple[Any, ...]:
        return AllError, self.args


class RankError(ConfigError):
    """What some ranks find and others do not: more likely a fault of their node than of the recipe.

    Args:
        rank, host: the first of them.
        problem: what it finds, in one line.
        more: how many ranks find something besides.
        speaker: the rank that tells the user.
    """

    def __init__(self, rank: int, host: str, problem: str, *, more: int = 0, speaker: int = 0) -> None:
        others = f" (and {more} more)" if more else ""
        super().__init__("rank", rank, problem)
        self.args = (f"rank {rank} on {host}{others}: {' '.join(problem.split())}",)
        self.rank, self.host, self.speaker = rank, host, speaker
        self._made_of = (rank, host, problem, more, speaker)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rank_error, self._made_of


def _rank_error(rank: int, host: str, problem: str, more: int, speaker: int) -> RankError:
    return RankError(rank, host, problem, more=more, speaker=speaker)


class StartError(RuntimeError):
    """The ranks did not come together, or not to their folder, for no fault of a setting: another start may be luckier.

    Args:
        problem: in one line.
        host: the node to blame, where one stands out.
    """

    def __init__(self, problem: str, host: str | None = None) -> None:
        super().__init__(problem)
        self.host = host


class RestartError(RuntimeError):
    """A restart left the ranks with different weights; the message names the layer and the ranks."""


class TrainingError(RuntimeError):
    """Training cannot go on; what is written stays."""


DIVERGED = "diverged: "
"""How the line of a :class:`DivergedError` begins, by which other processes know it."""


class DivergedError(TrainingError):
    """The weights, or the gradients of too many updates in a row, are no numbers: from the same checkpoint it would end so again."""

    def __init__(self, problem: str) -> None:  # on another rank, or read from a pickle, it is made anew of its whole line
        super().__init__(problem if problem.startswith(DIVERGED) else f"{DIVERGED}{problem}")


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint such as ``did you mean 'rank'?``, or the list of valid names when none is near."""
    names = list(valid)
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {matches[0]!r}?" if matches else f"valid names: {', '.join(sorted(names))}"


def refuse_below(key: str, value: float | None, least: float) -> None:
    """Raises ConfigError for a number that was given and is too small, or none at all (NaN)."""
    if value is not None and not value >= least:
        raise ConfigError(key, value, f"must be at least {least:g}")


def refuse_rest(rest: Sequence[str], known: Sequence[str]) -> None:
    """Raises ConfigError for the first of the words that the command line has no place for, with the nearest of ``known``."""
    if rest:
        raise ConfigError(
            rest[0].partition("=")[0],
            rest[0].partition("=")[2] or None,
            "unknown option",
            nearest(rest[0], known),
        )


def with_rest(overrides: Sequence[str], rest: Sequence[str], known: Sequence[str]) -> list[str]:
    """The ``key.sub=value`` words of a command line, those behind its options included, which argparse leaves over.

    Raises:
        ConfigError: one of the rest is an option that the command does not have; with the nearest of ``known``.
    """
    refuse_rest([word for word in rest if word.startswith("-")], known)
    return [*overrides, *rest]
