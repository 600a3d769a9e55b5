"""The watch over a rank, in processes of its own because it ends them: what is written, who is named, what is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from relora_ds.run import mounts
from relora_ds.supervision import faults
from relora_ds.supervision.watchdog import GRACE_S, SAVE_S, Heading, Watchdog, collective_timeout_s, grace_s, judge, stacks_folder

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import ctypes, sys, time
from pathlib import Path
from relora_ds.supervision import watchdog
watchdog.GRACE_S = 0.6
run_dir, timeout_s, rank, world_size = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
hosts = [f"node{other}" for other in range(world_size)]
dog = watchdog.Watchdog(run_dir, run_dir / "stacks" / "12.0", timeout_s=timeout_s, rank=rank, hosts=hosts, attempt="12.0")

def stuck_here():
    time.sleep(60)

def holds_the_lock_of_python():
    ctypes.PyDLL(None).sleep(60)

print("ready", flush=True)
sys.stdin.readline()
dog.update = 17
dog.start()
exec(sys.argv[5])
"""
Ended = tuple[int, str]


def ranks(run_dir: Path, bodies: Sequence[str | None], timeout_s: float = 0.6) -> list[Ended]:
    """Runs one process a rank, all from the same moment on, none where there is no body; returns exit codes and what they said."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(run_dir), str(timeout_s), str(rank), str(len(bodies)), body],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank, body in enumerate(bodies) if body is not None
    ]  # fmt: skip
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        told = [process.communicate(timeout=30)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, told, strict=True)]


def stacks(run_dir: Path, rank: int) -> tuple[Heading, str]:
    first, _, rest = (run_dir / "stacks" / "12.0" / f"rank_{rank:05d}.txt").read_text().partition("\n")
    return Heading(**json.loads(first)), rest


def test_a_hang_ends_the_process_with_its_stacks_written(tmp_path: Path) -> None:
    ((code, told),) = ranks(tmp_path, ["dog.beat('a micro batch'); stuck_here()"])
    assert code == 1
    heading, rest = stacks(tmp_path, 0)
    assert heading == Heading(rank=0, host="node0", update=17, beats=2, where="a micro batch")
    assert "in stuck_here" in rest and "watchdog.py" in rest, "the stacks of all threads"
    (line,) = told.splitlines()
    assert line.startswith("relora-ds: error: nothing moved for 0.6 s: rank 0 on node0 hangs after 'a micro batch' in update 17")
    assert line.endswith(f"stacks: {tmp_path / 'stacks' / '12.0'}")
    (fault,) = faults.read(tmp_path, "12.0")
    assert (fault["kind"], fault["rank"], fault["host"], fault["update"]) == ("hang", 0, "node0", 17)
    assert fault["detail"] in line


def test_the_rank_with_the_fewest_beats_is_named_by_the_first(tmp_path: Path) -> None:
    """They find the hang at different times: one beat so late that the others would not wait for its own time to be over."""
    waits = "dog.beat('a micro batch'); dog.beat('an update'); stuck_here()"
    late = "dog.beat('a micro batch'); time.sleep(0.9); dog.beat('an update'); stuck_here()"
    ended = ranks(tmp_path, [waits, "dog.beat('a micro batch'); stuck_here()", late], timeout_s=2.0)
    assert [code for code, _ in ended] == [1, 1, 1]
    assert [bool(told) for _, told in ended] == [True, False, False], "one speaks"
    assert "rank 1 on node1 hangs after 'a micro batch' in update 17 (2 beats), the furthest after 'an update'" in ended[0][1]
    assert [stacks(tmp_path, rank)[0].beats for rank in range(3)] == [3, 2, 3]
    (fault,) = faults.read(tmp_path)
    assert (fault["rank"], fault["host"]) == (1, "node1")


def test_without_the_first_rank_the_next_one_speaks(tmp_path: Path) -> None:
    """And ends before the others, because a launcher that sees one rank end kills the rest."""
    body = """
import os
end = os._exit
os._exit = lambda code: (print(time.monotonic(), file=sys.stderr, flush=True), end(code))
stuck_here()
"""
    ended = ranks(tmp_path, [None, body, body])
    assert [code for code, _ in ended] == [1, 1]
    (told, first_s), (last_s,) = (text.splitlines() for _, text in ended)
    assert "rank 0 on node0 wrote no stacks: its process is stopped or stuck, or its node is gone; the others hang after" in told
    assert float(last_s) - float(first_s) > 0.3, "half a grace"
    assert [fault["rank"] for fault in faults.read(tmp_path)] == [0]


def test_a_hang_that_holds_the_lock_of_python(tmp_path: Path) -> None:
    ((code, told),) = ranks(tmp_path, ["time.sleep(0.2); holds_the_lock_of_python()"])
    assert code == 1
    assert "in holds_the_lock_of_python" in told


def test_a_run_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "stacks").write_text("not a folder")
    ((code, told),) = ranks(tmp_path, ["stuck_here()"])
    assert code == 1
    assert "its stacks cannot be written (Not a directory)" in told and "in stuck_here" in told


def test_a_disk_that_hangs(tmp_path: Path) -> None:
    """The watching thread itself hangs where it writes: the timer ends the process."""
    ((code, told),) = ranks(tmp_path, ["dog._write_stacks = stuck_here; stuck_here()"])
    assert code == 1
    assert told.count("in stuck_here") == 2


SUSPENDED = """
import os, signal, subprocess
os.environ["PATH"] = "/usr/bin:/bin"
subprocess.Popen(["sh", "-c", f"sleep {SECONDS}; kill -CONT {os.getpid()}"])
time.sleep(0.1)
os.kill(os.getpid(), signal.SIGSTOP)
for _ in range(8): time.sleep(0.1); dog.beat("x")
dog.stop()
"""


def test_a_process_that_was_stopped_for_a_while_goes_on(tmp_path: Path) -> None:
    """scontrol suspend: longer than the limit, and than the graces of the thread and once those of the timer."""
    body = SUSPENDED.replace("{SECONDS}", "2.6")
    assert ranks(tmp_path, [body]) == [(0, "")]
    assert not (tmp_path / "stacks").exists()


def test_a_hang_after_a_stop_is_found(tmp_path: Path) -> None:
    body = SUSPENDED.replace("{SECONDS}", "1.6").replace("for _ in range(8)", "stuck_here()\nfor _ in range(8)")
    ((code, told),) = ranks(tmp_path, [body])
    assert code == 1 and "hangs after 'start'" in told


def test_a_folder_on_nfs_is_given_the_time_that_its_clients_remember(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = partial(Watchdog, tmp_path, tmp_path / "stacks" / "1", rank=0, hosts=["a"])
    assert watch(timeout_s=60.0)._grace_s == GRACE_S
    monkeypatch.setattr(mounts, "kind", lambda *_: "nfs4")
    assert watch(timeout_s=60.0)._grace_s == mounts.REMEMBERED_S
    assert watch(timeout_s=6000.0)._grace_s == 200.0


def test_folders_are_listed_before_a_name_in_them_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[Path] = []
    monkeypatch.setattr(Path, "iterdir", lambda path: iter([path / "1"] if listed.append(path) is None else []))
    dog = Watchdog(tmp_path, tmp_path / "stacks" / "1", timeout_s=1.0, rank=0, hosts=["a"])
    dog.beat("x")
    assert dog._others_hang(time.monotonic() + 0.7) and not dog._others_hang(time.monotonic())
    assert dog._read_headings() == {}
    assert listed == [tmp_path / "stacks", tmp_path / "stacks" / "1"]


def test_what_moves_is_left_alone_and_nothing_stays_behind(tmp_path: Path) -> None:
    beats = "for _ in range(24): time.sleep(0.05); dog.beat('x')"
    slow_disk = "dog.beat('all but the end of a checkpoint', allow_s=60); time.sleep(1.2)"
    after = "dog.stop(); dog.stop(); assert dog._thread is None; time.sleep(2.1)"  # longer than the timer of the second line
    assert ranks(tmp_path, [f"{body}\n{after}" for body in (beats, slow_disk, "")]) == [(0, "")] * 3
    assert list(tmp_path.iterdir()) == []


def test_without_a_limit_there_is_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    dog = Watchdog(tmp_path, tmp_path / "stacks", timeout_s=None, rank=0, hosts=["here"])
    dog.start()
    dog.beat("x")
    assert threading.active_count() == before
    dog.stop()


def found(*beats: int | None) -> dict[int, Heading]:
    """One heading a rank; None for a rank that wrote nothing."""
    return {rank: Heading(rank, "", 5, count, f"place {count}") for rank, count in enumerate(beats) if count is not None}


@pytest.mark.parametrize(
    ("beats", "rank", "text"),
    [
        ((3,), 0, "rank 0 on a hangs after 'place 3' in update 5 (3 beats)"),
        ((3, 3, 3), None, "all 3 ranks wait at the same place, after 'place 3' in update 5 (3 beats)"),
        ((4, 3, 4), 1, "rank 1 on b hangs after 'place 3' in update 5 (3 beats), the furthest after 'place 4'"),
        ((4, 3, 3), 1, "rank 1 on b (and 1 more) hangs"),
        ((4, 3, None), 2, "rank 2 on c wrote no stacks"),
        ((None, None, 7), 0, "rank 0 on a (and 1 more) wrote no stacks"),
    ],
)
def test_judge(beats: tuple[int | None, ...], rank: int | None, text: str) -> None:
    named, sentence = judge(found(*beats), list("abc")[: len(beats)])
    assert named == rank
    assert sentence.startswith(text)


def test_stacks_go_to_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert stacks_folder(tmp_path, "12.0") == tmp_path / "12.0"
    (tmp_path / "12.0").mkdir()
    (tmp_path / "12.0_2").mkdir()
    assert stacks_folder(tmp_path, "12.0") == tmp_path / "12.0_3", "two starts within one SLURM job"
    assert stacks_folder(tmp_path, "").name.startswith("20")


@pytest.mark.parametrize("timeout_s", [None, 1.0, 1800.0, 7200.0])
def test_a_collective_outlasts_the_watch(timeout_s: float | None) -> None:
    assert collective_timeout_s(timeout_s) >= SAVE_S
    if timeout_s is not None:
        assert collective_timeout_s(timeout_s) > max(timeout_s, SAVE_S) + 4 * max(grace_s(timeout_s), GRACE_S)
