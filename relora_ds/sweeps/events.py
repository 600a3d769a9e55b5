"""What a sweep remembers of its runs beside their own folders: when each began, and how it ended."""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from relora_ds.console import say
from relora_ds.run.folder import Log


class Events:
    """events.jsonl of a sweep's folder; one process writes it.

    {"time": …, "run": "relora/seed-1", "state": "running"}                                 it was started
    {"time": …, "run": "relora/seed-1", "state": "failed", "code": 1, "error": "…"}         it ended so

    Args:
        folder: of the sweep; it need not be there.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "events.jsonl"
        self._log = Log(self.path, say)
        self.newest: dict[str, dict[str, Any]] = {}
        lines: list[str] = []
        with suppress(FileNotFoundError):
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines:
            with suppress(ValueError, TypeError, KeyError):  # cut off by a kill
                event = dict(json.loads(line))
                self.newest[str(event["run"])] = event

    def add(self, run: str, state: str, **content: Any) -> None:
        """Notes what became of a run just now; a full disk must not end the runs, so that the line may have to wait in memory."""
        event = {"time": datetime.now().astimezone().isoformat(timespec="seconds"), "run": run, "state": state, **content}
        self._log.append(event)
        self.newest[run] = event
