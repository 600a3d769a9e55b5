"""Who differs from whom, from checksums alone, and what is set right."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from relora_ds.optimizer.replicas import Mismatch, Replicas


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


@pytest.mark.parametrize("part", ["weight", "weight.scales"])
def test_the_master_sets_a_layer_right_whatever_it_is_called(part: str) -> None:
    """DeepSeek-V3.2 has layers called weights_proj."""
    published: list[str] = []
    masters, master = SimpleNamespace(params={}), SimpleNamespace(publish=published.append)
    replicas = Replicas(nn.Module(), masters, master, None, "repair")  # type: ignore[arg-type]
    replicas._repair(Mismatch(f"indexer.weights_proj.{part}", (1,), 0, False), torch.zeros(2), 1, update=8)
    assert published == ["indexer.weights_proj"]
