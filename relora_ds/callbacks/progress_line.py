"""The screen: the state of the run in one line, and messages between."""

from __future__ import annotations

import sys
import time
from collections import deque
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from relora_ds.callbacks.callback import Callback, RunState
from relora_ds.console import say, write
from relora_ds.units import human_bytes

if TYPE_CHECKING:  # it imports torch and DeepSpeed
    from relora_ds.optimizer.wrapper import RestartRecord

LINE_EVERY_S = 5.0
"""How often a progress line is printed where the output is not a terminal."""


class ProgressLine(Callback):
    """Shows, on rank 0, where the run stands: rewritten in place on a terminal, printed now and then elsewhere.

    Args:
        total: updates of the run.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.on_terminal = sys.stderr.isatty()
        self.last_line = 0.0
        self.times: deque[tuple[float, int]] = deque(maxlen=50)

    def update(self, run: RunState, record: dict[str, Any]) -> None:
        self.show(record)

    def restart(self, run: RunState, restart: RestartRecord) -> None:
        self.message(f"update {run.done.update}: {restart}")

    def evaluation(self, run: RunState, record: dict[str, Any]) -> None:
        loss, perplexity = record["eval_loss"], record["eval_perplexity"]
        self.message(f"update {record['update']}: validation loss {loss:.4f}, perplexity {perplexity:.3f}")

    def message(self, text: str) -> None:
        """Ends a line that is being rewritten, so that other output starts on its own."""
        if self.on_terminal and self.times:
            write("\n")
        say(text)

    def show(self, record: dict[str, Any]) -> None:
        """The line of an update, if it is time for one."""
        now, update = time.monotonic(), record["update"]
        self.times.append((now, update))
        is_last = update == self.total
        if not self.on_terminal and now - self.last_line < LINE_EVERY_S and not is_last:
            return
        self.last_line = now
        line = self._line(record, now, update)
        if self.on_terminal:
            write(f"\r\x1b[2K{line}" + ("\n" if is_last else ""))
        else:
            say(line)

    def _line(self, record: dict[str, Any], now: float, update: int) -> str:
        first, at = self.times[0]
        left = "?" if update == at else str(timedelta(seconds=round((now - first) / (update - at) * (self.total - update))))
        loss = "skipped" if record.get("skipped") else f"{record['loss']:.4f}"
        rates = "  ".join(f"{name} {record[name]:.2e}" for name in ("lr", "lora_lr") if name in record)
        return (
            f"{record['phase']:>4} {update}/{self.total}  loss {loss}  {rates}"
            f"  {record['tokens_per_s']:,.0f} tokens/s  sent {human_bytes(record['sent_bytes'])}"
            f"  restarts {record['restarts']}  ETA {left}"
        )
