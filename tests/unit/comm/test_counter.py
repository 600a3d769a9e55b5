"""Formulas of the rings, scopes and differences; real collectives are in tests/distributed/test_counter.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from relora_ds.comm import counter
from relora_ds.comm.counter import CHECKPOINT, GRADIENT, NORM, OTHER, PARAMETERS, RESTART, START_UP, Counter, Kind, ring_bytes


class Group:
    """As much of a process group as is asked for."""

    def __init__(self, world_size: int, rank: int = 0, name: str = "0") -> None:
        self.world_size, self.own_rank, self.group_name = world_size, rank, name

    def size(self) -> int:
        return self.world_size

    def rank(self) -> int:
        return self.own_rank


@pytest.mark.parametrize(
    ("operation", "factor"),
    [("all-reduce", 1.5), ("all-gather", 0.75), ("reduce-scatter", 0.75), ("all-to-all", 0.75), ("broadcast", 0.75),
     ("reduce", 0.75), ("send", 1.0), ("receive", 0.0), ("barrier", 0.0)],
)  # fmt: skip
def test_ring_bytes_of_four_ranks(operation: str, factor: float) -> None:
    assert ring_bytes(operation, 1000, 4) == 1000 * factor


def test_purposes_nest_and_end_with_an_error() -> None:
    book, group, tensor = Counter(), Group(2), torch.zeros(8)
    with book.purpose(CHECKPOINT):
        with book.purpose(GRADIENT):
            book.add("all-reduce", [tensor], group)
        book.add("broadcast", [tensor, tensor], group)
    with pytest.raises(ValueError, match="as it was"), book.purpose(CHECKPOINT):
        raise ValueError("as it was")
    book.add("all-reduce", [tensor], group)
    assert {kind.purpose: tally.wire_bytes for kind, tally in book.tallies.items()} == {GRADIENT: 32, CHECKPOINT: 32, OTHER: 32}
    assert book.payload_bytes((CHECKPOINT,)) == 64
    assert book.wire_bytes((GRADIENT, OTHER)) == 64


def test_what_a_start_up_gathers_as_restarts_do_is_no_restart() -> None:
    book, group, tensor = Counter(), Group(2), torch.zeros(8)
    with book.purpose(START_UP):
        with book.purpose(RESTART):
            book.add("broadcast", [tensor], group)
        with book.purpose(CHECKPOINT), book.purpose(RESTART):
            book.add("broadcast", [tensor, tensor], group)
    assert book.payload_bytes((START_UP,)) == 32
    assert book.payload_bytes((RESTART,)) == 64


def test_a_step_reduces_scalars_and_gathers_parameters() -> None:
    book, group = Counter(), Group(4)
    with book.purpose(NORM), book.standing_for(torch.bfloat16):
        book.add("all-reduce", [torch.zeros(1)], group)
        book.add("all-gather", [torch.zeros(8, dtype=torch.uint8)], group)
    assert {kind.purpose: (kind.dtype, tally.payload_bytes) for kind, tally in book.tallies.items()} == {
        NORM: ("bfloat16", 4),
        PARAMETERS: ("bfloat16", 8),
    }


def test_differences() -> None:
    book, group = Counter(), Group(2)
    book.add("all-reduce", [torch.zeros(8)], group)
    before = book.snapshot()
    assert book.since(before) == {}
    book.add("all-reduce", [torch.zeros(4)], group)
    book.add("send", [torch.zeros(4)], group)
    difference = book.since(before)
    assert {kind.operation: (tally.calls, tally.payload_bytes) for kind, tally in difference.items()} == {
        "all-reduce": (1, 16),
        "send": (1, 16),
    }
    assert counter.by_purpose(difference) == {OTHER: 32.0}
    assert [row["operation"] for row in counter.rows(difference)] == ["all-reduce", "send"]


def test_groups_of_one_size_are_one_kind() -> None:
    book = Counter()
    for name in ("1", "2"):
        book.add("all-reduce", [torch.zeros(8)], Group(3, name=name))
    assert list(book.tallies) == [Kind(OTHER, "all-reduce", "float32", "3")]


@pytest.mark.parametrize(("splits", "expected"), [([1, 3], 96.0), ([4, 0], 0.0), ([], 64.0)], ids=["uneven", "all own", "even"])
def test_all_to_all_leaves_the_own_part_out(splits: list[int], expected: float) -> None:
    source = torch.zeros(4, 8)  # 128 bytes, of which the first part stays on rank 0
    arguments: tuple[Any, ...] = (torch.zeros(4, 8), source, [], splits)
    assert counter._all_to_all_base(Group(2), arguments, {}) == expected


@pytest.mark.parametrize(("own", "expected"), [(1, 24.0), (6, 4.0), (0, 28.0)], ids=["little", "most", "nothing"])
def test_a_reduce_scatter_of_unequal_parts_leaves_the_own_part_out(own: int, expected: float) -> None:
    parts = [torch.zeros(own), torch.zeros(7 - own)]
    assert counter._reduce_scatter(Group(2), ([parts[0]], [parts]), {}) == expected
