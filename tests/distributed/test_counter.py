"""Every collective is counted, whoever asks for it, beside two other counts: the dispatcher's, and DeepSpeed's own logger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import deepspeed.comm
import pytest
import torch
import torch.distributed as dist

import relora_ds
from relora_ds.callbacks.callback import RunState
from relora_ds.callbacks.traffic import TrafficLog
from relora_ds.comm.counter import COUNTER, EVALUATION, GRADIENT, LOSS, NORM, PARAMETERS, RESTART, VERIFY, by_purpose
from relora_ds.launch.places import Place
from tests.distributed import common
from tests.distributed.pool import run
from tests.wire import SCALARS, Wire


def every_operation() -> dict[str, tuple[int, int, float]]:
    """calls, payload bytes and wire bytes by operation and dtype."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    before = COUNTER.snapshot()
    entry, row = torch.zeros(6), torch.zeros(world_size, 6)
    dist.all_reduce(entry)
    dist.all_reduce(entry.to(torch.bfloat16), async_op=True).wait()
    dist.broadcast(entry, 0)
    dist.reduce(entry, 1)
    dist.all_gather(list(row), entry)
    dist.all_gather_into_tensor(row.view(-1), entry)
    dist.reduce_scatter_tensor(entry, row.view(-1))
    dist.gather(entry, list(row) if rank == 0 else None, 0)
    dist.scatter(entry, list(row) if rank == 0 else None, 0)
    sizes = [1] * (world_size - 1) + [3]  # the last rank gets most
    own = sizes[rank] * world_size
    dist.all_to_all_single(torch.zeros(own), torch.zeros(sum(sizes)), [sizes[rank]] * world_size, sizes)
    dist.send(entry, 1) if rank == 0 else dist.recv(entry, 0) if rank == 1 else None
    deepspeed.comm.all_reduce(entry.double())
    pair = dist.new_group([0, 1])
    if rank < 2:
        dist.all_reduce(torch.zeros(50), group=pair)
    dist.barrier()
    counted = COUNTER.since(before)
    return {
        f"{kind.operation} {kind.dtype} {kind.group}": (tally.calls, tally.payload_bytes, round(tally.wire_bytes, 6))
        for kind, tally in counted.items()
    }


def test_every_operation() -> None:
    first, second, third = run(3, every_operation)
    world = "world (3)"
    for counted in (first, second, third):
        assert counted[f"all-reduce float32 {world}"] == (1, 24, 32)
        assert counted[f"all-reduce bfloat16 {world}"] == (1, 12, 16)
        assert counted[f"all-reduce float64 {world}"] == (1, 48, 64), "through deepspeed.comm"
        assert counted[f"all-gather float32 {world}"] == (2, 144, 96)
        assert counted[f"reduce-scatter float32 {world}"] == (1, 72, 48)
        for operation in ("broadcast", "reduce", "gather", "scatter"):
            assert counted[f"{operation} float32 {world}"] == (1, 24, 16)
        assert counted[f"barrier  {world}"][1:] == (0, 0)
    assert [counted[f"all-to-all float32 {world}"] for counted in (first, second, third)] == [
        (1, 20, 16),
        (1, 20, 16),
        (1, 20, 8),
    ]
    assert first[f"send float32 {world}"] == (1, 24, 24)
    assert second[f"receive float32 {world}"] == (1, 24, 0)
    assert first["all-reduce float32 2"] == (1, 200, 200)
    assert "all-reduce float32 2" not in third


def trained(dtype: str, stage: int, accumulation: int) -> dict[str, Any]:
    """Three updates and a restart: the counter beside the dispatcher's count."""
    config = common.deepspeed_config(stage=stage, dtype=dtype, accumulation=accumulation)
    relora = {"rank": 3, "restart_every": 2, "restart_warmup": 0}
    engine, *_ = relora_ds.initialize(model=common.tiny_llama(), config=config, relora=relora)
    before = COUNTER.snapshot()
    with Wire() as wire:
        for update in range(3):
            common.train_update(engine, update)
    counted = COUNTER.since(before)
    restart = engine.optimizer.last_restart
    common.end(engine)
    dtypes = {kind.purpose: kind.dtype for kind in counted if kind.purpose in (GRADIENT, PARAMETERS)}
    payload = sum(tally.payload_bytes for kind, tally in counted.items() if kind.purpose in (RESTART, VERIFY))
    return {
        "wire": wire.sent_bytes + wire.scalar_bytes,
        "counted": sum(tally.wire_bytes for tally in counted.values()),
        "purposes": by_purpose(counted),
        "dtypes": dtypes,
        "restart": (restart.bytes, payload),
    }


@pytest.mark.parametrize(("dtype", "stage", "accumulation"), [("fp32", 2, 1), ("bf16", 2, 3), ("bf16", 1, 3)])
def test_the_dispatcher_counts_the_same(dtype: str, stage: int, accumulation: int) -> None:
    for result in run(2, trained, dtype, stage, accumulation):
        assert result["counted"] == pytest.approx(result["wire"], rel=1e-12), "to the byte"
        assert {GRADIENT, PARAMETERS, NORM, RESTART, VERIFY} <= set(result["purposes"])
        name = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
        assert result["dtypes"] == {GRADIENT: name, PARAMETERS: name}, "what was asked for is sent, and no wider"
        assert result["restart"][0] == result["restart"][1] > 0
        assert result["purposes"][GRADIENT] == pytest.approx(result["purposes"][PARAMETERS], rel=0.02)


def logged_by_deepspeed() -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """calls and payload bytes of the large collectives that DeepSpeed issues: its comms_logger's, and the counter's."""
    config = common.deepspeed_config(stage=2, accumulation=2, reduce_scatter=False)
    config["comms_logger"] = {"enabled": True, "verbose": False, "prof_all": True}
    engine, *_ = relora_ds.initialize(model=common.tiny_llama(), config=config)
    common.train_update(engine, 0)
    logger = deepspeed.comm.comm.comms_logger
    logger.comms_dict.clear()
    before = COUNTER.snapshot()
    try:
        for update in (1, 2):
            for micro in common.my_rows(common.batch(update)).chunk(2):
                engine.backward(engine(input_ids=micro, labels=micro).loss)
                engine.step()
        theirs: dict[str, list[int]] = {}
        for operation, sizes in logger.comms_dict.items():
            name = "all-reduce" if "all_reduce" in operation else "all-gather" if "all_gather" in operation else operation
            calls = theirs.setdefault(name, [0, 0])
            for size, (count, *_) in sizes.items():
                calls[0] += count
                calls[1] += count * size * (dist.get_world_size() if name == "all-gather" else 1)  # theirs: what a rank brings
        ours: dict[str, list[int]] = {}
        for kind, tally in COUNTER.since(before).items():
            calls = ours.setdefault(kind.operation, [0, 0])
            calls[0] += tally.calls
            calls[1] += tally.payload_bytes
    finally:
        logger.enabled = logger.prof_all = False
        logger.comms_dict.clear()
        common.end(engine)
    return theirs, ours


def test_deepspeeds_comms_logger_counts_the_same() -> None:
    for theirs, ours in run(2, logged_by_deepspeed):
        assert {"all-reduce", "all-gather"} <= set(theirs)
        assert {name: ours[name] for name in theirs} == theirs, "calls and payload bytes"


def written(folder: str) -> None:
    """Two starts of a run; the second is written twice."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    place = Place(rank, world_size, rank, world_size, "127.0.0.1", 1, "torchrun")
    for first in (1, 5):
        log = TrafficLog(Path(folder) / "traffic.json", place, ["here"] * world_size, torch.device("cpu"), "")
        log.count_from(first)
        for update in range(first, first + 2):
            with COUNTER.purpose(GRADIENT):
                dist.all_reduce(torch.zeros(1_000_000))
            with COUNTER.purpose(LOSS):
                dist.all_reduce(torch.zeros(25))
            record: dict[str, Any] = {}
            log.update(cast(RunState, None), record)
            assert record == {"sent_bytes": 4_000_100}, "of updates alone, as metrics.jsonl has it"
            with COUNTER.purpose(EVALUATION):
                dist.all_reduce(torch.zeros(250_000))
            dist.barrier()
            log.write(update)


def test_the_record_of_a_run(tmp_path: Path) -> None:
    run(2, written, str(tmp_path))
    first, second = json.loads((tmp_path / "traffic.json").read_text())["starts"]
    assert (first["first_update"], first["last_update"]) == (1, 2)
    assert (second["first_update"], second["last_update"], second["world_size"], second["backend"]) == (5, 6, 2, "gloo")
    for entry in (first, second):
        assert entry["wire_bytes_per_update"] == 4_000_100
        assert entry["wire_bytes"] | {"checkpoint": 0} == {
            "gradient": 8_000_000, "loss": 200, "evaluation": 2_000_000, "checkpoint": 0,
        }  # fmt: skip
        (node,) = entry["nodes"]
        assert (node["host"], node["ranks"]) == ("here", [0, 1])
        # Both ranks' bytes pass through this machine's loopback interface, and what others send there meanwhile.
        assert node["counted_bytes"] == pytest.approx(2 * 10_000_200, abs=200)
        assert node["sent_bytes"] >= node["counted_bytes"]
    large = [row for row in second["collectives"] if row["purpose"] == "gradient" and row["payload_bytes"] > SCALARS]
    assert large, "what was counted before begin() is listed, too"
