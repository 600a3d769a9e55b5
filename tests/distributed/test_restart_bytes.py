"""What a restart sends, no more than its bound; and what it leaves, the same bits for any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import relora_ds
from relora_ds.bandwidth import estimates
from relora_ds.comm.counter import COUNTER, RESTART
from relora_ds.method.frozen_weights import stored_tensors
from relora_ds.method.lora import relora_layers
from relora_ds.zero.state import ZeroState
from tests.distributed import common
from tests.distributed.pool import run
from tests.fp16 import needs_fp16
from tests.wire import Wire

WIDE = {"hidden_size": 128, "intermediate_size": 352}
RESETS: dict[str, dict[str, Any]] = {
    "joint": {"kind": "magnitude", "ratio": 0.9, "mask": "joint"},
    "independent": {"kind": "magnitude", "ratio": 0.9, "mask": "independent"},
    "global": {"kind": "magnitude", "ratio": 0.9, "scope": "global"},
    "random": {"kind": "random", "ratio": 0.9},
    "full": {"kind": "full"},
}
COUNT_BYTES = 8 * 16 * 4
"""Of one radix select of a tensor: eight digits, 16 bins each, int32."""
FEW_BYTES = 48
"""All-reduced besides: a comparison of 16 bytes and the number of entries kept."""


def ready(dtype: str, **sizes: int) -> Any:
    """An engine whose factors have learnt a little."""
    model, relora = common.tiny_llama(**sizes), {"rank": 8, "restart_every": 1000, "restart_warmup": 0}
    config = common.deepspeed_config(dtype=dtype)
    if dtype == "fp16":
        config["fp16"]["initial_scale_power"] = 8
    engine = relora_ds.initialize(model=model, config=config, relora=relora)[0]
    for update in range(2):
        common.train_update(engine, update)
    return engine


def bytes_of_restarts(dtype: str) -> dict[str, Any]:
    """One restart for each kind of reset, with an update between them."""
    engine = ready(dtype, **WIDE)
    optimizer, state = engine.optimizer, engine.optimizer.masters
    result: dict[str, Any] = {"entries": sum(p.numel() for p in state.params.values()), "tensors": len(state.params)}
    for kind, reset in RESETS.items():
        optimizer.settings = optimizer.settings.model_copy(update={"reset": optimizer.settings.reset.model_validate(reset)})
        with Wire() as wire:
            record = optimizer.restart()
        sent = wire.sent_bytes + wire.scalar_bytes
        result[kind] = {
            "sent": sent,
            "payload": wire.payload_bytes,
            "recorded": record.bytes,
            "calls": wire.calls,
        }
        common.train_update(engine, 2)
    common.end(engine)
    return result


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", pytest.param("fp16", marks=needs_fp16)])
def test_a_restart_sends_its_bound_at_most(world_size: int, dtype: str) -> None:
    results = run(world_size, bytes_of_restarts, dtype)
    entries, tensors = results[0]["entries"], results[0]["tensors"]
    share = (world_size - 1) / world_size
    for kind in RESETS:
        by_rank = [result[kind] for result in results]
        sent = sum(one["sent"] for one in by_rank) / world_size
        assert sent <= 64 * 1024 + 4 * entries, f"{kind}: {by_rank[0]['calls']}"
        masters = share * 4 * entries
        selects = {"joint": tensors, "independent": 2 * tensors, "global": 1}.get(kind, 0)
        ties = 2 * 4 * (tensors + world_size)  # one count for each piece of a tensor, at most and for either moment
        assert sent <= masters + 2 * share * (selects * COUNT_BYTES + ties + FEW_BYTES), f"{kind}: {by_rank[0]['calls']}"
        assert sent >= masters
        for one in by_rank:
            assert one["recorded"] == one["payload"]


def bytes_from_the_residual() -> tuple[float, float]:
    """(counted as rings send, estimated) of one restart whose factors begin with what int8 lost."""
    frozen = {"dtype": "int8", "group_size": 16, "master": "sharded"}
    relora = {"rank": 8, "restart_every": 1000, "restart_warmup": 0, "init": "residual", "frozen": frozen}
    engine = common.build(common.tiny_llama(**WIDE), relora)
    common.train_update(engine, 0)
    before = COUNTER.wire_bytes((RESTART,))
    engine.optimizer.restart()
    counted = COUNTER.wire_bytes((RESTART,)) - before
    told = estimates.restart(engine.module, engine.optimizer.settings, dist.get_world_size())
    common.end(engine)
    return counted, told


@pytest.mark.parametrize("world_size", [2, common.long(3)])
def test_what_residual_factors_send_is_foretold(world_size: int) -> None:
    """All but the selection's scalars and the comparison."""
    results = run(world_size, bytes_from_the_residual)
    counted, told = (sum(one) / world_size for one in zip(*results, strict=True))
    assert counted == pytest.approx(told, rel=0.01)


def awkward(shape: torch.Size, seed: int) -> Tensor:
    """Normal numbers, and where rounding is awkward: ties of bf16, zeros of both signs, subnormals, large ones, up to infinity."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * 0.1
    kind = torch.randint(0, 24, shape, generator=generator)
    pattern = values.view(torch.int32)
    pattern[kind < 4] = (pattern[kind < 4] & ~0xFFFF) | 0x8000
    for index, special in enumerate(
        (0.0, -0.0, 1e-41, -3e-8, 65519.9, torch.finfo(torch.float32).max, -float("inf"), float("nan"))
    ):
        values[kind == 4 + index] = special
    return values


def restarted(dtype: str) -> dict[str, Tensor]:
    """Merged weights and factors after a restart from given masters."""
    engine = ready(dtype)
    state: ZeroState = engine.optimizer.masters
    for row, name in enumerate(state.params):
        values = awkward(state.params[name].shape, row)
        state.write(name, torch.where(values.abs() < 1, values, 0.5))
    engine.optimizer.restart()
    left = {}
    for name, param in state.params.items():
        left |= {f"{name} module": param.data.clone(), f"{name} master": state.gather(name)}
    for name, layer in relora_layers(engine.module):
        left |= {what: stored.clone() for what, stored in stored_tensors(name, layer.weight)}
    common.end(engine)
    return left


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=needs_fp16)])
def test_a_restart_is_the_same_for_any_number_of_ranks(dtype: str) -> None:
    (expected,) = run(1, restarted, dtype)
    for world_size in (2, 4):
        for left in run(world_size, restarted, dtype):
            for what, value in left.items():
                assert torch.equal(value.view(torch.uint8), expected[what].view(torch.uint8)), f"{what} at {world_size} ranks"
