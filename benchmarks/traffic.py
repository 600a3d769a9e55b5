"""What the gradients and parameters of an update put on the wire, and what gradients take while they wait for the last micro-batch.

    unshare --net sh -c 'ip link set lo up; GLOO_SOCKET_IFNAME=lo python -c "from benchmarks.traffic import main; main()"'

Every rank runs on this machine, in a network of its own, and the counter of its only interface tells the bytes, headers included.
Needs the right to make a network namespace. ``reduce_scatter: false`` in DeepSpeed's configuration is DeepSpeed's own way.
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

import relora_ds
from tests.distributed import common
from tests.distributed.pool import close_all, run
from tests.memory import PeakMemory

UPDATES = 5
SIZES = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 688}


def on_the_wire() -> int:
    """Bytes that the loopback interface has sent."""
    line = next(row for row in Path("/proc/net/dev").read_text(encoding="utf-8").splitlines() if row.strip().startswith("lo:"))
    return int(line.split()[9])


def measure(stage: int, accumulation: int, own_way: bool) -> dict[str, float]:
    """Bytes per update and rank beside the floor; live bytes per trainable parameter between the micro-batches of an update."""
    zero = {"reduce_scatter": not own_way, "use_multi_rank_bucket_allreduce": True, "reduce_bucket_size": 3_000_000}
    config = common.deepspeed_config(stage=stage, dtype="bf16", accumulation=accumulation, **zero)
    relora = {"rank": 16, "restart_every": 1000, "restart_warmup": 0}
    engine, *_ = relora_ds.initialize(model=common.tiny_llama(**SIZES), config=config, relora=relora)
    for update in range(2):
        common.train_update(engine, update)
    dist.barrier()
    before = on_the_wire()
    dist.barrier()
    for update in range(UPDATES):
        common.train_update(engine, update)
    dist.barrier()
    sent = (on_the_wire() - before) / UPDATES / dist.get_world_size()
    trainable = sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
    waiting = 0
    with PeakMemory() as memory:
        for ids in common.my_rows(common.batch(0)).chunk(accumulation):
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            del loss
            is_last = engine.is_gradient_accumulation_boundary()
            engine.step()
            waiting = waiting if is_last else memory.live
    share = (dist.get_world_size() - 1) / dist.get_world_size()
    common.end(engine)
    return {
        "trainable": trainable, "sent": sent, "floor": 2 * share * 2 * trainable,
        "waiting": waiting / trainable, "peak": memory.peak / trainable,
    }  # fmt: skip


def main() -> None:
    print("| ranks | stage | accumulation | way | MB per update and rank | of the floor | held between micro-batches | peak |")
    print("|---|---|---|---|---|---|---|---|")
    for world_size in (2, 4):
        for stage, accumulation in ((2, 1), (2, 3), (1, 3)):
            for own_way in (True, False):
                result = run(world_size, measure, stage, accumulation, own_way)[0]
                way = "DeepSpeed's" if own_way else "ours"
                print(
                    f"| {world_size} | {stage} | {accumulation} | {way} | {result['sent'] / 1e6:.3f} "
                    f"| {result['sent'] / result['floor']:.3f} | {result['waiting']:.2f} | {result['peak']:.1f} |",
                    flush=True,
                )
        close_all()
    print(f"{int(result['trainable']):,} trainable parameters in bf16; memory in bytes per trainable parameter on rank 0")
