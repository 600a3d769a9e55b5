"""Batches read ahead: while one is computed, a thread reads those that come next.

Which samples come next is known beforehand (:mod:`relora_ds.data.token_dataset`), so nothing here is state: a resumed run reads on
from its own update.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from queue import SimpleQueue

import torch
from torch import Tensor

from relora_ds.data.token_dataset import TokenDataset

DEPTH = 4
"""Batches that are read ahead."""
CLOSE_S = 10.0
"""So long the end of a run waits for a disk that does not answer."""


class Prefetch:
    """Batches of a dataset in an order that is known beforehand, the next few of which a thread reads.

    The thread calls ``dataset.batch`` and nothing else: it draws no random numbers and touches no GPU. It ends at :meth:`close`, or
    with this object, or with the process, whichever comes first.

    Args:
        dataset: has the samples.
        order: of each batch the numbers of its samples; asked for no further than is read ahead.
        device: where the batches are to be.
        depth: so many are read ahead, at most.
    """

    def __init__(self, dataset: TokenDataset, order: Iterable[Sequence[int]], device: torch.device, depth: int = DEPTH) -> None:
        self._order, self._device, self._depth = iter(order), device, depth
        self._ahead: deque[Sequence[int]] = deque()
        asked: SimpleQueue[Sequence[int] | None] = SimpleQueue()
        closing = threading.Event()
        self._asked = asked
        self._found: SimpleQueue[Tensor | BaseException] = SimpleQueue()
        # The thread knows the queues and not this object, which would live as long as it does otherwise.
        self._thread = threading.Thread(target=_read, args=(dataset, asked, self._found, closing), name="batches", daemon=True)
        self._end = weakref.finalize(self, _end, asked, closing)
        self._thread.start()

    def batch(self, samples: Sequence[int]) -> Tensor:
        """The next batch, (len(samples), T) int64 on the device. A copy to a GPU comes in its turn: nothing waits for it.

        Args:
            samples: the numbers of its samples, as ``order`` gives them.

        Raises:
            ValueError: another batch is the next one.
            Exception: what reading this batch raised in the thread.
        """
        while len(self._ahead) <= self._depth and (following := next(self._order, None)) is not None:
            self._ahead.append(following)
            self._asked.put(following)
        due = self._ahead.popleft() if self._ahead else None
        if due != samples:
            raise ValueError(f"the next batch is {due}, not {samples}")
        found = self._found.get()
        if isinstance(found, BaseException):
            raise found
        if self._device.type == "cuda":
            return found.pin_memory().to(self._device, non_blocking=True)
        return found.to(self._device)

    def close(self) -> None:
        """Ends the thread. Only a disk that does not answer leaves it behind, until the process ends."""
        self._order = iter(())
        self._ahead.clear()
        self._end()
        self._thread.join(CLOSE_S)


# In the thread


def _read(
    dataset: TokenDataset,
    asked: SimpleQueue[Sequence[int] | None],
    found: SimpleQueue[Tensor | BaseException],
    closing: threading.Event,
) -> None:
    while (samples := asked.get()) is not None and not closing.is_set():
        try:
            found.put(dataset.batch(samples))
        except BaseException as error:  # or whoever waits for this batch would wait for ever
            found.put(error)


def _end(asked: SimpleQueue[Sequence[int] | None], closing: threading.Event) -> None:
    """Has the thread read no more."""
    closing.set()
    asked.put(None)
