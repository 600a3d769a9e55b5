"""``relora-ds report``: tables and plots of runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from relora_ds.errors import EXIT_DONE, refuse_rest
from relora_ds.paths import path_argument


def add_command(parent: Any) -> None:
    """Adds the command to the parser of ``relora-ds``."""
    report = parent.add_parser("report", help="tables and plots of one run, or of several overlaid")
    report.add_argument("places", metavar="RUN_DIR", type=path_argument, nargs="+")
    report.add_argument("--out", type=path_argument, help="folder to write to (default: the run's folder; report/ for several)")
    report.set_defaults(run=run_report)


def run_report(options: argparse.Namespace, rest: Sequence[str]) -> int:
    refuse_rest(rest)
    from relora_ds.reports.report import report

    print(f"wrote {report(options.places, options.out)}")
    return EXIT_DONE
