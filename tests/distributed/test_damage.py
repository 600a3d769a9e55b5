"""Damaged checkpoints, places that cannot be written to, folders that another job takes over: over real processes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from relora_ds.callbacks import progress_line
from relora_ds.checkpoint import reader as checkpoints
from relora_ds.checkpoint.writer import FencedError, Saver
from relora_ds.errors import ConfigError, TrainingError
from relora_ds.launch import places
from relora_ds.run import lock
from relora_ds.run import manifest as manifests
from relora_ds.run.folder import RunFolder
from relora_ds.training import open_run
from relora_ds.training.trainer import Trainer
from tests.distributed import common
from tests.distributed.pool import run
from tests.distributed.test_checkpoint import folders, losses
from tests.distributed.test_training import at, read_log, train_here


@pytest.fixture
def finished(content: dict[str, Any], tmp_path: Path) -> tuple[dict[str, Any], RunFolder]:
    """A run that was killed after update 16: checkpoints after 9, 12 and 15, the last on the base of restart 2."""
    settings = at(content, tmp_path / "run", keep=3)
    run(2, train_here, settings, 16)
    folder = RunFolder(tmp_path / "run")
    assert [path.name for path in checkpoints.find_all(folder)] == ["update_0000009", "update_0000012", "update_0000015"]
    assert folders(folder) == ["restart_0001", "restart_0002"]
    return settings, folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def flip_in_a_name(path: Path) -> None:
    """In JSON; in the middle it may hit the checksum of another file, which is then the one that is named."""
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"world_size"', b'"gorld_size"', 1))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE = {
    "a flipped bit in the model states": ("mp_rank_00_model_states.pt", flip, "holds other bytes than were written"),
    "a flipped bit in a rank's moments": ("zero_pp_rank_1_mp_rank_00_optim_states.pt", flip, "holds other bytes"),
    "a truncated file": ("zero_pp_rank_0_mp_rank_00_optim_states.pt", cut, "bytes"),
    "a missing file": ("mp_rank_00_model_states.pt", Path.unlink, "is missing"),
    "an empty manifest": ("manifest.json", empty, "is not whole"),
    "a flipped bit in the manifest": ("manifest.json", flip_in_a_name, "manifest.json"),
}


QUICK = ("a flipped bit in a rank's moments",)


@pytest.mark.parametrize("damage", [pytest.param(name, marks=[pytest.mark.long] * (name not in QUICK)) for name in DAMAGE])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    finished: tuple[dict[str, Any], RunFolder], damage: str, tmp_path: Path
) -> None:
    settings, folder = finished
    name, hurt, problem = DAMAGE[damage]
    whole = at(settings, tmp_path / "whole")
    run(2, train_here, whole)
    hurt(folder.checkpoints / "update_0000015" / name)
    told = run(2, resume, settings)[0]
    assert f"update_0000015/{name}" in told and problem in told and "trying the checkpoint before" in told
    assert "resuming from" in told and "update_0000012" in told
    for log in ("metrics.jsonl", "restarts.jsonl"):
        assert read_log(folder.path / log) == read_log(tmp_path / "whole" / log)


@pytest.mark.parametrize(
    ("name", "hurt"),
    [
        ("rank_00001.safetensors", flip),
        *(common.long(*case) for case in [("rank_00000.safetensors", cut), ("manifest.json", flip)]),
        ("manifest.json", Path.unlink),
    ],
)
def test_a_damaged_base_takes_its_checkpoints_along(finished: tuple[dict[str, Any], RunFolder], name: str, hurt: Any) -> None:
    """Those after 12 and 15 need the base of restart 2: the run goes on from update 9, and writes that base anew."""
    settings, folder = finished
    hurt(folder.base / "restart_0002" / name)
    told = run(2, resume, settings)[0]
    assert told.count("trying the checkpoint before") == 2 and f"restart_0002/{name}" in told
    assert "update_0000009" in told.partition("resuming from")[2]
    assert not [problem for path in checkpoints.find_all(folder) for problem in checkpoints.faults(path)]


def resume(content: dict[str, Any]) -> str:
    """Trains to the end; returns all that the user is told, with the error that ended it."""
    told: list[str] = []
    original = open_run.say
    open_run.say = progress_line.say = told.append
    try:
        train_here(content)
    except (ConfigError, TrainingError) as error:
        told.append(f"{type(error).__name__}: {error}")
    finally:
        open_run.say = progress_line.say = original
    return "\n".join(told)


def test_where_none_is_whole_the_run_stops_and_says_so(finished: tuple[dict[str, Any], RunFolder]) -> None:
    settings, folder = finished
    before = (folder.path / "metrics.jsonl").read_bytes()
    for path in checkpoints.find_all(folder):
        flip(path / checkpoints.MODEL_STATES)
    for message in run(2, resume, settings):
        assert "ConfigError: run.dir=" in message and "none of its 3 checkpoint(s) is whole" in message
    assert (folder.path / "metrics.jsonl").read_bytes() == before
    assert len(checkpoints.find_all(folder)) == 3, "nothing is removed: a file that is missing may come back"


def test_a_pickle_is_opened_only_with_the_checksum_that_the_manifest_gives(finished: tuple[dict[str, Any], RunFolder]) -> None:
    _, folder = finished
    checkpoint = folder.checkpoints / "update_0000015"
    flip(checkpoint / checkpoints.MODEL_STATES)
    with pytest.raises(ConfigError, match="holds other bytes than were written"):
        checkpoints.read_model_state(checkpoint)
    entries = json.loads((checkpoint / manifests.NAME).read_text())
    del entries["files"][checkpoints.MODEL_STATES]
    (checkpoint / manifests.NAME).write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match="its manifest does not list mp_rank_00_model_states.pt"):
        checkpoints.read_model_state(checkpoint)


# Places that cannot be written to


def fill(ballast: Path, leave: int) -> None:
    """Fills a file system up but for some bytes."""
    with suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    os.truncate(ballast, ballast.stat().st_size - leave)


def checkpoint_complete(trainer: Trainer) -> None:
    """Waits for the checkpoint on its way, on this rank alone."""
    job = trainer.checkpoints.saver._job
    if job is not None and job.thread is not None:
        job.thread.join()


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


BREAK: dict[str, Callable[[str], None]] = {
    "full": lambda disk: fill(Path(disk) / "ballast", leave=40_000),
    "read-only": lambda disk: mount("-o", "remount,ro", disk),
    "vanished": lambda disk: subprocess.run(["umount", "-l", disk], check=True) and None,
}
MEND: dict[str, Callable[[str], None]] = {
    "full": lambda disk: (Path(disk) / "ballast").unlink(),
    "read-only": lambda disk: mount("-o", "remount,rw", disk),
}


def train_over_a_broken_disk(content: dict[str, Any], disk: str, how: str, *, mended: bool) -> str:
    """The disk fails before update 7, when the checkpoint after 6 is complete, and works again before update 14, or never."""
    original, place = Trainer.update, places.discover()
    assert place is not None

    def update(self: Trainer, number: int, stop_requested: bool) -> bool:
        if place.is_main and number == 7:
            checkpoint_complete(self)
            BREAK[how](disk)
        if place.is_main and number == 11:
            checkpoint_complete(self)
        if place.is_main and number == 12:
            progress_line.say(f"failures known before update 12: {self.checkpoints.failed_in_a_row}")
        if place.is_main and number == 14 and mended:
            MEND[how](disk)
        return original(self, number, stop_requested)

    Trainer.update = update  # type: ignore[method-assign]
    try:
        return resume(content)
    finally:
        Trainer.update = original  # type: ignore[method-assign]


def train_over_a_mended_disk(content: dict[str, Any], disk: str, how: str) -> str:
    return train_over_a_broken_disk(content, disk, how, mended=True)


def train_over_a_disk_that_stays_broken(content: dict[str, Any], disk: str, how: str) -> str:
    return train_over_a_broken_disk(content, disk, how, mended=False)


@pytest.mark.parametrize(
    ("how", "asynchronous"),
    [("full", True), *(common.long(*case) for case in [("full", False), ("read-only", True)])],
)
def test_a_disk_that_fails_for_a_while_does_not_stop_the_run(
    content: dict[str, Any], small_disk: Path, tmp_path: Path, how: str, asynchronous: bool
) -> None:
    """Checkpoints after 9 and 12 cannot be written, that after 15 can: the run ends as if nothing had been."""
    content["checkpoint"] = {"async": asynchronous, "max_failures": 3}
    whole = at(content, tmp_path / "whole", keep=2)
    run(2, train_here, whole)
    settings = at(content, small_disk / "run", keep=2)
    told, _ = run(2, train_over_a_mended_disk, settings, str(small_disk), how)
    assert "TrainingError" not in told
    assert "failures known before update 12: 1" in told, "told at once, not at the next checkpoint"
    assert "a checkpoint could not be written (1 in a row)" in told and "(2 in a row)" in told and "(3 in a row)" not in told
    assert read_log(small_disk / "run" / "metrics.jsonl") == read_log(tmp_path / "whole" / "metrics.jsonl")
    folder = RunFolder(small_disk / "run")
    assert [path.name for path in checkpoints.find_all(folder)] == ["update_0000015", "update_0000018"]
    assert not [problem for path in checkpoints.find_all(folder) for problem in checkpoints.faults(path)]


@pytest.mark.parametrize("how", ["full", "vanished"])
def test_a_disk_that_stays_broken_stops_the_run_after_a_limit(content: dict[str, Any], small_disk: Path, how: str) -> None:
    content["checkpoint"] = {"max_failures": 2}
    settings = at(content, small_disk / "run")
    for told in run(2, train_over_a_disk_that_stays_broken, settings, str(small_disk), how):
        assert "TrainingError: 2 checkpoints in a row could not be written (checkpoint.max_failures=2)" in told
    if how == "full":
        newest = checkpoints.find_all(RunFolder(small_disk / "run"))[-1]
        assert newest.name == "update_0000006" and not list(checkpoints.faults(newest)), "the last good one is kept"
        assert sorted(path.name for path in (small_disk / "run" / "checkpoints").glob("update_*"))[-1] == newest.name, "no pieces"
    else:
        assert not list(small_disk.iterdir()), "nothing is written beside the mount"


def train_with_a_rotation_that_fails(content: dict[str, Any]) -> str:
    def rotate(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    original = checkpoints.rotate
    checkpoints.rotate = rotate
    try:
        return resume(content)
    finally:
        checkpoints.rotate = original


def test_a_rotation_that_fails_takes_no_checkpoint_along(content: dict[str, Any], tmp_path: Path) -> None:
    for told in run(2, train_with_a_rotation_that_fails, at(content, tmp_path / "run", keep=1)):
        assert "Error" not in told and "could not be written" not in told
    folder = RunFolder(tmp_path / "run")
    assert len(checkpoints.find_all(folder)) == 6
    assert not [problem for path in checkpoints.find_all(folder) for problem in checkpoints.faults(path)]


# Another job


def take_over(run_folder: RunFolder) -> None:
    """As another job does that has heard nothing from this one for long."""
    path = run_folder.path / lock.LOCK_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "token": "another"}))


def train_until_fenced(content: dict[str, Any]) -> str:
    """After update 7 another job takes the folder over, long before the next heartbeat."""
    original, place = Trainer.update, places.discover()
    assert place is not None

    def update(self: Trainer, number: int, stop_requested: bool) -> bool:
        if place.is_main and number == 8:
            take_over(self.folder)
        return original(self, number, stop_requested)

    Trainer.update = update  # type: ignore[method-assign]
    try:
        return resume(content)
    except FencedError as error:
        return f"FencedError: {error}"
    finally:
        Trainer.update = original  # type: ignore[method-assign]


def test_a_job_whose_folder_was_taken_over_writes_no_more(content: dict[str, Any], tmp_path: Path) -> None:
    for told in run(2, train_until_fenced, at(content, tmp_path / "run", checkpoint_every=1)):
        assert told.startswith("FencedError: another job has taken over")
    assert max(losses(tmp_path / "run")) == 7
    assert checkpoints.find_all(RunFolder(tmp_path / "run"))[-1].name <= "update_0000007"
    assert json.loads((tmp_path / "run" / "lock.json").read_text())["token"] == "another", "its lock is left alone"


def save_after_a_take_over(content: dict[str, Any]) -> str:
    """Another job takes the folder over between two heartbeats, right before a checkpoint is complete."""
    original, place = Saver._complete, places.discover()
    assert place is not None

    def complete(self: Saver, job: Any) -> None:
        if job.manifest.update == 6:
            take_over(self.run)
        original(self, job)

    Saver._complete = complete  # type: ignore[method-assign]
    try:
        return resume(content)
    except FencedError as error:
        return f"FencedError: {error}"
    finally:
        Saver._complete = original  # type: ignore[method-assign]


def test_a_checkpoint_is_not_completed_in_a_folder_that_was_taken_over(content: dict[str, Any], tmp_path: Path) -> None:
    for told in run(2, save_after_a_take_over, at(content, tmp_path / "run")):
        assert told.startswith("FencedError: another job has taken over")
    assert [path.name for path in checkpoints.find_all(RunFolder(tmp_path / "run"))] == ["update_0000003"]


def train_with_a_last_checkpoint_that_fails_once(content: dict[str, Any]) -> str:
    """On rank 1, whose disk is away for a moment."""
    original, failures, place = Saver._write_own, [1], places.discover()
    assert place is not None

    def write_own(self: Saver, job: Any) -> None:
        if job.manifest.update == 18 and place.rank == 1 and failures:
            failures.pop()
            raise OSError(errno.EIO, "Input/output error")
        original(self, job)

    Saver._write_own = write_own  # type: ignore[method-assign]
    try:
        return resume(content)
    finally:
        Saver._write_own = original  # type: ignore[method-assign]


def test_the_last_checkpoint_is_tried_again(content: dict[str, Any], tmp_path: Path) -> None:
    """No later one makes up for it; a run that a time limit stops would lose all since the one before."""
    told, _ = run(2, train_with_a_last_checkpoint_that_fails_once, at(content, tmp_path / "run"))
    assert "a checkpoint could not be written (1 in a row)" in told and "Error" not in told
    newest = checkpoints.find_all(RunFolder(tmp_path / "run"))[-1]
    assert newest.name == "update_0000018" and not list(checkpoints.faults(newest))
