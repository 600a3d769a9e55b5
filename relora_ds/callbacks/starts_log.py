"""starts.jsonl: each start of a run: when, by which command, on what, with which versions; peak memory, and where its time went."""

from __future__ import annotations

import json
import os
import platform
import resource
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from relora_ds.callbacks.callback import Callback, RunState
from relora_ds.checkpoint import reader as checkpoints
from relora_ds.launch import cores
from relora_ds.run.folder import finite, write_atomically
from relora_ds.text import json_text
from relora_ds.text.masking import masked_words

CPU_INFO = Path("/proc/cpuinfo")
PROGRAMS = ("relora-ds", "relora_ds")
RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes of a unit of ``ru_maxrss``."""


class StartsLog(Callback):
    """Writes starts.jsonl, on rank 0: a line for every start of the run, brought up to date at each checkpoint and at the end.

    What a start did after the last of these is lost where it is killed. Time is that of this rank, and told apart by what the loop
    does between two things that a callback hears; so this one stands last, and the work of those before it counts to what they heard.

    Args:
        path: of starts.jsonl.
        hosts: of all ranks.
        attempt: which start of a job this is; empty outside of one.
    """

    def __init__(self, path: Path, hosts: Sequence[str], attempt: str) -> None:
        self.path, self.hosts, self.attempt = path, hosts, attempt
        self.record: dict[str, Any] = {}
        self.seconds = {"start_up": age()}
        self.resident: dict[str, int] = {}
        self.allocated: dict[str, int] = {}
        self._since, self._last = time.perf_counter(), "start_up"
        self._phase = ""
        self._line = ""

    def begin(self, run: RunState) -> None:
        self.record = {
            "update": run.done.update,
            "first_update": run.done.update + 1,
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "attempt": self.attempt,
            "command": command(sys.argv),
            "launcher": run.place.launcher,
            "world_size": run.place.world_size,
            "hosts": list(dict.fromkeys(self.hosts)),
            "hardware": hardware(run.device),
            "versions": checkpoints.versions(),
        }
        self._phase = run.phase
        self._write()

    def begin_update(self, run: RunState) -> None:
        self._lap("phase_change" if run.phase != self._phase else self._last)
        if run.phase != self._phase and run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(run.device)  # what the new phase needs, not the change to it
        self._phase = run.phase

    def update(self, run: RunState, record: dict[str, Any]) -> None:
        self._lap("updates")
        self.record["update"] = run.done.update
        self.resident[run.phase] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT
        if run.device.type == "cuda":
            self.allocated[run.phase] = torch.cuda.max_memory_allocated(run.device)

    def evaluation(self, run: RunState, record: dict[str, Any]) -> None:
        self._lap("evaluations")

    def checkpoint(self, run: RunState) -> None:
        self._lap("checkpoints")
        self._write()

    def end(self, exit_code: int) -> None:
        self._lap(self._last)
        if self.record:
            self._write()

    def _lap(self, of: str) -> None:
        """The time since the last lap went into this."""
        now = time.perf_counter()
        self.seconds[of] = self.seconds.get(of, 0.0) + now - self._since
        self._since, self._last = now, of

    def _write(self) -> None:
        """Puts this start's line in the place of its old one. A disk that refuses it ends no run: the next time it is tried again."""
        more: dict[str, Any] = {"seconds": {of: round(seconds, 3) for of, seconds in self.seconds.items()}}
        more["resident_peak_bytes"] = self.resident
        if self.allocated:
            more["gpu_allocated_peak_bytes"] = self.allocated
        line = json.dumps(finite(self.record | more), allow_nan=False)
        with suppress(OSError):
            there = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.is_file() else []
            lines = [line for line in there if _is_whole(line)]
            at = lines.index(self._line) if self._line in lines else len(lines)
            write_atomically(self.path, "".join(f"{kept}\n" for kept in [*lines[:at], line, *lines[at + 1 :]]))
            self._line = line


def _is_whole(line: str) -> bool:
    """Whether a line is that of a start, and not what a power cut left of one."""
    try:
        return isinstance(json_text.parse(line)["update"], int)
    except (ValueError, TypeError, KeyError):
        return False


def age() -> float:
    """How long this process has been there, in seconds."""
    return max(0.0, time.time() - psutil.Process().create_time())


def command(argv: Sequence[str]) -> str:
    """This process's command line, as a shell takes it, without secrets: of this package by its name, else as it is."""
    program = Path(argv[0])
    is_own = program.name in PROGRAMS or program.parent.name in PROGRAMS
    return shlex.join(["relora-ds" if is_own else argv[0], *masked_words(argv[1:])])


def hardware(device: torch.device) -> dict[str, Any]:
    """What this rank computes on: the processor and its cores, the machine's memory, and the GPU."""
    found: dict[str, Any] = {"cpu": _cpu(), "cores": cores.usable()}
    with suppress(ValueError, OSError):
        found["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {"gpu": gpu.name, "gpu_memory_bytes": gpu.total_memory}
    return found


def _cpu() -> str:
    with suppress(OSError):
        for line in CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
