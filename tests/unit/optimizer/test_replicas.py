"""Who differs from whom, from checksums alone."""

from __future__ import annotations

import pytest

from relora_ds.optimizer.replicas import Mismatch


@pytest.mark.parametrize(
    ("sums", "ranks", "reference", "is_majority"),
    [
        ([5, 5, 7], (2,), 0, True),
        ([7, 5, 5], (0,), 1, True),
        ([5, 7], (1,), 0, False),
        ([5, 5, 7, 7], (2, 3), 0, False),
        ([1, 2, 3], (1, 2), 0, False),
    ],
)
def test_mismatch_by_majority(sums: list[int], ranks: tuple[int, ...], reference: int, is_majority: bool) -> None:
    mismatch = Mismatch.of("layer.weight", sums)
    assert (mismatch.ranks, mismatch.reference, mismatch.is_majority) == (ranks, reference, is_majority)
    assert str(mismatch) == f"layer.weight differs on rank(s) {', '.join(map(str, ranks))} from rank {reference}"
