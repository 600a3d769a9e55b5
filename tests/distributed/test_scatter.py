"""The gradients' way on GPUs: one reduce-scatter for each bucket, on the stream of reductions, and nobody waits for the device.

Over gloo, whose process group is taught what NCCL's alone can do (:func:`tests.distributed.common.reduce_each`). What needs a GPU
is at the end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import stage_1_and_2
from torch import Tensor

import relora_ds
from relora_ds.comm.counter import COUNTER, GRADIENT
from relora_ds.launch import process_group
from relora_ds.zero import gradient_reduction as reduction
from tests.distributed import common
from tests.distributed.pool import ROOT, run

WIDTHS = {"float32": 4, "bfloat16": 2}
RELORA = {"rank": 3, "restart_every": 100, "restart_warmup": 0}
EMBEDDING = common.VOCAB * 20
SMALL = {"reduce_bucket_size": 700, "overlap_comm": True}
"""Buckets that belong to one rank or two; the gradients of embedding and head are larger than one."""


def engine_of(settings: dict[str, Any], device: str = "cpu") -> Any:
    content = dict(settings)
    accumulates_in, wire = content.pop("accumulates_in", None), content.pop("wire", None)
    config = common.deepspeed_config(**content)
    if accumulates_in:
        config["data_types"] = {"grad_accum_dtype": accumulates_in}
    if wire:
        config["communication_data_type"] = wire
    return relora_ds.initialize(model=common.tiny_llama().to(device), config=config, relora=RELORA)[0]


def backward(engine: Any, update: int = 0) -> None:
    """The micro-batches of an update, up to its step."""
    micro_batches = common.my_rows(common.batch(update)).to(engine.device).chunk(engine.gradient_accumulation_steps())
    for number, ids in enumerate(micro_batches):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        if number < len(micro_batches) - 1:
            engine.step()


def gradients(as_on_gpus: bool, settings: dict[str, Any]) -> dict[str, Any]:
    """Of one update: this rank's gradients, flat, and how they came there."""
    with common.as_on_gpus() if as_on_gpus else nullcontext([]) as exchanged:
        engine = engine_of(settings)
        zero, buckets = engine.optimizer.zero, []
        average = zero.average_tensor
        zero.average_tensor = lambda tensor, wire: (buckets.append(tensor.numel()), average(tensor, wire))
        before = COUNTER.snapshot()
        backward(engine)
        counted = {kind: tally for kind, tally in COUNTER.since(before).items() if kind.purpose == GRADIENT}
    parts = [part.flatten().double() for group in sorted(zero.averaged_gradients) for part in zero.averaged_gradients[group]]
    result = {
        "gradients": torch.cat(parts),
        "buckets": [numel for numel in buckets if numel],  # a gradient larger than a bucket empties it, also where it is empty
        "exchanged": [sizes for sizes, _ in exchanged],
        "calls": {(kind.operation, kind.dtype): tally.calls for kind, tally in counted.items()},
        "bytes": sum(tally.wire_bytes for tally in counted.values()),
        "trainable": sum(p.numel() for p in engine.module.parameters() if p.requires_grad),
    }
    del zero.average_tensor
    common.end(engine)
    return result


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (2, {"stage": 2, **SMALL}),
        (2, {"stage": 2, "dtype": "bf16", "accumulation": 3, **SMALL}),
        (2, {"stage": 1, "accumulation": 3}),
        (2, {"stage": 1, "dtype": "bf16", **SMALL}),
        (2, {"stage": 2, "dtype": "bf16", "accumulation": 3, "accumulates_in": "fp32", "reduce_bucket_size": 2000}),
        (2, {"stage": 2, "dtype": "bf16", "wire": "fp32"}),
        (2, {"stage": 2, "accumulation": 3, "contiguous_gradients": False, **SMALL}),
        (3, {"stage": 2, "dtype": "bf16", **SMALL}),
        (3, {"stage": 1, "accumulation": 2, "reduce_bucket_size": 2000}),
        (3, {"stage": 2, "accumulation": 2}),
    ],
)
def test_gradients_are_those_of_the_way_over_gloo(world_size: int, settings: dict[str, Any]) -> None:
    ours, theirs = run(world_size, gradients, True, settings), run(world_size, gradients, False, settings)
    wire = {"fp32": "float32", "bf16": "bfloat16"}[settings.get("wire", settings.get("dtype", "fp32"))]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["gradients"].norm() > 0
        if world_size == 2 and "accumulates_in" not in settings:  # fp32 accumulators see that gloo's sum is in fp32
            assert torch.equal(mine["gradients"], other["gradients"]), "halving rounds nothing, so both round once"
        else:
            rounding = {"float32": 2.0**-24, "bfloat16": 2.0**-9}[wire]
            assert (mine["gradients"] - other["gradients"]).norm() <= 2 * rounding * other["gradients"].norm()
        assert sum(mine["buckets"]) == mine["trainable"], "once per update, whatever the accumulation"
        assert [sum(sizes) for sizes in mine["exchanged"]] == mine["buckets"], "one exchange for each bucket"
        assert mine["calls"] == {("reduce-scatter", wire): len(mine["buckets"])}
        if settings.get("reduce_bucket_size") == 700:
            assert EMBEDDING in mine["buckets"]
            assert any(sizes.count(0) == world_size - 1 for sizes in mine["exchanged"]), "of one rank alone"
    sent = sum(mine["bytes"] for mine in ours)
    assert sent == (world_size - 1) * WIDTHS[wire] * ours[0]["trainable"], "each gradient to its owner, from all others"


def scattered(sizes: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's part of random numbers: the sum as it came, the true one, and the sum of their sizes."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    by_rank = [torch.randn(sum(sizes), generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(world_size)]
    with common.as_on_gpus():
        came = reduction.sum_scattered(by_rank[rank].clone(), sizes, None, 1)
    true, most = (sum(values.double() for values in of).split(sizes)[rank] for of in (by_rank, [v.abs() for v in by_rank]))
    return came, true, most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sizes", [[4, 4, 4], [5, 1, 3], [0, 9, 2], [0, 0, 7]], ids=["equal", "unequal", "two own", "one owns"])
def test_sums(sizes: list[int], dtype: torch.dtype) -> None:
    for size, (came, true, most) in zip(sizes, run(3, scattered, sizes, dtype), strict=True):
        assert came.dtype == dtype and came.numel() == size
        assert ((came.double() - true).abs() <= 2 * torch.finfo(dtype).eps / 2 * most).all(), "a rounding for each addition"


class Stream:
    """One of an accelerator's, as far as DeepSpeed and the route ask."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.waited_for: set[str] = set()

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.add(other.name)


class Streams:
    """DeepSpeed's accelerator with streams, like CUDA's, on which CPU work is noted; everything else is the real one's."""

    def __init__(self, real: Any) -> None:
        self.real, self.within = real, [Stream("model")]
        self.waits = 0
        self.recorded: list[tuple[int, str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def is_synchronized_device(self) -> bool:
        return False

    resolves_data_dependency = is_synchronized_device

    def Stream(self) -> Stream:
        return Stream("reductions")

    def current_stream(self, *_: Any) -> Stream:
        return self.within[-1]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.within.append(stream)
        try:
            yield
        finally:
            self.within.pop()

    def synchronize(self, *_: Any) -> None:
        self.waits += 1

    def record(self, tensor: Tensor, stream: Stream) -> None:
        self.recorded.append((tensor.untyped_storage().nbytes() // tensor.element_size(), stream.name))


@contextmanager
def streams() -> Iterator[Streams]:
    """DeepSpeed's optimizer and the route see :class:`Streams`."""
    noted = Streams(reduction.get_accelerator())
    kept = stage_1_and_2.get_accelerator
    stage_1_and_2.get_accelerator = reduction.get_accelerator = lambda: noted
    Tensor.record_stream = lambda tensor, stream: noted.record(tensor, stream)  # a function, which a tensor binds
    try:
        yield noted
    finally:
        stage_1_and_2.get_accelerator = reduction.get_accelerator = kept
        del Tensor.record_stream


def overlapped(settings: dict[str, Any]) -> dict[str, Any]:
    """One update's backward pass, in which norms' gradients are made on another stream: where work was done, and who waited."""
    with common.as_on_gpus() as exchanged, streams() as noted:
        engine = engine_of(settings)
        zero, other = engine.optimizer.zero, Stream("other")
        gather = zero.process_gradients

        def on_either(param: Any, group: int) -> None:
            with noted.stream(other) if param.dim() == 1 else nullcontext():
                gather(param, group)

        zero.process_gradients = on_either
        noted.waits = 0
        backward(engine)
        result = {
            "waits": noted.waits,
            "on": [stream.name for _, stream in exchanged],
            "waited_for": set().union(*(stream.waited_for for _, stream in exchanged)),
            "recorded": noted.recorded,
        }
        zero.process_gradients = gather
        common.end(engine)
    return result


@pytest.mark.parametrize(
    "changes", [{}, {"accumulation": 3}, {"stage": 1}, {"contiguous_gradients": False}], ids=["2", "accumulation", "1", "apart"]
)
def test_a_backward_pass_waits_for_the_device_once(changes: dict[str, Any]) -> None:
    """At its end, which is DeepSpeed's own. In DeepSpeed's reduce to each owner it waits before each of them."""
    for result in run(2, overlapped, {"stage": 2, **SMALL, **changes}):
        assert len(result["on"]) > 5 and set(result["on"]) == {"reductions"}
        assert {"model", "other"} <= result["waited_for"]
        assert result["waits"] == 1
        assert {name for _, name in result["recorded"]} == {"reductions"}
        if changes.get("contiguous_gradients", True):
            assert [numel for numel, _ in result["recorded"]].count(EMBEDDING) == 2, "embedding and head, which no bucket holds"


def test_without_overlap_there_is_no_stream_of_reductions() -> None:
    for result in run(2, overlapped, {"stage": 2, "reduce_bucket_size": 700}):
        assert "reductions" not in result["on"] and result["waits"] == 0


def alone_on_a_gpu() -> None:
    """Prints what the last test looks at. A process of its own, since the suite hides GPUs from its own."""
    process_group.require()
    device = torch.device("cuda", torch.cuda.current_device())
    given = torch.arange(6, dtype=torch.bfloat16, device=device)
    came = torch.empty_like(given)
    dist.reduce_scatter(came, [given])
    answer: dict[str, Any] = {"backend": dist.get_backend()}
    answer["sums"] = [torch.equal(summed, given) for summed in (came, reduction.sum_scattered(given.clone(), [6], None, 1))]
    for way, changes in {
        "many": SMALL,
        "one": {**SMALL, "reduce_bucket_size": 100_000},
        "deepspeed": {**SMALL, "reduce_scatter": False},
    }.items():
        engine = engine_of({"stage": 2, "dtype": "bf16", "accumulation": 3, **changes}, "cuda")
        norms, waits, wait = [], [], reduction.get_accelerator().synchronize
        for update in range(4):
            reduction.get_accelerator().synchronize = lambda *names, wait=wait, waits=waits: (waits.append(1), wait(*names))
            backward(engine, update)
            del reduction.get_accelerator().synchronize
            engine.step()
            norms.append(float(engine.get_global_grad_norm()))
        answer[way] = {"norms": norms, "waits": len(waits)}
        common.end(engine)
    print(json.dumps(answer))


@pytest.mark.skipif(
    torch.version.cuda is None or not Path("/dev/nvidiactl").exists(), reason="needs a GPU, and a torch that is built for CUDA"
)
def test_on_a_gpu_over_nccl() -> None:
    """One rank: streams, buckets and gradients that are larger than one; nothing is sent."""
    visible = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    code = "from tests.distributed.test_scatter import alone_on_a_gpu; alone_on_a_gpu()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=visible, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["backend"] == "nccl" and answer["sums"] == [True, True]
    for way in ("many", "one"):
        assert answer[way]["norms"] == pytest.approx(answer["deepspeed"]["norms"], rel=2e-2)
    assert answer["many"]["waits"] == answer["one"]["waits"], "as often with many buckets as with one"
