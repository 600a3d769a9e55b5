"""Options that several commands have."""

from __future__ import annotations

import argparse


def add_insisting(parser: argparse.ArgumentParser) -> None:
    """Adds the options by which a user insists on what is otherwise refused."""
    parser.add_argument(
        "--allow-changed", metavar="KEY", action="append", default=[],
        help="resume although this setting, or section, is not what it was; may be given several times",
    )  # fmt: skip
    add_trust(parser)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Adds the option by which a user vouches for whoever wrote a checkpoint."""
    parser.add_argument("--trust", action="store_true", help="unpickle whatever a checkpoint holds, which can run anything")


def insisted(options: argparse.Namespace) -> list[str]:
    """The words of :func:`add_insisting`'s options, to be handed on."""
    return [word for key in options.allow_changed for word in ("--allow-changed", key)] + ["--trust"] * options.trust
