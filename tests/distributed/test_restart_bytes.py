"""What a restart sends: no more than its bound, and to the same bits as if the masters had travelled whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import relora_ds
from relora_ds.method.frozen_weights import stored_tensors
from relora_ds.method.lora import relora_layers
from relora_ds.zero.rounding import MARK, differences
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
FEW_BYTES = 64
"""All-reduced besides: two comparisons of 16 bytes (copies before, weights after) and the number of entries kept."""


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
        marked = sum(
            int((differences(state.gather(name).flatten(), p.data.flatten()) == MARK).sum()) for name, p in state.params.items()
        )
        with Wire() as wire:
            record = optimizer.restart()
        sent = wire.sent_bytes + wire.scalar_bytes
        result[kind] = {
            "sent": sent,
            "payload": wire.payload_bytes,
            "recorded": record.bytes,
            "marked": marked,
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
        lacking = 0 if dtype == "fp32" else share * (2 * entries + 2 * 4 * by_rank[0]["marked"])
        selects = {"joint": tensors, "independent": 2 * tensors, "global": 1}.get(kind, 0)
        ties = 2 * 4 * (tensors + world_size)  # one count for each piece of a tensor, at most and for either moment
        assert sent <= lacking + 2 * share * (selects * COUNT_BYTES + ties + FEW_BYTES), f"{kind}: {by_rank[0]['calls']}"
        assert sent >= lacking
        for one in by_rank:
            assert one["recorded"] == one["payload"]


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


def gathered_both_ways(dtype: str, folder: str) -> dict[str, bool]:
    """Whether the masters from the copies are those from their owners, and whether copies are trusted when they should be."""
    engine = ready(dtype)
    state: ZeroState = engine.optimizer.masters
    names = list(state.params)

    def same() -> bool:
        by_copies = state.gather_by_copies(names)
        return all(torch.equal(by_copies[name].view(torch.int32), state.gather(name).view(torch.int32)) for name in names)

    result = {"after a step": state.copies_serve() and same()}
    engine.optimizer.restart()
    result["after a restart"] = state.copies_serve() and same()
    engine.save_checkpoint(folder)
    common.train_update(engine, 2)
    engine.load_checkpoint(folder)
    result["after a load"] = state.copies_serve() and same()
    common.train_update(engine, 2)
    last = dist.get_rank() == dist.get_world_size() - 1
    copy = state.params[names[3]].data.view(torch.uint8)
    copy[0, 1] ^= 4 if last else 0
    result["one copy differs"] = state.copies_serve()
    copy[0, 1] ^= 4 if last else 0
    original = {name: state.gather(name) for name in names}
    for param in state.params.values():
        param.data.mul_(2)
    result["all copies are others"] = state.copies_serve()
    for row, name in enumerate(names):
        state.write(name, awkward(state.params[name].shape, row))
    result["awkward"] = same()
    for name in names:
        state.write(name, original[name])
    common.end(engine)
    return result


@pytest.mark.parametrize(
    ("world_size", "dtype"), [(2, "fp32"), (2, "bf16"), (4, "bf16"), pytest.param(4, "fp16", marks=needs_fp16)]
)
def test_masters_from_copies_are_the_masters(world_size: int, dtype: str, tmp_path: Path) -> None:
    for result in run(world_size, gathered_both_ways, dtype, str(tmp_path)):
        assert result["after a step"] and result["after a restart"] and result["after a load"] and result["awkward"]
        assert not result["all copies are others"] and not result["one copy differs"]


def restarted(dtype: str, whole: bool) -> dict[str, Tensor]:
    """Merged weights and factors after a restart from given masters; these travel ``whole``, or what the copies lack of them."""
    engine = ready(dtype)
    optimizer = engine.optimizer
    state: ZeroState = optimizer.masters
    for row, name in enumerate(state.params):
        values = awkward(state.params[name].shape, row)
        state.write(name, torch.where(values.abs() < 1, values, 0.5))
    original = ZeroState.copies_serve
    served = state.copies_serve()
    if whole:
        ZeroState.copies_serve = lambda self: False
    try:
        optimizer.restart()
    finally:
        ZeroState.copies_serve = original
    left = {"served": torch.tensor(served)}
    for name, param in state.params.items():
        left |= {f"{name} module": param.data.clone(), f"{name} master": state.gather(name)}
    for name, layer in relora_layers(engine.module):
        left |= {what: stored.clone() for what, stored in stored_tensors(name, layer.weight)}
    common.end(engine)
    return left


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=needs_fp16)])
def test_a_restart_is_the_same_however_the_masters_travel(dtype: str) -> None:
    (expected,) = run(1, restarted, dtype, True)
    for world_size in (1, 2, 4):
        for left in run(world_size, restarted, dtype, False):
            assert left.pop("served"), "the short way was taken"
            for what, value in left.items():
                assert torch.equal(value.view(torch.uint8), expected[what].view(torch.uint8)), f"{what} at {world_size} ranks"
