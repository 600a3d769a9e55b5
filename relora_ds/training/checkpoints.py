"""When a run's checkpoints are written, and what becomes of one that cannot be."""

from __future__ import annotations

import time
from dataclasses import asdict

from relora_ds.callbacks.callback import RunState
from relora_ds.checkpoint import reader
from relora_ds.checkpoint.writer import Saver
from relora_ds.errors import TrainingError
from relora_ds.run.lock import RunLock
from relora_ds.supervision.watchdog import SAVE_S
from relora_ds.training.finite import refuse_not_finite

RETRY_S = 2.0
"""After so long the last checkpoint is tried again."""


class Checkpoints:
    """The checkpoints of a run: one at a time is on its way, while training goes on.

    Args:
        run: whose; nothing is read of it before :meth:`save`.
        lock: of the run's folder.
        digests: SHA-256 of the tokens that it is trained on.
    """

    def __init__(self, run: RunState, lock: RunLock, digests: dict[str, str]) -> None:
        self.run, self.digests = run, digests
        self.failed_in_a_row = 0
        train, settings = run.config.train, run.config.checkpoint
        self.saver = Saver(
            run.folder, run.place.rank, run.place.world_size, is_mine=lock.is_mine, self_contained=settings.self_contained,
            rotate=lambda: reader.rotate(
                run.folder, keep=train.keep, keep_every=train.keep_every, keep_first_base=train.keep_first_base
            ),
        )  # fmt: skip

    def save(self, *, wait: bool) -> None:
        """Begins to write a checkpoint, when the one before is complete; waits for it if asked, or if it is not asynchronous.

        One that is asked to be waited for, the last, is tried again where it could not be written.

        Raises:
            DivergedError: the weights are not finite.
            TrainingError: too many checkpoints in a row could not be written.
        """
        self.finish()
        run = self.run
        refuse_not_finite(run)
        self._start()
        for callback in run.callbacks:
            callback.checkpoint(run)
        if wait or not run.config.checkpoint.asynchronous:
            self.finish()
        while wait and self.failed_in_a_row:  # no later one will make up for it; it is given up as others are, by finish
            time.sleep(RETRY_S)
            self._start()
            self.finish()

    def _start(self) -> None:
        run = self.run
        self.saver.start(run.engine, reader.describe(run.engine, run.config, run.done, run.phase, self.digests), asdict(run.done))

    def finish(self) -> None:
        """Waits for the checkpoint on its way. One that could not be written is told of; too many in a row stop the run."""
        if not self.saver.is_busy:
            return
        run = self.run
        run.beat("all but the end of a checkpoint", allow_s=SAVE_S)  # a slow disk is no hang
        problem, limit = self.saver.finish(), run.config.checkpoint.max_failures
        run.beat("a checkpoint")
        self.failed_in_a_row = self.failed_in_a_row + 1 if problem else 0
        if problem:
            run.tell(
                f"a checkpoint could not be written ({self.failed_in_a_row} in a row): {problem}; "
                f"going on, the newest is {reader.newest_in_words(run.folder)}"
            )
        if self.failed_in_a_row >= limit:
            raise TrainingError(f"{limit} checkpoints in a row could not be written (checkpoint.max_failures={limit}): {problem}")
