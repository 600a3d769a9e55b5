"""The mean of the loss over held-out samples, by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from relora_ds.training.evaluate import evaluate
from tests.syncs import Syncs


class Held:
    """Seven samples of five tokens; the first token of sample i is i."""

    sequence_length = 5

    def __len__(self) -> int:
        return 7

    def batch(self, indices: range) -> Tensor:
        return torch.tensor([[i, 0, 0, 0, 0] for i in indices])


class LossIsTheMeanIndex(nn.Module):
    """Its loss on a batch is the mean of the samples' numbers, in training mode plus 100."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        assert torch.equal(input_ids, labels)
        return SimpleNamespace(loss=input_ids[:, 0].float().mean() + (100.0 if self.training else 0.0))


@pytest.mark.parametrize("batch_size", [1, 2, 7, 50])
def test_every_token_counts_once(batch_size: int) -> None:
    model = LossIsTheMeanIndex().train()
    result = evaluate(model, Held(), batch_size=batch_size, device=torch.device("cpu"))  # type: ignore[arg-type]
    assert result.loss == pytest.approx(3.0)
    assert result.perplexity == pytest.approx(math.exp(3.0))
    assert result.tokens == 7 * 4, "the first token of a sample is not predicted"
    assert model.training, "the mode is put back"


@pytest.mark.parametrize(("max_tokens", "samples"), [(1, 1), (14, 2), (15, 3), (10_000, 7)])
def test_limit_in_tokens(max_tokens: int, samples: int) -> None:
    result = evaluate(
        LossIsTheMeanIndex(),
        Held(),  # type: ignore[arg-type]
        batch_size=2,
        device=torch.device("cpu"),
        max_tokens=max_tokens,
    )
    assert result.tokens == samples * 4
    assert result.loss == pytest.approx(sum(range(samples)) / samples)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e4])
def test_a_loss_that_is_no_number_has_no_perplexity(loss: float) -> None:
    class Model(nn.Module):
        def forward(self, **_: Tensor) -> SimpleNamespace:
            return SimpleNamespace(loss=torch.tensor(loss))

    result = evaluate(Model(), Held(), batch_size=7, device=torch.device("cpu"))  # type: ignore[arg-type]
    assert math.isnan(result.perplexity) if math.isnan(loss) else result.perplexity == math.inf


def test_ranks_with_fewer_samples_beat_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven samples over four ranks: the last has one, the others two."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda _sums: None)
    beats = []
    for rank in range(4):
        evaluate(
            LossIsTheMeanIndex(), Held(), batch_size=1, device=torch.device("cpu"), rank=rank, world_size=4,  # type: ignore[arg-type]
            beat=lambda rank=rank: beats.append(rank),
        )  # fmt: skip
    assert beats == [0, 0, 1, 1, 2, 2, 3, 3]


class Losses(nn.Module):
    """Gives one loss after the other."""

    def __init__(self, losses: Tensor) -> None:
        super().__init__()
        self.losses = iter(losses.unbind())

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=next(self.losses))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_read_once_and_summed_as_python_does(dtype: torch.dtype) -> None:
    """Four batches, the last of one sample: to the last digit what float() of each would give."""
    losses = (torch.rand(4, generator=torch.Generator().manual_seed(0)) * 10).to(dtype)
    with Syncs() as syncs:
        result = evaluate(Losses(losses), Held(), batch_size=2, device=torch.device("cpu"))  # type: ignore[arg-type]
    assert syncs.found == {"": {"relora_ds.training.evaluate.evaluate": 1}}
    total = 0.0
    for loss, samples in zip(losses, (2, 2, 2, 1), strict=True):
        total += float(loss) * (samples * 4)
    assert result.loss == total / 28
