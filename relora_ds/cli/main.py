"""relora-ds: the command line. Each command parses, checks, and hands over to the module that does the work."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from relora_ds.cli import checkpoints, evaluate, export, plan, prepare, report, slurm, spectrum, sweep, traffic, train
from relora_ds.cli.options import EXIT_CODES, Parser
from relora_ds.console import write
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

EPILOG = f"""\
relora-ds COMMAND --help explains a command, with its options and examples.

{EXIT_CODES}

Examples:
  relora-ds prepare recipes/corpus/english.jsonl.gz data/demo --vocab-size 1024
  relora-ds train recipes/demo.yaml --nproc 2
  relora-ds report runs/demo"""


def build_parser() -> Parser:
    """The parser of the command line. The batch scripts' own commands are in it, too, but not in its help."""
    parser = Parser(prog="relora-ds", description="Pre-train language models by ReLoRA on DeepSpeed.", epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"relora-ds {__version__}", help="Show the version and exit.")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    for command in (prepare, train, sweep, evaluate, export, checkpoints, report, spectrum, traffic, plan):
        command.add_command(commands)
    slurm.add_commands(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 done, 2 bad configuration, 75 stopped with a checkpoint written, 1 anything else."""
    options, rest = build_parser().parse_known_args(arguments)
    try:
        return options.run(options, rest)
    except ConfigError as error:
        if not _runs_in_ranks(options) or places.speaks_as(error.speaker if isinstance(error, RankError) else 0):
            write(f"relora-ds: error: {error}\n")
        return EXIT_BAD_CONFIG
    except StartError as error:
        if places.speaks_as(0):
            write(f"relora-ds: error: {error}\n")
        return EXIT_FAILED
    except (RestartError, SlurmError) as error:
        write(f"relora-ds: error: {error}\n")
        return EXIT_FAILED
    except OSError as error:
        if _runs_in_ranks(options) or error.errno is None or isinstance(error, BrokenPipeError):
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        write(f"relora-ds: error: {where}{error.strerror}\n")
        return EXIT_FAILED


def _runs_in_ranks(options: argparse.Namespace) -> bool:
    """Whether a launcher starts this command many times. Others speak wherever they are called, also in a shell that has a RANK."""
    return options.command in ("train", "traffic") or getattr(options, "slurm_command", None) == "torchrun"


def entry_point() -> NoReturn:
    command: Callable[[], int] = main
    code = EXIT_FAILED
    try:
        try:
            code = command()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _is_unread(sys.stdout.fileno()):
            raise  # of another pipe, or of a connection
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
    sys.exit(code)


def _is_unread(pipe: int) -> bool:
    """Whether nobody reads a pipe any more: head ends when it has seen enough."""
    poll = select.poll()
    poll.register(pipe, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


if __name__ == "__main__":
    entry_point()
