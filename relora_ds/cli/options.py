"""What all commands share: the parser, how a command is added to it, and the options that several have.

Help texts are full sentences that need no other page. An option with a default names it in a last sentence of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from relora_ds.errors import EXIT_BAD_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from relora_ds.paths import text_argument

EXIT_CODES = f"""\
Exit codes:
  {EXIT_DONE:>2}  done
  {EXIT_FAILED:>2}  failed (torchrun and deepspeed make 1 of the codes below, too)
  {EXIT_BAD_CONFIG:>2}  a setting is wrong: one line says which, before any process starts
  {EXIT_STOPPED:>2}  stopped by a signal, with a checkpoint written: run the same command
      again to resume"""

CHECKPOINT_HELP = "The folder of a run, whose newest checkpoint is taken, or of one checkpoint."


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with texts as they are written, and with errors in one line and exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        usual = {"allow_abbrev": False, "add_help": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(*args, **{**usual, **kwargs})
        self.add_argument("-h", "--help", action="help", help="Show this help and exit.")
        self.set_defaults(known=self.names)

    def names(self) -> list[str]:
        """Of the options that a user may give, for the error on one that there is not."""
        return [name for name in self._option_string_actions if name.startswith("--")]

    def error(self, message: str) -> NoReturn:
        if message.startswith("argument COMMAND: "):  # the help lists them, without those that scripts alone call
            message = message.partition(" (choose from ")[0]
        print(f"relora-ds: error: {message} (try {self.prog} --help)", file=sys.stderr)
        raise SystemExit(EXIT_BAD_CONFIG)


def new_command(
    parent: Any, name: str, run: Callable[..., int], summary: str, *, about: str = "", examples: Sequence[str]
) -> Parser:
    """Adds a command that users call.

    Args:
        parent: the subparsers of ``relora-ds``, or of one of its commands.
        name: of the command.
        run: what it calls, with the options and the words left over.
        summary: a sentence, for the list of commands and the head of the command's own help.
        about: what follows it there.
        examples: command lines, for the end of it.
    """
    parser: Parser = parent.add_parser(
        name,
        help=summary,
        description="\n\n".join(filter(None, [summary, about])),
        epilog="\n".join(["Examples:", *(f"  {line}" for line in examples)]),
    )
    parser.set_defaults(run=run)
    return parser


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Adds the recipe, and the settings of it that are replaced."""
    parser.add_argument("recipe", metavar="RECIPE", type=text_argument, help="The YAML file that says what to train.")
    parser.add_argument(
        "overrides", metavar="key.sub=value", nargs="*", help="Settings of the recipe to replace, e.g. optimizer.lr=5e-4."
    )


def add_insisting(parser: argparse.ArgumentParser) -> None:
    """Adds the options by which a user insists on what is otherwise refused."""
    parser.add_argument(
        "--allow-changed", metavar="KEY", action="append", default=[],
        help="Resume although this setting, or section, is not what the run was started with. May be given several times.",
    )  # fmt: skip
    add_trust(parser)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Adds the option by which a user vouches for whoever wrote a checkpoint."""
    parser.add_argument(
        "--trust", action="store_true",
        help="Open checkpoints that hold more than tensors, numbers and text. "
        "That can run any code: use it only for files of people whom you trust.",
    )  # fmt: skip


def insisted(options: argparse.Namespace) -> list[str]:
    """The words of :func:`add_insisting`'s options, to be handed on."""
    return [word for key in options.allow_changed for word in ("--allow-changed", key)] + ["--trust"] * options.trust
