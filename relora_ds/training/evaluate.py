"""Validation loss and perplexity, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from relora_ds.comm.counter import COUNTER, EVALUATION
from relora_ds.data.prefetch import Prefetch
from relora_ds.data.token_dataset import TokenDataset
from relora_ds.models.packing import none_packed


@dataclass(frozen=True)
class Evaluation:
    """loss: nats per predicted token. perplexity: exp(loss). tokens: predicted tokens that were counted."""

    loss: float
    perplexity: float
    tokens: int


@torch.no_grad()
@none_packed()
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
    batches = [mine[start : start + batch_size] for start in range(0, math.ceil(num_samples / world_size), batch_size)]
    total, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    was_training = model.training
    model.eval()
    with closing(Prefetch(dataset, filter(None, batches), device)) as ahead:
        for samples in batches:
            if samples:
                ids = ahead.batch(samples)
                predicted = ids.shape[0] * (ids.shape[1] - 1)
                total += model(input_ids=ids, labels=ids).loss.double() * predicted
                tokens += predicted
            beat()
    model.train(was_training)
    sums = torch.stack([total, total.new_full((), tokens)])
    if world_size > 1:
        with COUNTER.purpose(EVALUATION):
            dist.all_reduce(sums)
    loss, count = sums.tolist()  # read once: on a GPU the host runs ahead of the batches
    mean = loss / count
    return Evaluation(mean, math.inf if mean >= 700 else math.exp(mean), int(count))  # of a NaN: NaN
