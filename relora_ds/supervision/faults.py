"""faults.jsonl: what ended a run out of order, one line a fault.

Whoever decides whether to start a job again, and where, reads it. When one rank fails, others follow with errors of their
connections: the earliest line of an attempt is the cause.
"""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from relora_ds.run.folder import RunFolder, append_surely

MAX_NCCL = 600
"""Characters of an error of NCCL."""


def record(
    run_dir: Path,
    *,
    kind: Literal["hang", "error", "refusal"],
    attempt: str,
    rank: int | None,
    host: str | None,
    update: int,
    detail: str,
) -> None:
    """Appends one fault; raises nothing, because its caller is on the way out.

    Args:
        run_dir: the run's folder.
        kind: hang (nothing moved), error (an exception that nobody foresaw), or refusal (this rank found wrong what others did not).
        attempt: of the SLURM job; empty outside of one.
        rank, host: where it happened; None when no rank stands out.
        update: the one in progress, 0 before the first.
        detail: put on one line.
    """
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    line = {"time": now, "attempt": attempt, "kind": kind, "rank": rank, "host": host, "update": update}
    with suppress(OSError, ValueError, TypeError):
        append_surely(RunFolder(run_dir).faults, {**line, "detail": " ".join(detail.split())})


def describe(error: BaseException) -> str:
    """An exception's type and first line; all of NCCL's, which says behind it what it lost."""
    text = str(error).strip()
    lines = [" ".join(text.split())[:MAX_NCCL]] if "NCCL error" in text else text.splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def read(run_dir: Path, attempt: str | None = None) -> list[dict[str, Any]]:
    """The faults of a run in the order in which they were written, of one attempt or of all; lines that were cut off are left out.

    Raises:
        OSError: the file is there and cannot be read.
    """
    path = RunFolder(run_dir).faults
    if not path.is_file():
        return []
    faults = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            fault = json.loads(line)
            if isinstance(fault, dict) and attempt in (None, fault.get("attempt")):
                faults.append(fault)
    return faults
