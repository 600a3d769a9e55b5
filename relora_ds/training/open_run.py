"""The run's folder at the start: locked by rank 0, with the checkpoint to go on from, and all that later commands need."""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch.distributed as dist
from transformers import PretrainedConfig
from transformers.utils import CONFIG_NAME

from relora_ds import environment
from relora_ds.checkpoint import reader as checkpoints
from relora_ds.config import dump
from relora_ds.console import say
from relora_ds.data import tokenizer
from relora_ds.errors import ConfigError, StartError
from relora_ds.launch.meeting import SPEAK_S
from relora_ds.launch.places import Place
from relora_ds.models import generation
from relora_ds.run.folder import RunFolder, write_atomically
from relora_ds.run.lock import RunLock
from relora_ds.supervision.watchdog import Watchdog, stacks_folder
from relora_ds.training.preflight import Checked

FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG)
"""Errors of a folder that no later start would find otherwise."""


def open_run_folder(checked: Checked, folder: RunFolder, place: Place, lock: RunLock) -> Path | None:
    """The checkpoint to go on from, None for a new run. Rank 0 locks the folder, looks and writes; all learn what it found.

    Raises:
        ConfigError: another job has the folder, it may not be written, none of its checkpoints is whole, or the newest whole one
        could run something.
        StartError: its disk is full, or fails.
    """
    found: list[Any] = [None]
    if place.is_main:
        try:
            found = [_lock_and_choose(checked, folder, lock)]
        except ConfigError as error:
            found = [error]
        except OSError as error:
            found = [_explained(error, folder)]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], Exception):
        lock.release()
        if isinstance(found[0], StartError) and not place.is_main:
            time.sleep(SPEAK_S)  # rank 0 tells it: whoever is the first to exit may have the rest ended
        raise found[0]
    return found[0]


def _explained(error: OSError, folder: RunFolder) -> Exception:
    """What ``run.dir`` cannot be is a wrong setting. A disk that is full, or fails, may be mended when the job starts again."""
    problem = str(error.strerror or error)
    if error.errno in FORBIDDEN:
        return ConfigError("run.dir", str(folder.path), problem, "name a folder that can be written")
    return StartError(f"run.dir={str(folder.path)!r}: {problem}", environment.node_name())


def _lock_and_choose(checked: Checked, folder: RunFolder, lock: RunLock) -> Path | None:
    folder.path.mkdir(parents=True, exist_ok=True)
    taken_over = lock.acquire()
    if taken_over:
        say(f"taking over {folder.path} from {taken_over}")
    if folder.checkpoints.is_dir():
        say("verifying checkpoints")
    resume_from = checkpoints.choose(folder, say)
    if resume_from is not None:  # before any rank opens its own file: all are told, and none waits for one that refused
        checkpoints.check_pickles(resume_from, trust=checked.trust)
    checkpoints.tidy(folder, resume_from)
    _write(checked, folder, is_new=resume_from is None)
    return resume_from


def _write(checked: Checked, folder: RunFolder, is_new: bool) -> None:
    """Everything that later commands need: the folder stands for itself, wherever data and recipe go."""
    config = checked.config
    for path in (folder.checkpoints, folder.base, folder.model):
        path.mkdir(parents=True, exist_ok=True)
    write_atomically(folder.config, dump(config))
    write_atomically(folder.deepspeed, json.dumps(checked.deepspeed, indent=2))
    _write_architecture(checked.architecture, folder)
    if is_new:  # later the model that it started from may be gone
        generation.keep_generation_config(config.model, folder.model)
    tokenizer.hand_on(Path(config.data.path), folder.model)


def _write_architecture(architecture: PretrainedConfig, folder: RunFolder) -> None:
    """In one step: transformers empties the old file before it writes, and on a full disk nothing can read the run any more."""
    with TemporaryDirectory(prefix=".model.", dir=folder.path) as temporary:
        architecture.save_pretrained(temporary)
        write_atomically(folder.model / CONFIG_NAME, (Path(temporary) / CONFIG_NAME).read_text(encoding="utf-8"))


def make_watchdog(checked: Checked, folder: RunFolder, place: Place) -> Watchdog:
    """The ranks learn each other's hosts, and rank 0's folder for the stacks."""
    attempt = environment.attempt()
    stacks = stacks_folder(folder.stacks, attempt) if place.is_main else None
    known: list[Any] = [None] * place.world_size
    dist.all_gather_object(known, (environment.node_name(), stacks))
    return Watchdog(
        folder.path, known[0][1], timeout_s=checked.config.train.hang_timeout, rank=place.rank,
        hosts=[host for host, _ in known], attempt=attempt,
    )  # fmt: skip
