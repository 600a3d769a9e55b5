"""The training loop."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from relora_ds import environment
from relora_ds.callbacks.callback import Callback
from relora_ds.checkpoint.universal import ConversionError
from relora_ds.checkpoint.writer import FencedError
from relora_ds.errors import EXIT_DONE, EXIT_STOPPED, ConfigError, RestartError, StartError, TrainingError
from relora_ds.launch.places import Place
from relora_ds.supervision import faults
from relora_ds.supervision.stop import StopSignal
from relora_ds.training.preflight import Checked
from relora_ds.training.trainer import Trainer

EXPECTED = (TrainingError, FencedError, ConversionError, ConfigError, RestartError)
"""Errors that end a run in order, on all ranks, with a line to the user: no faults of a rank."""


def train(
    checked: Checked, place: Place, device: torch.device, stop: StopSignal | None = None, callbacks: Iterable[Callback] = ()
) -> int:
    """Trains to the last update, or until a signal; resumes by itself. Returns the exit code, the same on all ranks.

    A signal that comes while the model is built stops the run after its first update.

    Args:
        checked: the recipe, and what was found about it.
        place, device: of this rank.
        stop: the wish to stop; None for the recipe's signal.
        callbacks: that hear of the run, behind its own.

    Raises:
        ConfigError, TrainingError, FencedError, ConversionError, RestartError: on all ranks.
    """
    config = checked.config
    stop = stop or StopSignal(config.train.stop_signal)
    try:
        trainer = Trainer(checked, place, device, callbacks)
    except BaseException as error:
        record_fault(error, checked, place, update=0)
        raise
    code = EXIT_DONE
    try:
        trainer.begin()
        for update in range(trainer.done.update + 1, config.total_updates + 1):
            trainer.enter_phase(update)
            is_asked_to_stop, is_last = trainer.update(update, stop.requested), update == config.total_updates
            stopping = is_asked_to_stop and not is_last
            if stopping:
                trainer.save(wait=True)  # first: what stops a run may not leave it the time for an evaluation
            if is_last or update == config.full_updates or _is_due(config.train.eval_every, update):
                trainer.evaluate()
            if stopping:
                trainer.tell(
                    f"stopped by a signal after update {update}; a checkpoint is written: run the same command to resume"
                )
                code = EXIT_STOPPED
                break
            if is_last or update == config.first_base_update or _is_due(config.train.checkpoint_every, update):
                trainer.save(wait=is_last)
    except BaseException as error:
        trainer.watchdog.stop()
        record_fault(error, checked, place, trainer.update_in_progress)  # at once: the other ranks' errors follow
        trainer.checkpoints.saver.abandon()
        try:
            trainer.close(exit_code=1)
        finally:
            raise error  # what ended the run, and not what a callback raises at its end
    trainer.close(exit_code=code)
    return code


def _is_due(every: int | None, update: int) -> bool:
    return every is not None and update % every == 0


def record_fault(error: BaseException, checked: Checked, place: Place, update: int) -> None:
    """Notes an error that nobody foresaw in faults.jsonl; one of the run's folder is rank 0's alone, who met it."""
    is_others = isinstance(error, StartError) and not place.is_main
    if isinstance(error, Exception) and not isinstance(error, EXPECTED) and not is_others:
        faults.record(
            Path(checked.config.run.dir), kind="error", attempt=environment.attempt(), rank=place.rank, host=environment.node_name(),
            update=update, detail=faults.describe(error),
        )  # fmt: skip
