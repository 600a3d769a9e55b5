"""torchrun's agent of one node, as a task of srun: the ranks hear what SLURM says, and the agent does not.

SLURM signals its tasks, not what they start. torchrun hands no warning on, and upon TERM it gives its ranks 30 seconds, whatever
grace the partition has. So the task is this process, torchrun its child, and the ranks, torchrun's children, are signalled from here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from relora_ds.environment import process_environment
from relora_ds.launch import launcher

HANDLED = "SIGHUP,SIGQUIT"
"""What torchrun may go on handling: a signal that it does not handle, it ignores as it was told to by whoever started it."""


def run_agent(arguments: Sequence[str], stop_signal: str) -> int:
    """Runs torchrun to its end; returns its exit code. The stop signal, SIGTERM and SIGINT reach its ranks as the stop signal.

    Args:
        arguments: torchrun's.
        stop_signal: the name of what the ranks stop upon, without SIG.
    """
    stop = signal.Signals[f"SIG{stop_signal}"]
    heard = {stop, signal.SIGTERM, signal.SIGINT}
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in heard}  # so the child begins deaf to them
    try:
        environment = {**process_environment(), "PET_SIGNALS_TO_HANDLE": HANDLED}
        command = launcher.tied([sys.executable, "-m", "torch.distributed.run", *arguments])
        # a session of its own: some sites' SLURM signals all of a task's group
        agent = subprocess.Popen(command, env=environment, start_new_session=True)

        def pass_on(_number: int, _frame: Any) -> None:
            for rank in children(agent.pid):
                with suppress(ProcessLookupError):
                    os.kill(rank, stop)

        for number in heard:
            signal.signal(number, pass_on)
        code = agent.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def children(parent: int) -> Iterator[int]:
    """The processes that ``parent`` started and that are still there."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(fields[1]) == parent:
                yield int(path.parent.name)
