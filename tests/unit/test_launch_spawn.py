"""How processes on one machine are started and waited for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from relora_ds import launch
from relora_ds.launch import Place, discover

# Waiting for processes

Start = Callable[[str], subprocess.Popen]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts small Python programs, of which none outlives the test."""
    started: list[subprocess.Popen] = []

    def run(program: str) -> subprocess.Popen:
        started.append(subprocess.Popen([sys.executable, "-S", "-E", "-c", program], stdout=subprocess.PIPE))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_all_succeed(start: Start) -> None:
    assert launch._wait([start("pass"), start("import time; time.sleep(0.2)")]) == 0


@pytest.mark.parametrize("code", [75, 2])
def test_all_end_in_order_with_one_code(start: Start, code: int) -> None:
    """The second is given the time that it needs to end by itself."""
    processes = [start(f"raise SystemExit({code})"), start(f"import time; time.sleep(0.5); raise SystemExit({code})")]
    assert launch._wait(processes) == code
    assert [process.returncode for process in processes] == [code, code]


@pytest.mark.parametrize(
    ("crash", "code"),
    [("raise SystemExit(3)", 3), ("1 / 0", 1), ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 1)],
    ids=["exit", "exception", "killed"],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_crash_of_any_process_stops_the_others(start: Start, crash: str, code: int, place: int) -> None:
    began = time.monotonic()
    processes = [start(crash if i == place else "import time; time.sleep(30)") for i in range(3)]
    assert launch._wait(processes) == code
    assert time.monotonic() - began < launch.GRACE_S / 2
    assert [process.returncode for i, process in enumerate(processes) if i != place] == [-signal.SIGTERM, -signal.SIGTERM]


def test_a_crash_outweighs_an_orderly_end(start: Start) -> None:
    """A job that seems to have stopped with a checkpoint would be run again for ever."""
    assert launch._wait([start("raise SystemExit(75)"), start("import time; time.sleep(0.5); raise SystemExit(1)")]) == 1


def test_processes_that_do_not_stop_are_not_waited_for_longer_than_the_grace(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 0.3)
    ignores = start("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(30)")
    assert ignores.stdout is not None
    ignores.stdout.readline()
    began = time.monotonic()
    assert launch._wait([start("raise SystemExit(1)"), ignores]) == 1
    assert 0.3 <= time.monotonic() - began < 10
    assert ignores.poll() is None  # spawn kills it


# Starting processes: a shell script stands in for the Python interpreter


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes `spawn` run a shell script instead of Python; the script writes to files in the returned folder."""

    def install(script: str) -> Path:
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\ncd '{tmp_path}'\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        return tmp_path

    return install


def test_spawn_gives_each_process_its_place(stand_in: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    folder = stand_in('env > "env.$RANK"; echo "$@" > "arguments.$RANK"')
    assert launch.spawn(["train", "recipe.yaml", "run.seed=7"], 2) == 0
    ports = set()
    for rank in range(2):
        assert (folder / f"arguments.{rank}").read_text() == "-m relora_ds.cli train recipe.yaml run.seed=7\n"
        environment = dict(line.split("=", 1) for line in (folder / f"env.{rank}").read_text().splitlines() if "=" in line)
        ports.add(environment["MASTER_PORT"])
        assert discover(environment) == Place(rank, 2, rank, 2, "127.0.0.1", int(environment["MASTER_PORT"]), "torchrun")
        assert environment["OMP_NUM_THREADS"] == "3"
    assert len(ports) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_spawn_passes_a_signal_on_once_and_returns_the_code(stand_in: Callable[[str], Path], number: signal.Signals) -> None:
    folder = stand_in('trap \'echo stopped >> "stopped.$RANK"; exit 75\' TERM\ntouch "ready.$RANK"\nwhile :; do sleep 0.02; done')
    before = signal.getsignal(number)

    def interrupt() -> None:
        while signal.getsignal(number) is before or not all((folder / f"ready.{rank}").exists() for rank in range(2)):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert launch.spawn(["train"], 2) == 75
    thread.join()
    assert [(folder / f"stopped.{rank}").read_text() for rank in range(2)] == ["stopped\n", "stopped\n"]
    assert signal.getsignal(number) is before
