"""Submits the runs of a sweep to SLURM, each as a job of its own, by ``relora-ds slurm submit``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence

from relora_ds.environment import process_environment
from relora_ds.errors import EXIT_DONE, EXIT_FAILED
from relora_ds.sweeps.events import Events
from relora_ds.sweeps.runs import refuse_longer, standing
from relora_ds.sweeps.sweep_file import Sweep


def submit_all(sweep: Sweep, options: Sequence[str], *, insisted: Sequence[str], say: Callable[[str], None]) -> int:
    """Submits what is neither done, nor queued, nor running; returns the exit code: failed where one was refused.

    Args:
        sweep: its runs.
        options: of ``relora-ds slurm submit``, for all of them.
        insisted: more words for it.
        say: tells the user.

    Raises:
        ConfigError: a run has more updates than the sweep's file asks for; nothing was submitted.
    """
    events, refused = Events(sweep.folder), 0
    standings = {run: standing(run, events) for run in sweep.runs}
    for run, at in standings.items():
        if not at.is_settled:
            refuse_longer(run)
    for run, at in standings.items():
        if at.is_settled:
            say(f"{run.name} is {at.state}")
            continue
        name = f"{sweep.folder.name}.{run.arm.replace('/', '.')}.{run.seed}"
        # the name first: options given by the user stand over it
        words = ["slurm", "submit", str(run.recipe), *run.words, f"--job-name={name}", *options, *insisted]
        # A process of its own, as if it was typed: what libraries add to this one's environment must not reach the job.
        done = subprocess.run([sys.executable, "-m", "relora_ds", *words], env=process_environment(), check=False)
        if done.returncode != EXIT_DONE:
            say(f"{run.name} is not submitted")
            refused += 1
    return EXIT_FAILED if refused else EXIT_DONE
