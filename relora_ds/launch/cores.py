"""How many cores of this machine a process may use: fewer than there are inside a job, a container or a pod."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUP, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable(root: Path = CGROUP, own: Path = OWN) -> int:
    """By the binding of this process (SLURM's, taskset's), and by the share of time that its cgroup allows (Kubernetes')."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([bound, *map(math.floor, _quotas(root, own))]))


def _quotas(root: Path, own: Path) -> Iterator[float]:
    """The cores' worth of time that this process's cgroup and those above it allow, where they limit it."""
    lines: list[str] = []
    with suppress(OSError):
        lines = own.read_text(encoding="utf-8").splitlines()
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers == "":  # version 2
            top, read = root, _quota_2
        elif "cpu" in controllers.split(","):
            top, read = root / "cpu", _quota_1
        else:
            continue
        folder = top / path.strip("/")
        # in a namespace of its own a container may see its path, but not the folder: the top is then its own
        for place in (folder, *(parent for parent in folder.parents if parent.is_relative_to(top))):
            with suppress(OSError, ValueError, ZeroDivisionError):
                yield read(place)


def _quota_2(folder: Path) -> float:
    quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()  # "max 100000": ValueError, no limit
    return int(quota) / int(period)


def _quota_1(folder: Path) -> float:
    quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii")) for name in ("quota", "period"))
    if quota < 0:
        raise ValueError("no limit")
    return quota / period
