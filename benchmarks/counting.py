"""What counting every collective costs, in time of an update.

    python -c "from benchmarks.counting import main; main()"

Two ranks over gloo train the demo's model. The time that counting adds to one collective (a counted no-op less a plain one) times the
collectives of an update, over the time of an update.
"""

from __future__ import annotations

import timeit
from typing import Any

import torch
import torch.distributed as dist

import relora_ds
from relora_ds.comm import counter
from relora_ds.comm.counter import COUNTER
from tests.distributed import common
from tests.distributed.pool import run

UPDATES, CALLS = 20, 20_000
MODEL = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}


def measure() -> dict[str, float]:
    """calls of an update, seconds of an update, seconds that counting adds to a call."""
    relora = {"rank": 16, "restart_every": 1000, "restart_warmup": 0}
    engine, *_ = relora_ds.initialize(model=common.tiny_llama(**MODEL), config=common.deepspeed_config(), relora=relora)
    common.train_update(engine, 0)
    before = COUNTER.snapshot()
    seconds = timeit.timeit(lambda: common.train_update(engine, 1), number=UPDATES) / UPDATES
    calls = sum(tally.calls for tally in COUNTER.since(before).values()) / UPDATES
    common.end(engine)

    def plain(group: Any, tensors: Any, options: Any) -> None:
        """As much as a collective takes and no more."""

    counted, group, tensors = counter._counted(plain, "all-reduce", 0, None), dist.group.WORLD, [torch.zeros(10)]
    added = timeit.timeit(lambda: counted(group, tensors, None), number=CALLS) - timeit.timeit(
        lambda: plain(group, tensors, None), number=CALLS
    )
    return {"calls": calls, "seconds": seconds, "per_call": added / CALLS}


def main() -> None:
    result = run(2, measure)[0]
    share = result["calls"] * result["per_call"] / result["seconds"]
    print(f"{result['calls']:.0f} collectives and {result['seconds'] * 1e3:.1f} ms an update")
    print(f"{result['per_call'] * 1e6:.2f} us to count one: {share:.3%} of an update")
