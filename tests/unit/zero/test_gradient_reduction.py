"""Which entries of a bucket go to which rank, and when."""

from __future__ import annotations

import pytest

from relora_ds.zero.gradient_reduction import Cut, rounds


def test_pieces_go_to_their_owners_in_order() -> None:
    (only,) = rounds([0, 2, 0], [5, 3, 2], 3, limit=7)
    assert only == [[Cut(0, 0, 5), Cut(2, 0, 2)], [], [Cut(1, 0, 3)]]


def test_a_round_takes_no_more_than_the_limit_of_any_rank() -> None:
    assert rounds([1, 0, 1], [5, 1, 4], 2, limit=4) == [
        [[Cut(1, 0, 1)], [Cut(0, 0, 4)]],
        [[], [Cut(0, 4, 1), Cut(2, 0, 3)]],
        [[], [Cut(2, 3, 1)]],
    ]


@pytest.mark.parametrize("limit", [1, 3, 8, 100])
def test_every_entry_is_sent_once(limit: int) -> None:
    owners, numels = [0, 1, 3, 0, 1, 1], [7, 0, 5, 1, 9, 2]
    seen = []
    for turn in rounds(owners, numels, 4, limit):
        assert max(sum(cut.numel for cut in cuts) for cuts in turn) <= limit
        for owner, cuts in enumerate(turn):
            assert all(owners[cut.index] == owner for cut in cuts)
            seen += [(cut.index, entry) for cut in cuts for entry in range(cut.start, cut.start + cut.numel)]
    assert sorted(seen) == [(index, entry) for index, numel in enumerate(numels) for entry in range(numel)]


def test_nothing_to_send_is_no_round() -> None:
    assert rounds([], [], 2, limit=4) == rounds([1], [0], 2, limit=4) == []
