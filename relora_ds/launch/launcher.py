"""Our own launcher: the ranks of one machine, started, told of signals, and ended together."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relora_ds.comm import network
from relora_ds.console import say
from relora_ds.errors import ConfigError
from relora_ds.launch import cores
from relora_ds.launch.places import Place
from relora_ds.supervision import stop

GRACE_S = 20.0
"""How long the other processes of a node may take to end after one of them failed, before they are killed."""
ORDERLY = (2, 75)
"""Exit codes with which all ranks end by themselves, together: a bad setting, a signal."""


def default_num_processes() -> int:
    """One process per GPU, or one where there is none."""
    import torch

    return max(1, torch.cuda.device_count())


def check_nproc(nproc: int | None, place: Place | None) -> None:
    """Raises ConfigError for a ``--nproc`` that cannot be, and where a launcher has decided it already."""
    if nproc is not None and place is not None:
        raise ConfigError("--nproc", nproc, f"this process was started by {place.launcher}, which sets the number of processes")
    if nproc is not None and nproc < 1:
        raise ConfigError("--nproc", nproc, "must be at least 1")


def check_devices(num_processes: int) -> None:
    """Raises ConfigError when this machine has GPUs, but fewer than processes."""
    import torch

    if torch.cuda.is_available() and num_processes > torch.cuda.device_count():
        raise ConfigError(
            "--nproc", num_processes, f"this machine has {torch.cuda.device_count()} GPU(s)", "one process drives one GPU"
        )


def tied(command: Sequence[str]) -> list[str]:
    """The command so that it is killed when the thread that starts it ends, even by SIGKILL; its process id stays the one started."""
    return [sys.executable, "-I", "-S", str(Path(__file__).with_name("tie.py")), str(os.getpid()), *command]


def spawn(arguments: Sequence[str], num_processes: int, stop_signal: str = "USR2", module: str = "relora_ds") -> int:
    """Runs ``python -m MODULE ARGUMENTS`` in ``num_processes`` processes on this machine; returns the job's exit code.

    What asks a run to stop is passed on as SIGTERM (from the main thread: no other hears it), so that the run can write its
    checkpoint. When one process fails, the others are stopped. When this one dies, however it does, all die at once.
    """
    port, num_cores = network.free_port(), cores.usable()
    processes: list[subprocess.Popen[Any]] = []

    def pass_on(_number: int, _frame: Any) -> None:
        for process in processes:
            if process.poll() is None:
                process.terminate()  # whatever came: the ranks hear this one alike

    heard = stop.signals(stop_signal) if threading.current_thread() is threading.main_thread() else set()
    previous = {number: signal.signal(number, pass_on) for number in heard}
    try:
        for rank in range(num_processes):
            environment = dict(os.environ)
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
            environment.update(
                {name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
            )
            environment.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // num_processes)))
            command = tied([sys.executable, "-m", module, *arguments])
            # Own session: a Ctrl-C of the terminal reaches this launcher alone, which passes it on once.
            processes.append(subprocess.Popen(command, env=environment, start_new_session=True))
        return _wait(processes)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for process in processes:
            if process.poll() is None:
                process.kill()


def _tell_signal(rank: int, number: int) -> None:
    """Names the signal that ended a rank, which had no time for a word itself; nothing for another end."""
    if number > 0:
        why = ", as the kernel does where memory runs out" if number == signal.SIGKILL else ""
        say(f"rank {rank} was ended by signal {number} ({signal.strsignal(number)}){why}")


def _wait(processes: list[subprocess.Popen[Any]]) -> int:
    """Waits for all; the first failure decides the exit code, and a disorderly one stops the rest."""
    failed, deadline = 0, math.inf
    while None in (codes := [process.poll() for process in processes]):  # a list, so that every process is asked
        rank, crash = next(((rank, code) for rank, code in enumerate(codes) if code and code not in ORDERLY), (0, 0))
        if crash and failed in (0, *ORDERLY):
            failed, deadline = crash, time.monotonic() + GRACE_S
            _tell_signal(rank, -crash)
            for process in processes:
                if process.poll() is None:
                    process.terminate()
        elif not failed and (orderly := next(filter(None, codes), 0)):
            failed, deadline = orderly, time.monotonic() + GRACE_S
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    ended = [code for code in codes if code]
    code = next((code for code in ended if code not in ORDERLY), next(iter(ended), 0)) if failed in (0, *ORDERLY) else failed
    return code if code >= 0 else 1
