"""Gradients travel once per update, and each piece to its owner alone: bytes, losses and gradients against DeepSpeed's own way."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

import relora_ds
from relora_ds.zero import gradient_reduction as reduction
from tests.distributed import common
from tests.distributed.pool import run
from tests.fp16 import needs_fp16
from tests.wire import Wire

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
WIDE = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 352}
"""About 1.1M trainable parameters: what the alignment of partitions adds (at most 2N entries a group) is far below 0.1% of them."""
SCALAR_BYTES = 64
"""Per update: the norm of each of three groups (fp32), the overflow flag (1 byte) and this test's loss (fp64), each all-reduced,
which sends at most twice its bytes: 2·(3·4 + 1 + 8) = 42."""


def traffic(relora: bool, dtype: str, stage: int, accumulation: int, own_way: bool, zero: dict[str, Any]) -> dict[str, Any]:
    """What an update sends on this rank, beside the floor: the mean over two updates, after one to warm up."""
    changes = {**zero, "reduce_scatter": not own_way}
    config = common.deepspeed_config(stage=stage, dtype=dtype, accumulation=accumulation, **changes)
    settings = {"rank": 8, "restart_every": 100, "restart_warmup": 0} if relora else None
    engine, *_ = relora_ds.initialize(model=common.tiny_llama(**WIDE), config=config, relora=settings)
    common.train_update(engine, 0)
    with Wire() as wire:
        for update in (1, 2):
            common.train_update(engine, update)
    trainable = sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
    world_size = dist.get_world_size()
    result = {
        "trainable": trainable,
        "floor": 2 * (world_size - 1) / world_size * BYTES[dtype] * trainable,
        "sent": wire.sent_bytes / 2,
        "scalars": wire.scalar_bytes / 2,
        "calls": {kind: count / 2 for kind, count in wire.calls.items()},
    }
    common.end(engine)
    return result


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    ("world_size", "stage", "dtype", "relora", "zero"),
    [
        (2, 2, "bf16", True, {}),
        (2, 1, "fp32", True, {}),
        (2, 2, "fp32", True, {"contiguous_gradients": False, "overlap_comm": True}),
        (4, 2, "bf16", True, {"overlap_comm": True, "reduce_bucket_size": 200_000}),
        (4, 1, "bf16", False, {}),
        (4, 2, "fp32", False, {"use_multi_rank_bucket_allreduce": False}),
    ],
)
def test_an_update_sends_its_gradients_and_parameters_once(
    world_size: int, stage: int, dtype: str, relora: bool, zero: dict[str, Any], accumulation: int
) -> None:
    results = run(world_size, traffic, relora, dtype, stage, accumulation, False, zero)
    floor = results[0]["floor"]
    assert results[0]["trainable"] > 1_000_000
    mean = sum(result["sent"] for result in results) / world_size  # a rank that owns a little more sends a little less
    assert mean <= 1.02 * floor, f"{mean / floor:.3f} of the floor: {results[0]['calls']}"
    for result in results:
        assert result["sent"] <= 1.02 * floor
        assert result["scalars"] <= SCALAR_BYTES
        assert set(result["calls"]) == {"alltoall_base", "allgather_base"}, "nothing large is all-reduced"
        assert result["calls"]["allgather_base"] <= 3, "one for each group"
        if "reduce_bucket_size" not in zero:
            assert result["calls"]["alltoall_base"] == 1, "one bucket, once per update, whatever the accumulation"


def test_the_count_sees_an_all_reduce() -> None:
    """DeepSpeed's own way, kept by ``reduce_scatter: false``, is what the test above has to catch."""
    one = run(2, traffic, True, "bf16", 2, 1, True, {})[0]
    three = run(2, traffic, True, "bf16", 2, 3, True, {})[0]
    assert one["sent"] == pytest.approx(1.5 * one["floor"], rel=0.01)
    assert three["sent"] == pytest.approx(3.5 * three["floor"], rel=0.01), "three all-reduces and one all-gather"


def losses(own_way: bool, model: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Twelve updates and three restarts."""
    content = {**changes, "reduce_scatter": not own_way}
    accumulates_in = content.pop("accumulates_in", None)
    wire = content.pop("wire", None)
    config = common.deepspeed_config(**content)
    if accumulates_in:
        config["data_types"] = {"grad_accum_dtype": accumulates_in}
    if wire:
        config["communication_data_type"] = wire
    if content.get("dtype") == "fp16":
        config["fp16"]["initial_scale_power"] = 8
    module = {"llama": common.tiny_llama, "gpt2": common.tiny_gpt2}[model]()
    relora = {"rank": 3, "restart_every": 3, "restart_warmup": 1}
    engine, optimizer, *_ = relora_ds.initialize(model=module, config=config, relora=relora)
    values, norms = [], []
    for update in range(12):
        values.append(common.train_update(engine, update % 3))
        norms.append(float(engine.get_global_grad_norm()))
    result = {"losses": values, "norms": norms, "restarts": optimizer.restarts}
    common.end(engine)
    return result


@pytest.mark.parametrize(
    ("world_size", "model", "changes"),
    [
        (1, "llama", {"stage": 2, "accumulation": 3}),
        common.long(2, "llama", {"stage": 1, "accumulation": 3}),
        (2, "llama", {"stage": 2, "accumulation": 3, "overlap_comm": True}),
        common.long(2, "llama", {"stage": 2, "accumulation": 3, "contiguous_gradients": False}),
        common.long(2, "llama", {"stage": 1, "accumulation": 1, "contiguous_gradients": False}),
        common.long(2, "llama", {"stage": 2, "accumulation": 1, "contiguous_gradients": False, "overlap_comm": True}),
        (2, "llama", {"stage": 2, "accumulation": 3, "offload_optimizer": {"device": "cpu", "pin_memory": False}}),
        common.long(2, "llama", {"stage": 1, "accumulation": 3, "offload_optimizer": {"device": "cpu", "pin_memory": False}}),
        common.long(2, "llama", {"stage": 2, "accumulation": 3, "reduce_bucket_size": 700}),
        (3, "gpt2", {"stage": 2, "accumulation": 2}),
        common.long(4, "gpt2", {"stage": 1, "accumulation": 1}),
        common.long(4, "llama", {"stage": 2, "accumulation": 3, "reduce_bucket_size": 2000}),
        (2, "llama", {"stage": 2, "accumulation": 3, "dtype": "bf16"}),
        (2, "llama", {"stage": 2, "accumulation": 3, "dtype": "bf16", "accumulates_in": "fp32"}),
        common.long(2, "llama", {"stage": 2, "accumulation": 1, "dtype": "bf16", "accumulates_in": "fp32"}),
        common.long(2, "llama", {
            "stage": 2, "accumulation": 3, "dtype": "bf16", "accumulates_in": "fp32", "contiguous_gradients": False,
        }),
        common.long(2, "llama", {
            "stage": 2, "accumulation": 3, "dtype": "bf16", "accumulates_in": "fp32",
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
        }),
        common.long(2, "llama", {"stage": 2, "accumulation": 3, "dtype": "bf16", "wire": "fp32"}),
        common.long(2, "llama", {"stage": 1, "accumulation": 3, "dtype": "bf16"}),
        pytest.param(3, "llama", {"stage": 2, "accumulation": 2, "dtype": "fp16"}, marks=needs_fp16),
    ],
)  # fmt: skip
def test_losses_over_restarts_are_those_of_deepspeeds_own_way(world_size: int, model: str, changes: dict[str, Any]) -> None:
    """The first two updates to the rounding of the sums; later ones as far as Adam lets such differences grow."""
    ours, theirs = run(world_size, losses, False, model, changes), run(world_size, losses, True, model, changes)
    is_fp32 = changes.get("dtype", "fp32") == "fp32"
    for mine, default in zip(ours, theirs, strict=True):
        assert mine["restarts"] == default["restarts"] == 4
        assert mine["norms"][:2] == pytest.approx(default["norms"][:2], rel=1e-5 if is_fp32 else 2e-2)
        assert mine["losses"] == pytest.approx(default["losses"], rel=1e-4 if is_fp32 else 1e-2)


class SometimesUsed(nn.Module):
    """A parameter that only the first micro-batch of an update has a gradient for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always = nn.Linear(6, 5)
        self.sometimes = nn.Linear(6, 5)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        out = self.always(x)
        return (out + self.sometimes(x) if both else out).square().mean()


def unused_in_the_last(own_way: bool) -> list[list[float]]:
    config = common.deepspeed_config(stage=2, accumulation=2, reduce_scatter=not own_way)
    engine, *_ = relora_ds.initialize(model=SometimesUsed(), config=config)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(3):
        for micro in range(2):
            engine.backward(engine(torch.randn(4, 6, generator=generator), both=micro == 0))
            engine.step()
    values = [p.detach().flatten().tolist() for p in engine.module.parameters()]
    common.end(engine)
    return values


def test_a_gradient_that_the_last_micro_batch_lacks_is_not_lost() -> None:
    ours, theirs = run(2, unused_in_the_last, False), run(2, unused_in_the_last, True)
    assert ours[0] == ours[1]
    for mine, default in zip(ours[0], theirs[0], strict=True):
        assert mine == pytest.approx(default, rel=1e-5)


def sums(owners: list[int], numels: list[int], dtype: torch.dtype) -> list[list[float]]:
    """This rank's pieces: the true sum in fp64, and ours."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    by_rank = [
        [torch.randn(n, generator=torch.Generator().manual_seed(100 * r + i)).to(dtype) for i, n in enumerate(numels)]
        for r in range(world_size)
    ]
    true = [sum(by_rank[r][i].double() for r in range(world_size)) for i, owner in enumerate(owners) if owner == rank]
    by_cut = reduction.means_of_own(
        by_rank[rank], owners, dtype, None, reduction.sum_exchanged, average=False, numel_per_round=12
    )
    own = {(cut.index, cut.start): values for cut, values in by_cut}
    empty = torch.zeros(0)
    ours = [own[place] for place in sorted(own)]
    return [torch.cat([empty, *(v.double() for v in values)]).tolist() for values in (true, ours)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("owners", "numels"),
    [([0, 1, 2, 0, 1, 2], [5, 3, 4, 2, 4, 3]), ([2, 2, 0], [9, 1, 4])],
    ids=["all own alike", "one owns nothing"],
)
def test_sums(owners: list[int], numels: list[int], dtype: torch.dtype) -> None:
    for true, ours in run(3, sums, owners, numels, dtype):
        assert ours == pytest.approx(true, abs=1e-5), "summed in fp32 whatever the wire carries"


def as_on_gpus(own_way: bool, accumulation: int) -> dict[str, Any]:
    """Losses and calls where gradients go as under NCCL."""
    with common.as_on_gpus() as exchanged, Wire() as wire:
        result = losses(own_way, "llama", {"stage": 2, "accumulation": accumulation, "reduce_bucket_size": 2000})
    return {**result, "exchanged": len(exchanged), "calls": wire.calls}


def test_on_gpus_each_bucket_goes_to_its_owners_once_per_update() -> None:
    """NCCL's part is done by gloo; more of this way is in test_scatter.py."""
    ours, theirs, lone = (run(2, as_on_gpus, *way) for way in ((False, 3), (True, 3), (False, 1)))
    for mine, default, single in zip(ours, theirs, lone, strict=True):
        assert mine["losses"] == pytest.approx(default["losses"], rel=1e-4)
        assert mine["exchanged"] == single["exchanged"] > 12, "as often as without accumulation"
        assert default["exchanged"] == 0
        assert mine["calls"]["allreduce"] < default["calls"]["allreduce"] - 12, "no gradients among them"


def warned_without(hide: str) -> list[str]:
    """What is said where DeepSpeed's optimizer lacks an attribute that this start does not need."""
    kept = getattr(DeepSpeedZeroOptimizer, hide)
    delattr(DeepSpeedZeroOptimizer, hide)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine, *_ = relora_ds.initialize(model=common.tiny_llama(), config=common.deepspeed_config(stage=1))
        common.train_update(engine, 0)
        common.end(engine)
        return [str(w.message) for w in caught if "DeepSpeed's way" in str(w.message)]
    finally:
        setattr(DeepSpeedZeroOptimizer, hide, kept)


def test_an_unknown_inside_keeps_deepspeeds_way_and_says_so() -> None:
    for messages in run(2, warned_without, "buffered_reduce_fallback"):
        assert len(messages) == 1 and "has no buffered_reduce_fallback" in messages[0]
