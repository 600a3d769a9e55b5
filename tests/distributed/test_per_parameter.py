"""An update that spares calls has the bits of one that makes them all."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import stage_1_and_2

import relora_ds
from relora_ds.engine import initialize
from tests.distributed import common
from tests.distributed.pool import run


def trained(spares: bool, dtype: str, accumulation: int, recomputes: bool, own_backward: bool) -> dict[str, Any]:
    """Six updates with two restarts, one of which is skipped in bf16: rank 1 alone has a gradient that is not finite."""
    do_once, count, counts = initialize.do_once, stage_1_and_2.count_used_parameters_in_backward, []
    if not spares:
        initialize.do_once = lambda zero: None

    def counted(params: Any) -> int:
        counts.append(len(params))
        return count(params)

    stage_1_and_2.count_used_parameters_in_backward = counted
    try:
        model = common.tiny_llama()
        if recomputes:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        config = common.deepspeed_config(dtype=dtype, accumulation=accumulation)
        engine, optimizer, *_ = relora_ds.initialize(model=model, config=config, relora={"rank": 3, "restart_every": 3})
        if recomputes:
            engine.module.enable_input_require_grads()
        losses, norms, skipped = [], [], []
        for update in range(6):
            for ids in common.my_rows(common.batch(update)).chunk(accumulation):
                loss = engine(input_ids=ids, labels=ids).loss
                if dtype == "bf16" and update == 4 and dist.get_rank() == 1:
                    loss = loss * math.inf
                loss.backward() if own_backward else engine.backward(loss)
                engine.step()
                losses.append(float(loss))
            norms.append(float(engine.get_global_grad_norm()))
            skipped.append(bool(optimizer.overflow))
        state = [param.detach().float().tolist() for param in engine.module.parameters()]
        common.end(engine)
        return {"weights": state, "losses": str(losses), "norms": norms, "skipped": skipped, "counts": len(counts)}
    finally:
        initialize.do_once, stage_1_and_2.count_used_parameters_in_backward = do_once, count


@pytest.mark.parametrize(
    ("dtype", "accumulation", "recomputes", "own_backward"),
    [
        ("bf16", 3, False, False),
        ("fp32", 1, False, True),
        ("fp32", 3, True, False),
        ("fp32", 1, True, True),
    ],
)
def test_no_bit_differs(dtype: str, accumulation: int, recomputes: bool, own_backward: bool) -> None:
    how = dtype, accumulation, recomputes, own_backward
    ours, theirs = run(2, trained, True, *how), run(2, trained, False, *how)
    for mine, default in zip(ours, theirs, strict=True):
        assert mine.pop("counts") == 0 < default.pop("counts")
        assert mine == default
        assert mine["skipped"] == [dtype == "bf16" and update == 4 for update in range(6)]
        assert torch.tensor(mine["weights"][0]).isfinite().all()
