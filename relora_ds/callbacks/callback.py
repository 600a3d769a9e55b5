"""What hangs on the training loop, and what it may know of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from relora_ds.checkpoint.reader import Progress
from relora_ds.config import Config
from relora_ds.launch.places import Place
from relora_ds.run.folder import RunFolder

if TYPE_CHECKING:
    from relora_ds.optimizer.wrapper import RestartRecord


class RunState:
    """Where a run stands on one rank, and who hears of it.

    Attributes:
        config: the recipe, as it was resolved.
        folder: of the run.
        place: this rank among all.
        device: of this rank.
        engine: DeepSpeed's, of the current phase.
        phase: ``full`` or ``lora``.
        update_in_progress: or the last one done between two; 0 before the first.
        done: the progress that a checkpoint keeps.
        callbacks: who hears of it, in this order.
    """

    def __init__(self, config: Config, folder: RunFolder, place: Place, device: torch.device) -> None:
        self.config, self.folder, self.place, self.device = config, folder, place, device
        self.engine: Any = None
        self.phase: str = config.phase_of(1)
        self.update_in_progress = 0
        self.done = Progress()
        self.callbacks: list[Callback] = []

    def tell(self, text: str) -> None:
        """One line to the user; from rank 0, where alone somebody listens."""
        for callback in self.callbacks:
            callback.message(text)

    def beat(self, where: str, allow_s: float = 0.0) -> None:
        """Something is done; all ranks call it for the same things.

        Args:
            where: what.
            allow_s: what follows may take so many seconds, however soon a hang would be seen otherwise.
        """
        for callback in self.callbacks:
            callback.beat(where, allow_s)


class Callback:
    """Hears what happens in the training loop. Every method does nothing by default.

    All ranks call the same methods in the same order, so one that every rank has may run collectives. What it raises ends the run.
    ``record`` is what goes into metrics.jsonl and ranks.jsonl; a callback may add fields for those behind it.
    """

    def begin(self, run: RunState) -> None:
        """Engine and progress are there; the first update comes next."""

    def begin_update(self, run: RunState) -> None:
        """``run.update_in_progress`` begins."""

    def beat(self, where: str, allow_s: float) -> None:
        """Something is done: a micro batch, an update, a batch of the evaluation, a checkpoint."""

    def update(self, run: RunState, record: dict[str, Any]) -> None:
        """An update is done."""

    def rank_times(self, run: RunState, record: dict[str, Any]) -> None:
        """Now and then: what each rank's own work takes."""

    def restart(self, run: RunState, restart: RestartRecord) -> None:
        """The factors were restarted in the update that is done."""

    def evaluation(self, run: RunState, record: dict[str, Any]) -> None:
        """The validation loss is known."""

    def checkpoint(self, run: RunState) -> None:
        """A checkpoint of the updates done begins to be written."""

    def message(self, text: str) -> None:
        """One line to the user."""

    def end(self, exit_code: int) -> None:
        """The run is over on this rank, in order or by an error."""
