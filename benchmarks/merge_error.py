"""What many small merges leave in a stored weight: its relative error against an fp64 sum, with and without the fp32 master.

python benchmarks/merge_error.py            # prints a Markdown table; seconds on a CPU
"""

from __future__ import annotations

import torch

from relora_ds.method.frozen_weights import FrozenWeight, ShardedMaster

SIZE, RANK, CHANGE = 1024, 16, 0.01
"""A square weight N(0, 0.02); merges of random rank-16 changes of 1% of its norm."""
COUNTS = (5, 20, 100)


def relative_error(stored: torch.Tensor, exact: torch.Tensor) -> float:
    return float((stored.double() - exact).norm() / exact.norm())


def main() -> None:
    print("| stored | master | " + " | ".join(f"{count} merges" for count in COUNTS) + " | plain rounding of the sum |")
    print("|---|---|" + "---|" * (len(COUNTS) + 1))
    for dtype in ("bf16", "int8"):
        for sharded in (False, True):
            generator = torch.Generator().manual_seed(0)
            weight = torch.randn(SIZE, SIZE, generator=generator) * 0.02
            exact, norm = weight.double(), weight.norm()
            store = FrozenWeight(weight, dtype, exact_rows=slice(None) if sharded else None)
            master = ShardedMaster({"w": store}, 0, 1, lambda out, mine: out.copy_(mine), "cpu") if sharded else None
            errors = []
            for merge in range(1, max(COUNTS) + 1):
                delta = torch.randn(SIZE, RANK, generator=generator) @ torch.randn(RANK, SIZE, generator=generator)
                delta *= CHANGE * norm / delta.norm()
                exact += delta.double()
                if master is None:
                    store.merge(delta.__getitem__)
                else:
                    master.merge("w", delta.__getitem__)
                if merge in COUNTS:
                    errors.append(f"{relative_error(store.read(), exact):.5f}")
            plain = relative_error(FrozenWeight(exact.float(), dtype).read(), exact)
            print(f"| {dtype} | {'sharded' if sharded else 'none'} | {' | '.join(errors)} | {plain:.5f} |")


if __name__ == "__main__":
    main()
