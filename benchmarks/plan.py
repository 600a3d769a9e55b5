"""Memory at most, estimated beside measured, over methods, dtypes, stages and accumulation; and llama_60m as in the paper's table.

    python -c "from benchmarks.plan import main; main()"
    python -c "from benchmarks.plan import changes; changes()"      # the change of phase

Measured are the live bytes of all tensors of engines on CPUs, over gloo: building, two updates, a restart; the highest rank.
"""

from __future__ import annotations

import itertools
from typing import Any

from tests.distributed.pool import close_all, run
from tests.distributed.test_plan import INT8, LORA, case, estimated, estimated_change, measured, measured_change

LLAMA_60M = {
    "sizes": {
        "vocab_size": 32100, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
    },
    "micro_batch": 2, "length": 128, "bucket": 20_000_000,
}  # fmt: skip


def cases() -> list[tuple[str, dict[str, Any]]]:
    methods = {
        "full": None, "lora": LORA, "lora int8": INT8,
        "relora int8, sharded": {**LORA, "frozen": {"dtype": "int8", "master": "sharded"}},
    }  # fmt: skip
    listed = [
        (f"{method} | {dtype} | {world_size} | {stage} | {accumulation}", case(
            relora=relora, dtype=dtype, world_size=world_size, stage=stage, accumulation=accumulation,
        ))
        for (method, relora), dtype, world_size, stage, accumulation in itertools.product(
            methods.items(), ("bf16", "fp32"), (1, 2), (1, 2), (1, 3)
        )
    ]  # fmt: skip
    for method, relora in (
        ("full", None),
        ("lora, rank 128", {**LORA, "rank": 128}),
        ("lora int8, rank 128", {**INT8, "rank": 128}),
    ):
        for checkpointing in (False, True):
            label = f"llama_60m {method}{', checkpointing' if checkpointing else ''} | bf16 | 2 | 2 | 1"
            listed.append((label, case(relora=relora, world_size=2, checkpointing=checkpointing, **LLAMA_60M)))
    return listed


def main() -> None:
    print("| model and method | dtype | ranks | stage | accumulation | measured, MB | estimated, MB | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for label, of in sorted(cases(), key=lambda entry: (entry[1]["world_size"], "60m" in entry[0])):
        most = max(max(peaks.values()) for peaks in run(of["world_size"], measured, of))
        told = max(estimated(of).values())
        print(f"| {label} | {most / 1e6:.2f} | {told / 1e6:.2f} | {told / most:.3f} |", flush=True)
    close_all()


def changes() -> None:
    """The most at the change of phase, estimated beside measured."""
    print("| model, factors and frozen store | dtype | ranks | measured, MB | estimated, MB | ratio |")
    print("|---|---|---|---|---|---|")
    stores = {
        "as trained": LORA, "int8": INT8, "int8, sharded": {**LORA, "frozen": {"dtype": "int8", "master": "sharded"}},
        "moments kept": {**LORA, "keep_moments": True},
    }  # fmt: skip
    sizes: dict[str, dict[str, Any]] = {"small": {}, "llama_60m": LLAMA_60M}
    for (name, more), (label, relora), dtype, ranks in itertools.product(sizes.items(), stores.items(), ("bf16", "fp32"), (1, 2)):
        if more and ranks == 1:
            continue
        of = case(relora={**relora, "rank": 128} if more else relora, dtype=dtype, world_size=ranks, **more)
        most = max(max(peaks.values()) for peaks in run(ranks, measured_change, of))
        told = max(estimated_change(of).values())
        print(f"| {name}, {label} | {dtype} | {ranks} | {most / 1e6:.2f} | {told / 1e6:.2f} | {told / most:.3f} |", flush=True)
    close_all()
