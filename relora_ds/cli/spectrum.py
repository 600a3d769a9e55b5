"""``relora-ds spectrum``: the singular values of what training changed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from relora_ds.cli.options import add_trust, new_command
from relora_ds.errors import EXIT_DONE, refuse_below, refuse_rest
from relora_ds.launch import libraries
from relora_ds.paths import path_argument


def add_command(parent: Any) -> None:
    """Adds the command to the parser of ``relora-ds``."""
    command = new_command(
        parent, "spectrum", run_spectrum, "Write the singular values of what training changed in each layer.",
        about="""\
The change is that of W + s*B*A from the start of the LoRA phase to a checkpoint.
The start is there while base/restart_0000 is: a recipe with
train.keep_first_base=true keeps it. Full-rank runs need --from.""",
        examples=[
            "relora-ds spectrum runs/demo",
            "relora-ds spectrum runs/demo --all",
            "relora-ds spectrum runs/relora runs/lora runs/full --from 5000 --to 20000 --out spectra",
        ],
    )  # fmt: skip
    command.add_argument(
        "places", metavar="RUN_DIR", type=path_argument, nargs="+", help="The folder of a run (run.dir of its recipe)."
    )
    command.add_argument(
        "--from", dest="before", metavar="UPDATE", type=int,
        help="The checkpoint from which on the change is measured. Default: the start of the LoRA phase.",
    )  # fmt: skip
    command.add_argument(
        "--to", "--update", dest="now", metavar="UPDATE", type=int,
        help="The checkpoint until which it is measured. Default: the newest one that is complete.",
    )  # fmt: skip
    command.add_argument(
        "--all", action="store_true", help="Measure the checkpoints between the two as well, and draw the ranks."
    )
    command.add_argument(
        "--exact-side", metavar="N", type=int,
        help="Compute all values of matrices whose smaller side is at most N, and the largest of others. Default: 2048.",
    )  # fmt: skip
    command.add_argument(
        "--out", metavar="FOLDER", type=path_argument,
        help="The folder to write spectrum.html, spectrum.md, spectrum.csv and plots/ into. "
        "Default: the run's folder; for several runs, spectrum.",
    )  # fmt: skip
    add_trust(command)


def run_spectrum(options: argparse.Namespace, rest: Sequence[str]) -> int:
    refuse_rest(rest, options.known())
    refuse_below("--exact-side", options.exact_side, 1)
    libraries.quiet_libraries()
    from relora_ds.spectra.pages import spectrum
    from relora_ds.spectra.spectrum import EXACT_SIDE

    written = spectrum(
        options.places, options.out, before=options.before, now=options.now, every=options.all,
        exact_side=options.exact_side or EXACT_SIDE, trust=options.trust,
    )  # fmt: skip
    print(f"wrote {written} and {written.with_name('spectrum.html')}")
    return EXIT_DONE
