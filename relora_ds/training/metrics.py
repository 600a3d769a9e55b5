"""What a run tells while it trains, on rank 0 only: metrics.jsonl, restarts.jsonl, ranks.jsonl, wandb, progress on the screen."""

from __future__ import annotations

import sys
import time
from collections import deque
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from relora_ds.config import Config
from relora_ds.console import say
from relora_ds.environment import process_environment
from relora_ds.run.folder import Log, RunFolder, finite
from relora_ds.training.tracking import Tracker
from relora_ds.units import human_bytes

if TYPE_CHECKING:  # it imports torch and DeepSpeed
    from relora_ds.optimizer.wrapper import RestartRecord

LINE_EVERY_S = 5.0
"""How often a progress line is printed where the output is not a terminal."""


class Progress:
    """The state of the run in one line: rewritten in place on a terminal, printed now and then elsewhere."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.on_terminal = sys.stderr.isatty()
        self.last_line = 0.0
        self.times: deque[tuple[float, int]] = deque(maxlen=50)

    def show(self, record: dict[str, Any]) -> None:
        now, update = time.monotonic(), record["update"]
        self.times.append((now, update))
        is_last = update == self.total
        if not self.on_terminal and now - self.last_line < LINE_EVERY_S and not is_last:
            return
        self.last_line = now
        line = self._line(record, now, update)
        if self.on_terminal:
            sys.stderr.write(f"\r\x1b[2K{line}" + ("\n" if is_last else ""))
            sys.stderr.flush()
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

    def break_line(self) -> None:
        """Ends a line that is being rewritten, so that other output starts on its own."""
        if self.on_terminal and self.times:
            sys.stderr.write("\n")


class Metrics:
    """Writes what happened; a line is on disk before the next update begins, unless the disk refuses it for a while."""

    def __init__(self, config: Config, folder: RunFolder) -> None:
        self.folder = folder
        self.progress = Progress(config.total_updates)
        self.log, self.restarts, self.ranks = (Log(path, self.note) for path in (folder.metrics, folder.restarts, folder.ranks))
        self.wandb = Tracker(config, folder, process_environment(), self.note)

    def update(self, record: dict[str, Any]) -> None:
        self.log.append(record)
        self.progress.show(record)
        self._to_wandb("train", record)

    def evaluation(self, record: dict[str, Any]) -> None:
        self.log.append(record)
        self.progress.break_line()
        say(f"update {record['update']}: validation loss {record['eval_loss']:.4f}, perplexity {record['eval_perplexity']:.3f}")
        self._to_wandb("eval", record)

    def restart(self, update: int, restart: RestartRecord) -> None:
        record = {"update": update, **restart.as_dict()}
        self.restarts.append(record)
        self.note(f"update {update}: {restart}")
        self._to_wandb("restart", record)

    def note(self, text: str) -> None:
        self.progress.break_line()
        say(text)

    def close(self, exit_code: int) -> None:
        self.wandb.finish(exit_code)

    def _to_wandb(self, section: str, record: dict[str, Any]) -> None:
        values = {f"{section}/{key}": value for key, value in finite(record).items() if key != "update" and value is not None}
        self.wandb.log(values, step=record["update"])
