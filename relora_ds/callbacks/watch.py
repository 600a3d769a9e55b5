"""The watch over a rank, tied to the training loop."""

from __future__ import annotations

from relora_ds.callbacks.callback import Callback, RunState
from relora_ds.supervision.watchdog import Watchdog


class Watch(Callback):
    """Watches from the first update on."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog = watchdog

    def begin(self, run: RunState) -> None:
        self.watchdog.start()

    def begin_update(self, run: RunState) -> None:
        self.watchdog.update = run.update_in_progress

    def beat(self, where: str, allow_s: float) -> None:
        self.watchdog.beat(where, allow_s)

    def end(self, exit_code: int) -> None:
        self.watchdog.stop()
