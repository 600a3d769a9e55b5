"""relora-ds: the command line. Each command parses, checks, and hands over to the module that does the work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from relora_ds.cli import checkpoints, evaluate, export, plan, prepare, report, slurm, traffic, train
from relora_ds.errors import (
    EXIT_BAD_CONFIG,
    EXIT_FAILED,
    ConfigError,
    RankError,
    RestartError,
    StartError,
)
from relora_ds.launch import places
from relora_ds.slurm.client import SlurmError
from relora_ds.version import __version__

if TYPE_CHECKING:  # it imports torch
    pass


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, and with its errors in this project's form: one line, exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        print(f"relora-ds: error: {message} (try {self.prog} --help)", file=sys.stderr)
        raise SystemExit(EXIT_BAD_CONFIG)


def build_parser() -> Parser:
    parser = Parser(prog="relora-ds", description="ReLoRA pre-training on DeepSpeed.")
    parser.add_argument("--version", action="version", version=f"relora-ds {__version__}")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    for command in (prepare, train, evaluate, export, checkpoints, report, traffic, plan):
        command.add_command(commands)
    slurm.add_commands(commands, Parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 done, 2 bad configuration, 75 stopped with a checkpoint written, 1 anything else."""
    options, rest = build_parser().parse_known_args(arguments)
    try:
        return options.run(options, rest)
    except ConfigError as error:
        if not _runs_in_ranks(options) or places.speaks_as(error.speaker if isinstance(error, RankError) else 0):
            print(f"relora-ds: error: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    except StartError as error:
        if places.speaks_as(0):
            print(f"relora-ds: error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except (RestartError, SlurmError) as error:
        print(f"relora-ds: error: {error}", file=sys.stderr)
        return EXIT_FAILED


def _runs_in_ranks(options: argparse.Namespace) -> bool:
    """Whether a launcher starts this command many times. Others speak wherever they are called, also in a shell that has a RANK."""
    return options.command in ("train", "traffic") or getattr(options, "slurm_command", None) == "torchrun"


def entry_point() -> NoReturn:
    command: Callable[[], int] = main
    sys.exit(command())


if __name__ == "__main__":
    entry_point()
