"""The wish to stop, as a signal brings it."""

from __future__ import annotations

import signal
from typing import Any


def signals(more: str = "USR2") -> set[signal.Signals]:
    """What asks a run to stop: SIGTERM, SIGINT, one more, and SIGHUP, as a terminal sends it that is closed.

    Not SIGHUP where it is ignored: ``nohup`` asks for that.

    Args:
        more: the name of one without SIG: what SLURM sends before a time limit.
    """
    heard = {signal.SIGTERM, signal.SIGINT, signal.Signals[f"SIG{more}"]}
    return heard if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else heard | {signal.SIGHUP}


class StopSignal:
    """Remembers that one of :func:`signals` came, so that the update in progress can be finished.

    Must be made in the main thread, and early: until then these signals end the process.
    """

    def __init__(self, more: str = "USR2") -> None:
        self.requested = False
        for number in signals(more):
            signal.signal(number, self._request)

    def _request(self, _number: int, _frame: Any) -> None:
        self.requested = True
