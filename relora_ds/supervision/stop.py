"""The wish to stop, as a signal brings it."""

from __future__ import annotations

import signal
from typing import Any


class StopSignal:
    """Remembers that SIGTERM, SIGINT or one more signal came, so that the update in progress can be finished.

    Must be made in the main thread, and early: until then these signals end the process.

    Args:
        more: the name of the third signal, without SIG: what SLURM sends before a time limit.
    """

    def __init__(self, more: str = "USR2") -> None:
        self.requested = False
        for name in ("SIGTERM", "SIGINT", f"SIG{more}"):
            signal.signal(getattr(signal, name), self._request)

    def _request(self, _number: int, _frame: Any) -> None:
        self.requested = True
