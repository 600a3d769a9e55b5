"""``relora-ds report``: tables and plots of runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from relora_ds.cli.options import new_command
from relora_ds.errors import EXIT_DONE, refuse_rest
from relora_ds.paths import path_argument


def add_command(parent: Any) -> None:
    """Adds the command to the parser of ``relora-ds``."""
    report = new_command(
        parent, "report", run_report, "Write tables and plots of one run, or of several side by side.",
        about="It may be called at any time, also while the run trains. report.html is one file, which can be sent to somebody.",
        examples=["relora-ds report runs/demo", "relora-ds report runs/relora runs/full_rank --out compared"],
    )  # fmt: skip
    report.add_argument(
        "places", metavar="RUN_DIR", type=path_argument, nargs="+", help="The folder of a run (run.dir of its recipe)."
    )
    report.add_argument(
        "--out", metavar="FOLDER", type=path_argument,
        help="The folder to write report.html, report.md and plots/ into. Default: the run's folder; for several runs, report.",
    )  # fmt: skip


def run_report(options: argparse.Namespace, rest: Sequence[str]) -> int:
    refuse_rest(rest, options.known())
    from relora_ds.reports.report import report

    page = report(options.places, options.out)
    print(f"wrote {page} and {page.with_name('report.html')}")
    return EXIT_DONE
