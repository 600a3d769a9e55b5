"""``relora-ds sweep``: arms of one recipe, each with several seeds, trained and compared."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from relora_ds.cli.options import EXIT_CODES, add_insisting, insisted, new_command
from relora_ds.console import say
from relora_ds.errors import EXIT_DONE, refuse_below, refuse_rest
from relora_ds.paths import path_argument
from relora_ds.sweeps.sweep_file import Sweep, read_sweep

ABOUT = f"""\
The file names a recipe, seeds, and arms: what each replaces in the recipe. Each
run is an ordinary one in DIR/ARM/seed-S. What is done is not trained again, and
what was stopped or killed goes on, so the same command resumes a sweep. A run
that fails does not end the others.

At the end DIR/sweep.md has a row for each arm: means over the seeds and their
spread.

{EXIT_CODES}"""


def add_command(parent: Any) -> None:
    """Adds the command to the parser of ``relora-ds``."""
    sweep = new_command(
        parent, "sweep", run_sweep, "Train variants of a recipe with several seeds, and compare them in a table.", about=ABOUT,
        examples=[
            "relora-ds sweep recipes/sweeps/lora_relora.yaml --dry-run",
            "relora-ds sweep recipes/sweeps/lora_relora.yaml --jobs 2",
            "relora-ds sweep recipes/sweeps/lora_relora.yaml --slurm --nodes 1 --gpus-per-node 8",
        ],
    )  # fmt: skip
    # SWEEP first: whatever stands behind --slurm is not ours
    sweep.usage = "%(prog)s [-h] SWEEP [--jobs N] [--dry-run | --table] [--allow-changed KEY] [--trust] [--slurm OPTION ...]"
    sweep.add_argument("sweep", metavar="SWEEP", type=path_argument, help="The YAML file that says what to train.")
    sweep.add_argument(
        "--jobs", metavar="N", type=int, default=1,
        help="Runs to train at once, which share the cores, and each of which has its own GPUs. Default: %(default)s.",
    )  # fmt: skip
    only = sweep.add_mutually_exclusive_group()
    only.add_argument(
        "--dry-run", action="store_true",
        help="Show what would be trained, and for how long by the runs that are done; write and start nothing.",
    )  # fmt: skip
    only.add_argument("--table", action="store_true", help="Write the table of what is there, and train nothing.")
    add_insisting(sweep)
    sweep.add_argument(
        "--slurm", nargs=argparse.REMAINDER, metavar="OPTION",
        help="Submit each run as a job. All that follows are options of relora-ds slurm submit.",
    )  # fmt: skip


def run_sweep(options: argparse.Namespace, rest: Sequence[str]) -> int:
    refuse_rest(rest, options.known())
    refuse_below("--jobs", options.jobs, 1)
    sweep = read_sweep(options.sweep)
    if options.dry_run:
        _show_outlook(sweep, options.jobs)
        return EXIT_DONE
    code = EXIT_DONE
    if options.slurm is not None:
        from relora_ds.sweeps.submit import submit_all

        return submit_all(sweep, options.slurm, insisted=insisted(options), say=say)
    if not options.table:
        from relora_ds.sweeps.train import train_all

        code = train_all(sweep, jobs=options.jobs, insisted=insisted(options), say=say)
    _show_table(sweep)
    return code


def _show_outlook(sweep: Sweep, jobs: int) -> None:
    from relora_ds.sweeps.events import Events
    from relora_ds.sweeps.outlook import outlook
    from relora_ds.sweeps.runs import standing

    events = Events(sweep.folder)
    for line in outlook(sweep, {run: standing(run, events) for run in sweep.runs}, jobs):
        print(line)


def _show_table(sweep: Sweep) -> None:
    from relora_ds.reports.tables import aligned
    from relora_ds.sweeps.table import write

    page, table = write(sweep)
    print("\n".join(aligned(table)))
    print(f"wrote {page}")
