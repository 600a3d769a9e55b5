"""The ranks' own times: what is counted, and when it is told."""

from __future__ import annotations

import time

import pytest
import torch

from relora_ds.stragglers import RANK_TIMES_EVERY, OwnTime


def one_update(own: OwnTime, batch_s: float, forward_s: float, other_s: float = 0.0) -> None:
    with own.batch():
        time.sleep(batch_s)
    with own.forward():
        time.sleep(forward_s)
    time.sleep(other_s)
    own.end_update()


def test_mean_over_the_updates_since_the_last_exchange() -> None:
    own = OwnTime(1, 3, torch.device("cpu"))
    assert own.slots(RANK_TIMES_EVERY, 100).numel() == 0, "no update is over yet"
    one_update(own, 0.01, 0.02, other_s=0.1)
    one_update(own, 0.02, 0.03)
    assert own.slots(RANK_TIMES_EVERY + 1, 100).numel() == 0, "not at every update"
    slots = own.slots(RANK_TIMES_EVERY, 100)
    assert slots.dtype == torch.float64 and slots[0] == slots[2] == 0.0
    assert slots[1].item() == pytest.approx(0.04, abs=0.015)
    one_update(own, 0.0, 0.01)
    assert own.slots(100, 100)[1].item() == pytest.approx(0.01, abs=0.008), "at the last update, too; the earlier ones are told"
