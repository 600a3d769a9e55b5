"""What a run tells while it trains, on rank 0 only: metrics.jsonl, restarts.jsonl, ranks.jsonl, wandb, progress on the screen."""

from __future__ import annotations

import sys
import time
import uuid
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

from relora_ds.config import Config
from relora_ds.run_folder import Log, RunFolder, finite, write_atomically
from relora_ds.units import human_bytes

LINE_EVERY_S = 5.0
"""How often a progress line is printed where the output is not a terminal."""


def say(text: str) -> None:
    """One line to the user."""
    print(f"[relora-ds] {text}", file=sys.stderr, flush=True)


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
            f"  restarts {record['restarts']}  left {left}"
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
        self.wandb = _start_wandb(config, folder, self.note)

    def update(self, record: dict[str, Any]) -> None:
        self.log.append(record)
        self.progress.show(record)
        self._to_wandb("train", record)

    def evaluation(self, record: dict[str, Any]) -> None:
        self.log.append(record)
        self.progress.break_line()
        say(f"update {record['update']}: held-out loss {record['eval_loss']:.4f}, perplexity {record['eval_perplexity']:.3f}")
        self._to_wandb("eval", record)

    def restart(self, record: dict[str, Any]) -> None:
        self.restarts.append(record)
        self.progress.break_line()
        say(
            f"update {record['update']}: restart {record['restart']}, merged change {record['merged_change']:.2%} of W, "
            f"{record['pruned_fraction']:.1%} of the moments pruned, {record['seconds']:.2f} s"
        )
        self._to_wandb("restart", record)

    def note(self, text: str) -> None:
        self.progress.break_line()
        say(text)

    def close(self, exit_code: int) -> None:
        if self.wandb is not None:
            self.wandb.finish(exit_code=exit_code)

    def _to_wandb(self, section: str, record: dict[str, Any]) -> None:
        if self.wandb is not None:
            values = {f"{section}/{key}": value for key, value in finite(record).items() if key != "update" and value is not None}
            self.wandb.log(values, step=record["update"])


def _start_wandb(config: Config, folder: RunFolder, tell: Callable[[str], None]) -> Any:
    """A wandb run that keeps its id over resumes; None when disabled. Offline without an API key, and where the server does not let
    it in, as on compute nodes without the internet: a run does not end for that."""
    mode = config.wandb.mode
    if mode == "disabled":
        return None
    import wandb

    if mode == "auto":
        mode = "online" if wandb.api.api_key else "offline"  # from WANDB_API_KEY or a netrc file
    if not folder.wandb_id.exists():
        write_atomically(folder.wandb_id, uuid.uuid4().hex[:8])
    begin = partial(
        wandb.init, project=config.wandb.project, name=config.wandb.name or folder.path.name,
        id=folder.wandb_id.read_text(encoding="utf-8").strip(), resume="allow", dir=str(folder.path),
        config=config.model_dump(mode="json"), settings=wandb.Settings(silent=True),
    )  # fmt: skip
    try:
        return begin(mode=mode)
    except wandb.errors.Error as error:
        if mode == "offline":
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        tell(f"wandb goes on offline ({reason}); later: wandb sync {folder.path}/wandb/offline-run-*")
        wandb.teardown()  # its service holds the id for the run that failed (wandb/wandb#9865)
        return begin(mode="offline")
