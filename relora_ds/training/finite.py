"""No run goes on with weights that are no numbers any more."""

from __future__ import annotations

import torch
import torch.distributed as dist

from relora_ds.callbacks.callback import RunState
from relora_ds.checkpoint import reader
from relora_ds.comm.counter import CHECKPOINT, COUNTER
from relora_ds.errors import DivergedError
from relora_ds.models.finite import not_finite


def refuse_not_finite(run: RunState) -> None:
    """Stops a run whose weights are no numbers any more: it would neither recover nor say so, and no checkpoint may hold them.

    A collective of 4 bytes.

    Raises:
        DivergedError: on all ranks, if a weight of any is not finite.
    """
    broken = not_finite(run.engine.module)
    found = torch.tensor(broken is not None, dtype=torch.int32, device=run.device)
    with COUNTER.purpose(CHECKPOINT):
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    if found.item():
        raise DivergedError(
            f"the weights are not finite since update {run.done.update} ({broken or 'on another rank'}): lower optimizer.lr, or "
            f"clip gradients (optimizer.grad_clip={run.config.optimizer.grad_clip:g}); the newest checkpoint is "
            f"{reader.newest_in_words(run.folder)}"
        )
