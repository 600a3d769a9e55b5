"""Cross entropy from a head's input, one chunk of tokens at a time: logits, (tokens, vocabulary), are never whole. PURE.

As in Liger's kernel (arXiv 2410.10989), a plain head's gradients are formed with the loss, while a chunk's logits are there: no
product is formed twice. Chunks of any other head, and chunks in fp16, are formed again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from relora_ds.method.linear import refuse_second_derivatives

IGNORED = -100
"""A label that does not count."""
CHUNK = 2**25
"""Logits of one chunk, at most: see benchmarks/loss.md."""
FUSED = (torch.float32, torch.float64, torch.bfloat16)
"""Dtypes of a head whose gradients are formed early: not fp16, whose loss is scaled so that they do not vanish."""


def num_chunks(tokens: int, vocabulary: int) -> int:
    """In how many the logits of so many tokens come."""
    return -(-tokens // max(1, CHUNK // vocabulary))


def chunk_tokens(tokens: int, vocabulary: int) -> int:
    """Of one of these chunks, the last of which may have fewer."""
    return -(-tokens // num_chunks(tokens, vocabulary))


def is_plain(head: nn.Module) -> bool:
    """Whether a head is a matrix and nothing else."""
    return type(head).forward is nn.Linear.forward and head.bias is None


def chunked_cross_entropy(head: nn.Module, hidden: Tensor, labels: Tensor, divisor: Tensor | float | None = None) -> Tensor:
    """The sum over all tokens whose label counts, divided by ``divisor``; () fp32.

    Args:
        head: (tokens, hidden) -> (tokens, vocabulary).
        hidden: (tokens, hidden).
        labels: (tokens,) int64; :data:`IGNORED` does not count.
        divisor: None for the number of labels that count: the mean, which is not a number where there are none.
    """
    if divisor is None:
        divisor = (labels != IGNORED).sum()
    rows = chunk_tokens(len(labels), head.out_features)
    if torch.is_grad_enabled() and is_plain(head) and hidden.dtype == head.weight.dtype and hidden.dtype in FUSED:
        return LinearCrossEntropy.apply(hidden, head.weight, labels, rows) / divisor
    chunks = zip(hidden.split(rows), labels.split(rows), strict=True)
    return sum(checkpoint(_summed, head, *chunk, use_reentrant=False) for chunk in chunks) / divisor


def _summed(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), labels, ignore_index=IGNORED, reduction="sum")


class LinearCrossEntropy(torch.autograd.Function):
    """hidden (t, h), head (v, h), labels (t,), tokens of a chunk -> the sum of the losses, () fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, rows: int) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        sums = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) if wants_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(labels), rows):
            h, own = hidden[start : start + rows], labels[start : start + rows]
            counts = own.ne(IGNORED).unsqueeze(1)
            own = own.unsqueeze(1).where(counts, 0)
            log_probs = F.log_softmax(F.linear(h, weight), dim=-1, dtype=torch.float32)
            total -= log_probs.gather(1, own).where(counts, 0).sum()
            grad = log_probs.exp_().scatter_add_(1, own, counts.float().neg()).to(h.dtype)  # of tokens that count
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[start : start + rows]).mul_(counts)
            if sums is not None and sums.dtype == h.dtype:
                sums.addmm_(grad.t(), h * counts)
            elif sums is not None:  # in bf16 each addition would round
                sums.add_(grad.t() @ (h * counts))
        ctx.save_for_backward(grad_hidden, None if sums is None else sums.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        refuse_second_derivatives("model.loss=torch forms them")
        grad_hidden, grad_weight = ctx.saved_tensors
        return *(None if found is None else found.mul_(grad) for found in (grad_hidden, grad_weight)), None, None
