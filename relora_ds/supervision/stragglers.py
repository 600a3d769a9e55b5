"""How long each rank's own work takes: the batches and the forward passes, in which no rank waits for another.

The whole update takes the same time on all ranks, because they wait for the slowest; these parts of it tell which one that is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

RANK_TIMES_EVERY = 20
"""Updates between two exchanges of the ranks' times."""


class OwnTime:
    """The seconds of this rank's own work, as a mean over the updates since the last exchange.

    On CUDA the forward passes are timed by events, which are read when the update's loss has been read anyway: nothing waits for
    them. An update counts once :meth:`end_update` was called, so an exchange within an update tells of those before it.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        self.rank, self.world_size, self.device = rank, world_size, device
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._current_s = self._total_s = 0.0
        self._num_updates = 0

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Around getting a batch. It is read ahead, so a slow disk counts as far as the update has to wait for it."""
        started = time.perf_counter()
        yield
        self._current_s += time.perf_counter() - started

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward pass."""
        if self.device.type != "cuda":
            with self.batch():
                yield
            return
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        yield
        end.record()
        self._events.append((start, end))

    def end_update(self) -> None:
        """After the update's loss was read on the host: its events are over."""
        self._total_s += self._current_s + sum(start.elapsed_time(end) for start, end in self._events) / 1000  # from ms
        self._current_s, self._num_updates = 0.0, self._num_updates + 1
        self._events.clear()

    def slots(self, update: int, last: int) -> Tensor:
        """What this rank adds to an all-reduce, (world_size,) in float64: its seconds an update in its own slot; and begins anew.

        (0,) in updates without an exchange, and where no update is over yet; the same on all ranks.
        """
        if (update % RANK_TIMES_EVERY and update != last) or not self._num_updates:
            return torch.zeros(0, dtype=torch.float64, device=self.device)
        slots = torch.zeros(self.world_size, dtype=torch.float64, device=self.device)
        slots[self.rank] = self._total_s / self._num_updates
        self._total_s, self._num_updates = 0.0, 0
        return slots
