"""fp16 with its skipped updates, and the optimizer offloaded to the CPU: served as DeepSpeed serves them."""

from __future__ import annotations

from typing import Any

import pytest

import relora_ds
from tests.distributed import common
from tests.distributed.pool import run


def train(updates: int, **changes: Any) -> dict[str, Any]:
    scale_power = changes.pop("initial_scale_power", None)
    config = common.deepspeed_config(**changes)
    if scale_power is not None:
        config["fp16"]["initial_scale_power"] = scale_power
    engine, optimizer, _, _ = relora_ds.initialize(
        model=common.tiny_llama(), config=config, relora={"rank": 3, "restart_every": 4, "restart_warmup": 0}
    )
    losses, applied, restarts = [], [], []
    for _ in range(updates):
        losses.append(common.train_update(engine, 0))
        applied.append(engine.was_step_applied())
        restarts.append(optimizer.restarts)
    result = {"losses": losses, "applied": applied, "restarts": restarts, "scale": optimizer.cur_scale}
    common.end(engine)
    return result


def test_fp16_loss_scaling_skips_and_restarts() -> None:
    """The scale starts too high on purpose: the first updates overflow, are skipped on both ranks, and count for the restarts."""
    first, second = run(2, overflowing_fp16)
    assert first == second
    assert first["applied"][:3] == [False, False, False]
    assert sum(first["applied"][-9:]) >= 7, "once the scale fits, updates are applied, but for one now and then"
    assert first["scale"] < 2.0**22
    assert first["restarts"] == [update // 4 for update in range(1, 17)]
    assert first["losses"][2] == first["losses"][0], "skipped updates, and a restart after one, change nothing"
    assert first["losses"][-1] < first["losses"][0] - 0.3


def overflowing_fp16() -> dict[str, Any]:
    return train(16, dtype="fp16", initial_scale_power=22)


def offloaded(device: str) -> dict[str, Any]:
    return train(10, offload_optimizer={"device": device, "pin_memory": False})


def test_cpu_offload_of_the_optimizer() -> None:
    there, here = run(2, offloaded, "cpu")[0], run(2, offloaded, "none")[0]
    assert there["losses"] == pytest.approx(here["losses"], rel=1e-5)
    assert there["restarts"][-1] == 2
