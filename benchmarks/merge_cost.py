"""What products that do not round cost at a merge, and how near they are, beside fp32 products; what fp32 products leave to chance.

    python -c "from benchmarks.merge_cost import main; main()"
    python -c "from benchmarks.merge_cost import by_pieces; by_pieces()"      # how many entries to merge at a time

One thread, one layer of 5461 x 2048 at rank 128, the best of five turns, each way in every turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from relora_ds.method import exact
from relora_ds.method.frozen_weights import PIECE, FrozenWeight, pieces

ROWS, COLUMNS, RANK, TURNS = 5461, 2048, 128, 5


def best_ms(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of each, the best of :data:`TURNS`, after one to warm up."""
    best: dict[str, float] = {}
    for turn in range(TURNS + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if turn:
                best[name] = min(best.get(name, 1e9), (time.perf_counter() - started) * 1e3)
    return best


def elementwise(lora_b: Tensor, lora_a: Tensor) -> Tensor:
    """The product as a sum in a fixed order, one rank of the factors at a time: as reproducible, in fp32."""
    total = torch.zeros(lora_b.shape[0], lora_a.shape[1])
    term = torch.empty_like(total)
    for k in range(lora_b.shape[1]):
        total.add_(torch.mul(lora_b[:, k : k + 1], lora_a[k : k + 1], out=term))
    return total


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    lora_b, lora_a = (torch.randn(*shape, generator=generator) * 0.01 for shape in ((ROWS, RANK), (RANK, COLUMNS)))
    weight = FrozenWeight(torch.randn(ROWS, COLUMNS, generator=generator) * 0.02, "bf16")
    rows = list(pieces(slice(0, ROWS), COLUMNS, PIECE))

    def merge_exact() -> None:
        right = exact.columns(lora_a)
        weight.merge(lambda piece: exact.product(lora_b[piece], right).to(torch.float32))

    right = exact.columns(lora_a)
    times = best_ms({
        "a product, fp32": lambda: [lora_b[piece] @ lora_a for piece in rows],
        "a product, exact": lambda: [exact.product(lora_b[piece], right).to(torch.float32) for piece in rows],
        "a product, fp32 in tiles of 64 rows": lambda: [lora_b[at : at + 64] @ lora_a for at in range(0, ROWS, 64)],
        "a product, fp32 elementwise in tiles of 16 rows": lambda: [
            elementwise(lora_b[at : at + 16], lora_a) for at in range(0, ROWS, 16)
        ],
        "a merge into bf16, fp32": lambda: weight.merge(lambda piece: lora_b[piece] @ lora_a),
        "a merge into bf16, exact": merge_exact,
    })  # fmt: skip
    print("| | ms |\n|---|---|")
    for name, milliseconds in times.items():
        print(f"| {name} | {milliseconds:.0f} |")
    reference = lora_b.double() @ lora_a.double()
    for name, value in (("fp32", lora_b @ lora_a), ("exact", exact.product(lora_b, right).float())):
        print(f"\n{name}: off by {float((value - reference).norm() / reference.norm()):.1e} of the norm")
    for size in (1, 16, 64, 200):
        same = torch.equal(torch.cat([lora_b[at : at + size] @ lora_a for at in range(0, ROWS, size)]), lora_b @ lora_a)
        print(f"\nfp32, {size} rows at a time: {'the same bits as' if same else 'other bits than'} all at once")


def by_pieces() -> None:
    """Merges of layers of several sizes, a sixteenth of the layer or so many entries at a time."""
    torch.set_num_threads(1)
    print("| layer, rank, store | a sixteenth | 2^16 | 2^18 | 2^20 | 2^22 |\n" + "|---" * 6 + "|")
    for rows, columns, rank in ((64, 64, 4), (512, 256, 8), (768, 2048, 128), (ROWS, COLUMNS, RANK)):
        for dtype in ("bf16", "int8"):
            weight = FrozenWeight(torch.randn(rows, columns) * 0.02, dtype)
            lora_b, right = torch.randn(rows, rank) * 1e-3, exact.columns(torch.randn(rank, columns))

            def merge(size: int, weight: FrozenWeight = weight, lora_b: Tensor = lora_b, right: exact.Whole = right) -> None:
                weight.merge(lambda piece: exact.product(lora_b[piece], right).to(torch.float32), piece=size)

            sizes = {str(size): size for size in (rows * columns // 16, 1 << 16, 1 << 18, 1 << 20, 1 << 22)}
            times = best_ms({name: partial(merge, size) for name, size in sizes.items()})
            cells = " | ".join(f"{milliseconds:.2f}" for milliseconds in times.values())
            print(f"| {rows} x {columns}, {rank}, {dtype} | {cells} |")
