"""The ranks' own times: what is counted, and when it is told."""

from __future__ import annotations

import pytest
import torch

from relora_ds.supervision import stragglers
from relora_ds.supervision.stragglers import RANK_TIMES_EVERY, OwnTime


def test_mean_over_the_updates_since_the_last_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(stragglers.time, "perf_counter", lambda: now)

    def one_update(own: OwnTime, batch_s: float, forward_s: float, other_s: float) -> None:
        nonlocal now
        with own.batch():
            now += batch_s
        with own.forward():
            now += forward_s
        now += other_s
        own.end_update()

    own = OwnTime(1, 3, torch.device("cpu"))
    assert own.slots(RANK_TIMES_EVERY, 100).numel() == 0, "no update is over yet"
    one_update(own, 1.0, 2.0, 10.0)
    one_update(own, 2.0, 3.0, 10.0)
    assert own.slots(RANK_TIMES_EVERY + 1, 100).numel() == 0, "not at every update"
    slots = own.slots(RANK_TIMES_EVERY, 100)
    assert slots.dtype == torch.float64 and slots.tolist() == [0.0, 4.0, 0.0]
    one_update(own, 0.0, 1.0, 0.0)
    assert own.slots(99, 99).tolist() == [0.0, 1.0, 0.0], "at the last update, too, and of those that were not told yet"


def test_on_cuda_events_are_read_when_the_update_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA's events, of which one is over only when the loss was read."""
    loss_was_read = False

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.recorded = False

        def record(self) -> None:
            self.recorded = True

        def elapsed_time(self, end: Event) -> float:
            assert self.recorded and end.recorded and loss_was_read
            return 250.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    own = OwnTime(0, 1, torch.device("cuda"))
    for _ in range(2):
        for _ in range(4):
            with own.forward():
                pass
        loss_was_read = True
        own.end_update()
        loss_was_read = False
    own.device = torch.device("cpu")  # where its slots go
    assert own.slots(RANK_TIMES_EVERY, 100).item() == pytest.approx(1.0)
