"""metrics.jsonl, restarts.jsonl and ranks.jsonl."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from relora_ds.callbacks.callback import Callback, RunState
from relora_ds.run.folder import Log, truncate_log

if TYPE_CHECKING:  # it imports torch and DeepSpeed
    from relora_ds.optimizer.wrapper import RestartRecord


class MetricsLog(Callback):
    """Writes what happened, on rank 0; a line is on disk before the next update begins, unless the disk refuses it for a while."""

    def __init__(self, run: RunState) -> None:
        folder = run.folder
        self.metrics, self.restarts, self.ranks = (
            Log(path, run.tell) for path in (folder.metrics, folder.restarts, folder.ranks)
        )

    def begin(self, run: RunState) -> None:
        """Updates after the checkpoint that the run goes on from will be done again."""
        for log in (self.metrics, self.restarts, self.ranks):
            truncate_log(log.path, run.done.update)

    def update(self, run: RunState, record: dict[str, Any]) -> None:
        self.metrics.append(record)

    def evaluation(self, run: RunState, record: dict[str, Any]) -> None:
        self.metrics.append(record)

    def restart(self, run: RunState, restart: RestartRecord) -> None:
        self.restarts.append({"update": run.done.update, **restart.as_dict()})

    def rank_times(self, run: RunState, record: dict[str, Any]) -> None:
        self.ranks.append(record)
