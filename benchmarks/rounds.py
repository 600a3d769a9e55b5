"""Ways of doing one thing, timed in turns, and the record of it in Markdown and JSON.

A round does every way once, so that whatever else the machine does meets all alike. Ways are compared within each round: how many
times as fast as another one a way is, is the median over the rounds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from relora_ds.reports import tables

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("torch", "deepspeed", "transformers", "peft", "triton")


@dataclass(frozen=True)
class Spread:
    """The least of some values, their quartiles, and the most."""

    least: float
    lower: float
    median: float
    upper: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(*values * 5)
        return cls(min(values), *statistics.quantiles(values, n=4, method="inclusive"), max(values))


@dataclass(frozen=True)
class Times:
    """seconds: of each way, by round. returned: by each call of a way, those of the warm-up first."""

    seconds: dict[str, list[float]]
    returned: dict[str, list[Any]]

    def as_fast(self, way: str, other: str) -> Spread:
        """How many times as fast a way is as another, over the rounds."""
        return Spread.of([theirs / own for own, theirs in zip(self.seconds[way], self.seconds[other], strict=True)])


def in_turns(
    ways: Mapping[str, Callable[[int], Any]],
    rounds: int,
    *,
    warm_up: int = 1,
    settle: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Does every way once in each round.

    Args:
        ways: by name; each is given the number of the round, from 0, so that all can work on the same data.
        rounds: timed ones. warm_up: others before them, which are numbered as well.
        settle: called before the clock is read: waits for what is still under way, on a device or on other ranks.
        clock: in seconds.
    """
    times = Times({name: [] for name in ways}, {name: [] for name in ways})
    for number in range(warm_up + rounds):
        for name, way in ways.items():
            settle()
            started = clock()
            times.returned[name].append(way(number))
            settle()
            if number >= warm_up:
                times.seconds[name].append(clock() - started)
    return times


def most_bytes(work: Callable[[], Any], *, on_cuda: bool = False) -> int:
    """The most bytes of tensors at one time while ``work`` is done, beside those that were there before.

    A buffer counts as large as it is asked for, also where it is never filled.
    """
    if on_cuda:
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    from tests.memory import PeakMemory

    with PeakMemory() as memory:
        work()
    return memory.peak


def machine() -> dict[str, Any]:
    """What figures were taken on, with which versions and at which commit; None for what is not known or not there."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {_cpu()}",
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        **{name: _version(name) for name in VERSIONS},
    }


def told(about: Mapping[str, Any]) -> str:
    """:func:`machine` in a line."""
    versions = ", ".join(f"{name} {about[name]}" for name in VERSIONS if about[name])
    cuda = f"CUDA {about['cuda']}, " if about["cuda"] else ""
    return (
        f"{about['device']}, threads of a process: {about['threads']}, {cuda}Python {about['python']}, {versions}; "
        f"commit {about['commit'] or 'unknown'}, {about['date']} UTC."
    )


@dataclass
class Record:
    """What a command measured.

    Args:
        times: of the ways, which returned what JSON can hold.
        beside: the ways that all others are compared with.
        facts: further cells of each way, by heading.
        further: tables behind the first, rows of cells that are text.
        notes: sentences behind the tables.
        command: as it was given. machine: see :func:`machine`.
    """

    times: Times
    beside: Sequence[str]
    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    further: list[list[list[str]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    command: str = field(default_factory=lambda: _command())
    machine: dict[str, Any] = field(default_factory=machine)

    def content(self) -> dict[str, Any]:
        """For JSON."""
        ways = {
            name: {
                "seconds": seconds,
                **asdict(Spread.of(seconds)),
                "as_fast": {other: asdict(self.times.as_fast(name, other)) for other in self.beside},
                "returned": self.times.returned[name],
                **self.facts.get(name, {}),
            }
            for name, seconds in self.times.seconds.items()
        }
        return {"command": self.command, "machine": self.machine, "ways": ways, "tables": self.further, "notes": self.notes}

    def table(self) -> list[list[str]]:
        """A row for each way."""
        headings = list(dict.fromkeys(heading for facts in self.facts.values() for heading in facts))
        rows = [["way", "s: least", "quartiles", "most", *(f"times as fast as {other}" for other in self.beside), *headings]]
        for name, seconds in self.times.seconds.items():
            found, own = Spread.of(seconds), self.facts.get(name, {})
            fast = [self.times.as_fast(name, other) for other in self.beside]
            rows.append(
                [
                    name, f"{found.least:.4f}", f"{found.lower:.4f}, {found.median:.4f}, {found.upper:.4f}", f"{found.most:.4f}",
                    *(f"{one.median:.2f} ({one.lower:.2f} to {one.upper:.2f})" for one in fast),
                    *(own.get(heading, "") for heading in headings),
                ]
            )  # fmt: skip
        return rows

    def markdown(self) -> str:
        return markdown(self.command, self.machine, [self.table(), *self.further], self.notes)

    def write(self, options: argparse.Namespace) -> None:
        """See :func:`publish`."""
        publish(options, self.content(), self.markdown())


def markdown(command: str, about: Mapping[str, Any], found: Sequence[Sequence[Sequence[str]]], notes: Sequence[str] = ()) -> str:
    """A command, the machine that it ran on, tables and notes."""
    lines = [f"    {command}", "", told(about)]
    for table in found:
        lines += ["", *tables.markdown(table)]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]).rstrip() + "\n"


def write(options: argparse.Namespace, content: Mapping[str, Any], found: Sequence[Sequence[Sequence[str]]]) -> None:
    """What is no :class:`Record`: ``content`` for JSON and tables for Markdown, each with the command and the machine."""
    command, about = _command(), machine()
    publish(options, {"command": command, "machine": about, **content}, markdown(command, about, found))


def publish(options: argparse.Namespace, content: Mapping[str, Any], text: str) -> None:
    """Prints the Markdown, and writes the files that were asked for."""
    print(f"\n{text}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")


def add_options(parser: argparse.ArgumentParser, **sizes: int) -> None:
    """``--rounds``, ``--warm-up``, ``--json``, ``--markdown``, and an option for each of ``sizes``, with its default."""
    for name, default in {**sizes, "rounds": 5, "warm_up": 2}.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=positive, default=default, metavar="N", help=f"default: {default}"
        )
    add_files(parser)


def add_files(parser: argparse.ArgumentParser) -> None:
    """``--json`` and ``--markdown``, as :func:`publish` takes them."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="every figure")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="what is printed as well")


def positive(text: str) -> int:
    """An integer from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def _command() -> str:
    module = getattr(sys.modules["__main__"].__spec__, "name", None)
    words = ["-m", module] if module else [sys.argv[0]]
    return shlex.join(["python", *words, *sys.argv[1:]])


def _commit() -> str | None:
    """With "-dirty" behind it where files differ from it; None outside of a repository."""
    words = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return said.stdout.strip() or None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
