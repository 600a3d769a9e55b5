"""How processes on one machine are started and waited for, and that none outlives who started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from relora_ds.launch import launcher, libraries, tie
from relora_ds.launch.places import Place, discover

ROOT = Path(__file__).resolve().parents[3]
PYTHON = sys.executable
"""The interpreter, also where a stand-in has its place."""

# Waiting for processes

KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
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
    assert launcher._wait([start("pass"), start("import time; time.sleep(0.2)")]) == 0


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (KILLED, "[relora-ds] rank 1 was ended by signal 9 (Killed), as the kernel does where memory runs out\n"),
        (KILLED.replace("KILL", "SEGV"), "[relora-ds] rank 1 was ended by signal 11 (Segmentation fault)\n"),
        ("raise SystemExit(3)", ""),
    ],
)
def test_a_rank_without_time_for_a_last_word_is_named(
    start: Start, end: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher._wait([start("import time; time.sleep(60)"), start(end)])
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("code", [75, 2])
def test_all_end_in_order_with_one_code(start: Start, code: int) -> None:
    """The second is given the time that it needs to end by itself."""
    processes = [start(f"raise SystemExit({code})"), start(f"import time; time.sleep(0.5); raise SystemExit({code})")]
    assert launcher._wait(processes) == code
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
    assert launcher._wait(processes) == code
    assert time.monotonic() - began < launcher.GRACE_S / 2
    assert [process.returncode for i, process in enumerate(processes) if i != place] == [-signal.SIGTERM, -signal.SIGTERM]


def test_a_crash_outweighs_an_orderly_end(start: Start) -> None:
    """A job that seems to have stopped with a checkpoint would be run again for ever."""
    assert launcher._wait([start("raise SystemExit(75)"), start("import time; time.sleep(0.5); raise SystemExit(1)")]) == 1


def test_processes_that_do_not_stop_are_not_waited_for_longer_than_the_grace(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "GRACE_S", 0.3)
    ignores = start("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(30)")
    assert ignores.stdout is not None
    ignores.stdout.readline()
    began = time.monotonic()
    assert launcher._wait([start("raise SystemExit(1)"), ignores]) == 1
    assert 0.3 <= time.monotonic() - began < 10
    assert ignores.poll() is None  # spawn kills it


# Starting processes: a shell script stands in for the Python interpreter


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes `spawn` run a shell script instead of Python; the script writes to files in the returned folder."""

    def install(script: str) -> Path:
        program = tmp_path / "python"
        tie = f'case "$1" in -I) exec {PYTHON} "$@";; esac'  # what ties it to this process is Python's still
        program.write_text(f"#!/bin/sh\n{tie}\ncd '{tmp_path}'\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        return tmp_path

    return install


def test_spawn_gives_each_process_its_place(stand_in: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launcher.cores, "usable", lambda: 6)
    folder = stand_in('env > "env.$RANK"; echo "$@" > "arguments.$RANK"')
    assert launcher.spawn(["train", "recipe.yaml", "run.seed=7"], 2) == 0
    ports = set()
    for rank in range(2):
        assert (folder / f"arguments.{rank}").read_text() == "-m relora_ds train recipe.yaml run.seed=7\n"
        environment = dict(line.split("=", 1) for line in (folder / f"env.{rank}").read_text().splitlines() if "=" in line)
        ports.add(environment["MASTER_PORT"])
        assert discover(environment) == Place(rank, 2, rank, 2, "127.0.0.1", int(environment["MASTER_PORT"]), "torchrun")
        assert environment["OMP_NUM_THREADS"] == "3"
    assert len(ports) == 1


def test_spawn_runs_another_module(stand_in: Callable[[str], Path]) -> None:
    folder = stand_in('echo "$@" > "arguments.$RANK"')
    assert launcher.spawn(["--rounds", "2"], 1, module="benchmarks.peers") == 0
    assert (folder / "arguments.0").read_text() == "-m benchmarks.peers --rounds 2\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2])
def test_spawn_passes_a_signal_on_once_and_returns_the_code(stand_in: Callable[[str], Path], number: signal.Signals) -> None:
    folder = stand_in('trap \'echo stopped >> "stopped.$RANK"; exit 75\' TERM\ntouch "ready.$RANK"\nwhile :; do sleep 0.02; done')
    before = signal.getsignal(number)

    def interrupt() -> None:
        while signal.getsignal(number) is before or not all((folder / f"ready.{rank}").exists() for rank in range(2)):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert launcher.spawn(["train"], 2) == 75
    thread.join()
    assert [(folder / f"stopped.{rank}").read_text() for rank in range(2)] == ["stopped\n", "stopped\n"]
    assert signal.getsignal(number) is before


def test_spawn_outside_the_main_thread_hears_no_signals(stand_in: Callable[[str], Path]) -> None:
    stand_in("exit 75")
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)]
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(launcher.spawn(["train"], 2)))
    thread.start()
    thread.join()
    assert codes == [75]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)] == before


def test_a_process_that_cannot_be_started_takes_those_before_it_along(
    stand_in: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in("sleep 30")
    started: list[subprocess.Popen] = []
    popen = subprocess.Popen

    def start(*arguments: object, **options: object) -> subprocess.Popen:
        if started:
            raise OSError("no more processes")
        started.append(popen(*arguments, **options))
        return started[0]

    monkeypatch.setattr(libraries.subprocess, "Popen", start)
    with pytest.raises(OSError, match="no more processes"):
        launcher.spawn(["train"], 2)
    assert started[0].wait(timeout=5) == -signal.SIGKILL


# Dying with the launcher

LAUNCHERS = {
    "spawn": ("launcher.spawn(['train'], 2)", 2),
    "in a thread": ("t = threading.Thread(target=launcher.spawn, args=(['train'], 2)); t.start(); t.join()", 2),
    "a rank's own program": ("subprocess.run(launcher.tied([sys.executable, 'train']))", 1),
}
"""What is run, and how many children it has."""
LAUNCHER = "import subprocess, sys, threading; from relora_ds.launch import launcher; sys.executable = sys.argv[1]; "


def wait_until(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"waited for {timeout_s} s"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    """Whether a process is gone, or nothing but its exit code is left: who comes after a dead parent may never ask for that."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children that their parent is gone")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1], ids=["killed", "ended"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_children_die_with_the_launcher(stand_in: Callable[[str], Path], launcher: str, number: signal.Signals) -> None:
    """One is stopped, as one that hangs: it dies, too. They listen to no signal that can be ignored."""
    folder = stand_in('trap \'\' TERM INT HUP USR1 USR2; echo $$ > "$$.new"; mv "$$.new" "$$.pid"; exec sleep 60')
    program, children = LAUNCHERS[launcher]
    parent = subprocess.Popen([PYTHON, "-c", LAUNCHER + program, sys.executable], cwd=ROOT)
    try:
        wait_until(lambda: len(list(folder.glob("*.pid"))) == children)
        pids = [int(file.read_text()) for file in folder.glob("*.pid")]
        os.kill(pids[0], signal.SIGSTOP)
        parent.send_signal(number)
        assert parent.wait(timeout=10) == -number
        wait_until(lambda: all(is_gone(pid) for pid in pids), timeout_s=5)  # at once; some seconds on a busy machine
    finally:
        parent.kill()
        parent.wait()
        for file in folder.glob("*.pid"):
            if not is_gone(int(file.read_text())):
                os.kill(int(file.read_text()), signal.SIGKILL)


def test_nothing_is_run_for_a_parent_that_died_before_it_could_be_tied(tmp_path: Path) -> None:
    command = launcher.tied(["touch", str(tmp_path / "run")])
    command[command.index(str(os.getpid()))] = "1"  # whose child it is by then
    assert subprocess.run(command, check=False).returncode == 1
    assert not (tmp_path / "run").exists()


def test_what_is_tied_is_run_as_it_is(tmp_path: Path) -> None:
    """Its process id, its exit code, its streams and its signals are those of the process that was started."""
    told = "print(os.getpid(), signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, flush=True)"
    script = f"import os, signal; {told}; os.kill(os.getpid(), 4)"
    process = subprocess.Popen(launcher.tied([sys.executable, "-c", script]), stdout=subprocess.PIPE, text=True)
    told, _ = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGILL
    assert told == f"{process.pid} True\n"
    words = ["sh", "-c", "kill -s PIPE $$"]  # which Python ignores
    assert subprocess.run(launcher.tied(words), check=False).returncode == -signal.SIGPIPE


def test_elsewhere_than_on_linux_nothing_is_tied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tie.ctypes, "CDLL", lambda _: object())
    assert tie.tie(os.getppid()) is True
