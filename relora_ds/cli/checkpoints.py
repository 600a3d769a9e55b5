"""``relora-ds checkpoints``: what a run has, what each needs, and whether it is whole."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from relora_ds.cli.options import new_command
from relora_ds.errors import EXIT_DONE, EXIT_FAILED, refuse_rest
from relora_ds.launch import libraries
from relora_ds.paths import path_argument


def add_command(parent: Any) -> None:
    """Adds the command to the parser of ``relora-ds``."""
    listing = new_command(
        parent, "checkpoints", run_checkpoints, "List a run's checkpoints, their sizes, and the files that each needs.",
        about="A checkpoint that is incomplete or damaged is named, and the exit code is 1.",
        examples=["relora-ds checkpoints runs/demo", "relora-ds checkpoints runs/demo --verify"],
    )  # fmt: skip
    listing.add_argument("place", metavar="RUN_DIR", type=path_argument, help="The folder of the run (run.dir of its recipe).")
    listing.add_argument("--verify", action="store_true", help="Read every file and compare it with its checksum.")


def run_checkpoints(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Prints the table; exit code 1 when something is damaged."""
    refuse_rest(rest, options.known())
    libraries.quiet_libraries()
    from relora_ds.checkpoint.listing import listing
    from relora_ds.run.folder import RunFolder

    lines, is_whole = listing(RunFolder(options.place), deep=options.verify)
    print("\n".join(lines))
    return EXIT_DONE if is_whole else EXIT_FAILED
