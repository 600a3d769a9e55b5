"""Validation loss and perplexity, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from relora_ds.comm.counter import COUNTER, EVALUATION
from relora_ds.data.token_dataset import TokenDataset


@dataclass(frozen=True)
class Evaluation:
    """loss: nats per predicted token. perplexity: exp(loss). tokens: predicted tokens that were counted."""

    loss: float
    perplexity: float
    tokens: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: TokenDataset,
    *,
    batch_size: int,
    device: torch.device,
    max_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    beat: Callable[[], None] = lambda: None,
) -> Evaluation:
    """The mean loss of ``model`` over the first samples of ``dataset``.

    Every rank takes the samples rank, rank + world_size, …; sums are added in float64, so the result does not depend on the number
    of ranks beyond the last bits.

    Args:
        model: returns ``.loss``, the mean over the predicted tokens of a batch.
        dataset: not shuffled.
        batch_size: sequences of one forward pass.
        device: of the model.
        max_tokens: stop after so many tokens; None for all.
        beat: called as often on every rank, after each of its batches and in place of those that it has less than others.
    """
    num_samples = len(dataset)
    if max_tokens is not None:
        num_samples = max(1, min(num_samples, max_tokens // dataset.sequence_length))
    mine = range(rank, num_samples, world_size)
    sums = torch.zeros(2, dtype=torch.float64)
    was_training = model.training
    model.eval()
    for start in range(0, math.ceil(num_samples / world_size), batch_size):
        if samples := mine[start : start + batch_size]:
            ids = dataset.batch(samples).to(device)
            predicted = ids.shape[0] * (ids.shape[1] - 1)
            loss = model(input_ids=ids, labels=ids).loss
            sums += torch.tensor([float(loss) * predicted, predicted], dtype=torch.float64)
        beat()
    model.train(was_training)
    if world_size > 1:
        sums = sums.to(device)
        with COUNTER.purpose(EVALUATION):
            dist.all_reduce(sums)
    total, tokens = sums.tolist()
    mean = total / tokens
    return Evaluation(mean, math.exp(mean) if mean < 700 else math.inf, int(tokens))
