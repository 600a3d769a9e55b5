"""torchrun as a task of SLURM, which signals the task alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from relora_ds.launch.torchrun_agent import children

ROOT = Path(__file__).resolve().parents[3]
TASK = "import sys; from relora_ds.launch.torchrun_agent import run_agent; sys.exit(run_agent(sys.argv[1:], 'USR2'))"
RANK = """
import os, signal, sys, time
from pathlib import Path

heard = []
for name in ("SIGTERM", "SIGINT", "SIGUSR2"):
    signal.signal(getattr(signal, name), lambda number, _: heard.append(signal.Signals(number).name))
log = Path(sys.argv[1]) / os.environ["RANK"]
while len(heard) < 3:
    log.write_text(" ".join(["ready", *heard]))
    time.sleep(0.02)
log.write_text(" ".join(heard))
sys.exit(75)
"""


def until(logs: list[Path], text: str) -> None:
    deadline = time.monotonic() + 90
    while [log.read_text() if log.exists() else "" for log in logs] != [text] * len(logs):
        assert time.monotonic() < deadline, [log.read_text() for log in logs if log.exists()]
        time.sleep(0.02)


def test_the_ranks_hear_of_signals_and_the_agent_does_not(tmp_path: Path) -> None:
    """SLURM's signals reach the task; where it looks for all descendants of a task, the agent itself as well."""
    rank, logs = tmp_path / "rank.py", [tmp_path / "0", tmp_path / "1"]
    rank.write_text(RANK)
    words = ["--nproc-per-node=2", "--master-port=0", str(rank), str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-c", TASK, *words], env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
    ) as task:
        try:
            until(logs, "ready")
            (agent,) = children(task.pid)
            assert len(list(children(agent))) == 2
            for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
                os.kill(agent, number)
            heard = "ready"
            for number in (signal.SIGTERM, signal.SIGUSR2):
                task.send_signal(number)
                heard += " SIGUSR2"
                until(logs, heard)
            task.send_signal(signal.SIGINT)
            assert task.wait(60) == 1, "torchrun's word for ranks that ended with 75"
            assert [log.read_text() for log in logs] == ["SIGUSR2 SIGUSR2 SIGUSR2"] * 2
        finally:
            task.kill()
