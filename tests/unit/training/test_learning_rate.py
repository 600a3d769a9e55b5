"""The learning rates of a recipe's parameter groups."""

from __future__ import annotations

import pytest

from relora_ds.config import parse
from relora_ds.training.learning_rate import set_learning_rates

SETTINGS = {
    "model": {"preset": "llama_60m"},
    "data": {"path": "none", "sequence_length": 32},
    "relora": {"rank": 4, "warm_start": 10, "restart_every": 20, "restart_warmup": 2},
    "optimizer": {"lr": 1e-3, "lora_lr": 4e-3, "warmup": 5, "schedule": "constant"},
    "train": {"updates": 100, "global_batch": 8, "micro_batch": 2},
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "run": {"dir": "none"},
}


@pytest.mark.parametrize(
    ("update", "share"), [(1, 0.0), (3, 0.4), (6, 1.0), (10, 1.0), (11, 0.0), (13, 0.4), (60, 1.0)], ids=lambda value: str(value)
)
def test_every_phase_warms_up_and_the_factors_have_their_own_peak(update: int, share: float) -> None:
    groups = [{"name": "matrices", "lr": 9.0}, {"name": "lora", "lr": 9.0}]
    set_learning_rates(groups, parse(SETTINGS), update)
    assert [group["lr"] for group in groups] == pytest.approx([1e-3 * share, 4e-3 * share])
