"""Time and memory of forward and backward from a head's input to the loss: torch's over all logits, and by chunks.

    python -m benchmarks.loss VOCABULARY TOKENS fp32|bf16 TURNS POWER ...

Chunks of 2^POWER logits each, for every POWER that is given.

One thread, hidden 512, a head without factors; the ways take turns. Time is the process's own (median, least and most), so what else
runs on the machine counts little. Memory is the most bytes of live tensors at once beside input and weight, gradients included.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import rounds
from relora_ds.models import cross_entropy

HIDDEN = 512
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Way = Callable[[nn.Module, Tensor, Tensor], Tensor]


def whole(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """As transformers does it."""
    return F.cross_entropy(head(hidden).float(), labels, ignore_index=cross_entropy.IGNORED)


def by_chunks(logits: int) -> Way:
    """In chunks of so many logits."""

    def way(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
        cross_entropy.CHUNK = logits
        return cross_entropy.chunked_cross_entropy(head, hidden, labels)

    return way


def main(vocabulary: int, tokens: int, dtype: str, turns: int, powers: list[int]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, vocabulary, bias=False).to(DTYPES[dtype])
    hidden = torch.randn(tokens, HIDDEN).to(DTYPES[dtype]).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,))
    ways: dict[str, Way] = {"torch": whole, **{f"2^{power}": by_chunks(2**power) for power in powers}}

    def step(way: Way, _number: int = 0) -> None:
        hidden.grad = head.weight.grad = None
        way(head, hidden, labels).backward()

    peaks = {name: rounds.most_bytes(partial(step, way)) for name, way in ways.items()}  # which also warms up
    timed = {name: partial(step, way) for name, way in ways.items()}
    times = rounds.in_turns(timed, turns, warm_up=0, clock=time.process_time)
    for name, seconds in times.seconds.items():
        found = rounds.Spread.of([1e3 * one for one in seconds])
        spread = f"{found.median:.0f} ({found.least:.0f} to {found.most:.0f})"
        print(f"| {dtype} | {vocabulary:,} | {tokens:,} | {name} | {spread} | {peaks[name] / 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    vocabulary, tokens, dtype, turns, *powers = sys.argv[1:]
    main(int(vocabulary), int(tokens), dtype, int(turns), [int(power) for power in powers])
