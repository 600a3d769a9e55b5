"""The run that the tests of checkpoints and of damage share."""

from __future__ import annotations

import copy
from typing import Any

import pytest


@pytest.fixture
def content(settings: dict[str, Any]) -> dict[str, Any]:
    """Warm start of 4 updates, restarts after 8, 12 and 16 of 18, no dropout: any number of ranks sees the same."""
    content = copy.deepcopy(settings)
    content["relora"] = {"rank": 4, "alpha": 8, "warm_start": 4, "restart_every": 4, "restart_warmup": 2}
    content["optimizer"] = {"lr": 2e-3, "lora_lr": 4e-3, "warmup": 2}
    content["train"] = {"updates": 18, "global_batch": 12, "micro_batch": 2, "eval_every": 9, "checkpoint_every": 3, "keep": 9}
    content["wandb"] = {"mode": "disabled"}
    return content
