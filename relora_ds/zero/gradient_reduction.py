"""The gradients' way to the ranks that own them, once per update: each piece to its owner and nowhere else.

Of every n bytes of gradients (N-1)/N·n leave each rank, where an all-reduce sends twice as many. :class:`GradientRoute` leads them
there through DeepSpeed's ZeRO optimizer; :func:`means_of_own`, for gloo, knows nothing of ZeRO.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from relora_ds.comm.counter import COUNTER

ROUND = 2**24
"""Entries that all ranks together exchange at a time: what is packed and what is received take no more than this each."""
REDUCTION = (
    "average_tensor", "allreduce_and_scatter", "buffered_reduce_fallback", "_buffered_reduce_fallback_preserving_fp32",
    "use_multi_rank_bucket_allreduce", "gradient_average", "sequence_parallel_size",
    "partition_gradients", "gradient_accumulation_steps", "process_gradients", "get_gradient_for_reduction",
    "overlapping_partition_gradients_reduce_epilogue",
    "_fill_param_grad_accum_attribute", "use_separate_grad_accum", "use_grad_accum_attribute", "_coalesce_grad_reduction",
)  # fmt: skip
"""What :class:`GradientRoute` replaces, calls or sets."""


@dataclass(frozen=True)
class Cut:
    """``numel`` entries from ``start`` of the piece number ``index``."""

    index: int
    start: int
    numel: int


def rounds(owners: Sequence[int], numels: Sequence[int], world_size: int, limit: int) -> list[list[list[Cut]]]:
    """Cuts pieces so that no rank gets more than ``limit`` entries at a time.

    Args:
        owners: the rank that each piece belongs to.
        numels: the length of each piece.
        world_size: number of ranks.
        limit: at least 1.

    Returns:
        By round and rank: what belongs to that rank, in the order in which the pieces come. Every entry is there once.
    """
    turns: list[list[list[Cut]]] = []
    taken = [0] * world_size
    for index, (owner, numel) in enumerate(zip(owners, numels, strict=True)):
        start = 0
        while start < numel:
            turn, used = divmod(taken[owner], limit)
            cut = Cut(index, start, min(numel - start, limit - used))
            if turn == len(turns):
                turns.append([[] for _ in range(world_size)])
            turns[turn][owner].append(cut)
            taken[owner] += cut.numel
            start += cut.numel
    return turns


def means_of_own(
    pieces: Sequence[Tensor],
    owners: Sequence[int],
    wire: torch.dtype,
    group: dist.ProcessGroup | None,
    *,
    average: bool = True,
    numel_per_round: int = ROUND,
) -> Iterator[tuple[Cut, Tensor]]:
    """The pieces that this rank owns, averaged over the ranks; a collective, to be gone through to its end.

    Args:
        pieces: (n_i,) each, on a CPU, of any floating dtype, the same lengths on all ranks. A yielded one may be written to.
        owners: the rank in ``group`` that each piece belongs to, the same on all ranks.
        wire: the dtype that is sent.
        group: None for the default one.
        average: False for the sum.
        numel_per_round: entries to exchange at a time.

    Yields:
        A cut of an own piece and its mean: (numel,) float32, summed in it.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    limit = max(1, numel_per_round // world_size)
    divisor = world_size if average else 1
    for turn in rounds(owners, [piece.numel() for piece in pieces], world_size, limit):
        sizes = [sum(cut.numel for cut in cuts) for cuts in turn]
        packed = torch.cat([pieces[cut.index].narrow(0, cut.start, cut.numel).to(wire) for cuts in turn for cut in cuts])
        if world_size == 1:
            total = packed.float()
        else:
            total = sum_exchanged(packed, sizes, group).div_(divisor)
        yield from zip(turn[rank], total.split([cut.numel for cut in turn[rank]]), strict=True)


def sum_exchanged(packed: Tensor, sizes: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """Sums by an all-to-all and an addition in fp32: gloo's own reduce and reduce-scatter send up to twice the bytes.

    Args:
        packed: (sum(sizes),) what belongs to rank 0, to rank 1, …
        sizes: entries of each rank.
        group: a process group.

    Returns:
        (sizes[rank],) float32, added in the order of the ranks: the same bits every time.
    """
    rank, width = dist.get_rank(group), packed.element_size()
    received = packed.new_empty(len(sizes) * sizes[rank])
    with COUNTER.standing_for(packed.dtype):
        dist.all_to_all_single(
            received.view(torch.uint8),  # gloo does not know every dtype
            packed.view(torch.uint8),
            [sizes[rank] * width] * len(sizes),
            [size * width for size in sizes],
            group=group,
        )
    total = torch.zeros(sizes[rank], dtype=torch.float32, device=packed.device)
    for part in received.split(sizes[rank]) if sizes[rank] else ():
        total += part
    return total


def route_gradients(engine: Any) -> GradientRoute | None:
    """Gives a fresh engine of ZeRO stage 1 or 2 the shortest way for its gradients; leaves any other engine as it is.

    ``zero_optimization.reduce_scatter: false`` keeps DeepSpeed's all-reduce. An engine with parts that the route does not know keeps
    it, too, with a warning.
    """
    zero = engine.optimizer
    if type(zero) is not DeepSpeedZeroOptimizer or not getattr(zero, "reduce_scatter", False):
        return None
    problem = unroutable(zero, engine)
    if problem:
        warnings.warn(f"gradients go DeepSpeed's way, which sends 1.5 times the bytes or more: {problem}", stacklevel=3)
        return None
    return GradientRoute(zero, on_cpu=get_accelerator().device_name() == "cpu", defer=engine.managed_gradient_accumulation())


def unroutable(zero: Any, engine: Any) -> str:
    """Why the gradients of this optimizer have to go DeepSpeed's way; empty when they need not."""
    missing = [name for name in REDUCTION if not hasattr(zero, name)]
    if missing:
        return f"DeepSpeedZeroOptimizer {deepspeed.__version__} has no {', '.join(missing)}"
    others = {
        "mixture of experts": zero.has_moe_layers,
        "ZenFlow": zero.zenflow,
        "sequence parallelism": zero.sequence_parallel_size > 1,
        "pipeline parallelism": engine.pipeline_parallelism,
        "DeepCompile": engine.is_deepcompile_enabled(),
        "Muon": "Muon" in type(zero.optimizer).__name__,
    }
    return ", ".join(name for name, is_on in others.items() if is_on)


class GradientRoute:
    """Gradient reduction from the backward pass to the rank that owns each piece: once per update, each piece to its owner alone.

    DeepSpeed all-reduces them, which sends twice the bytes, and under stage 2 does so after every micro-batch. Two things change:

    - ``average_tensor`` still says which slice of a bucket belongs to which rank. On a CPU its all-reduce is
      :func:`means_of_own`, since gloo's own reduce sends up to twice the bytes; buckets that are not contiguous pass through it as
      well. Elsewhere it is DeepSpeed's own reduce to each owner, which NCCL serves at the ring's bytes.
    - Under stage 2 with accumulation, gradients gather in ``param.grad``, as under stage 1 (in ``param.grad_accum`` where they are
      to be summed in another dtype), until the last micro-batch, which reduces them while it goes backward, as a lone one does.

    What DeepSpeed does with the reduced slices is untouched: its own partition is complete, the rest of a bucket is thrown away.

    Args:
        zero: DeepSpeed's optimizer, before its first backward pass.
        on_cpu: whether gradients travel by gloo.
        defer: whether gradients may wait for the last micro-batch, which the engine has to announce.
    """

    def __init__(self, zero: Any, *, on_cpu: bool, defer: bool) -> None:
        self.zero = zero
        self.average = zero.gradient_average
        self.waiting: dict[nn.Parameter, int] = {}
        if on_cpu:
            zero.gradient_average = False  # divided after the sum, which one rounding less has
            zero.use_multi_rank_bucket_allreduce = True  # the branch that hands over all slices of a bucket at once
            zero.allreduce_and_scatter = self.scatter
            zero.buffered_reduce_fallback = lambda rank, grads, wire, **others: self.reduce_apart(grads, wire)
            zero._buffered_reduce_fallback_preserving_fp32 = lambda grads, params, wire, **others: self.reduce_apart(grads, wire)
        else:
            zero.use_multi_rank_bucket_allreduce = False
        if defer and zero.partition_gradients and zero.gradient_accumulation_steps > 1:
            zero.use_grad_accum_attribute = zero.use_separate_grad_accum
            self.process, zero.process_gradients = zero.process_gradients, self.gather
            self.finish = zero.overlapping_partition_gradients_reduce_epilogue
            zero.overlapping_partition_gradients_reduce_epilogue = self.reduce_gathered

    def scatter(self, bucket: Sequence[Any], wire: torch.dtype, *, process_group: Any, **others: Any) -> None:
        """Reduces the slices of a bucket, (owners, slice, fp32 accumulator or None) each, to their owners."""
        owners = [next(iter(ranks)) for ranks, _, _ in bucket]
        pieces = [piece for _, piece, _ in bucket]
        for cut, mean in means_of_own(pieces, owners, wire, process_group, average=self.average):
            _, piece, accumulator = bucket[cut.index]
            piece.narrow(0, cut.start, cut.numel).copy_(mean)
            if accumulator is not None:
                accumulator.narrow(0, cut.start, cut.numel).add_(mean)

    def reduce_apart(self, grads: Sequence[Tensor], wire: torch.dtype) -> None:
        """Reduces a bucket of gradients that lie apart (``contiguous_gradients: false``) in a copy of them."""
        if not grads:
            return
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        self.zero.average_tensor(flat, wire)
        for grad, reduced in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(reduced.view_as(grad))

    def gather(self, param: nn.Parameter, group: int) -> None:
        """Stands for ``process_gradients``, called with every gradient that is ready."""
        if self.zero._coalesce_grad_reduction or self.zero.is_gradient_accumulation_boundary():
            self.waiting.pop(param, None)
            self.process(param, group)
            return
        self.waiting[param] = group
        if self.zero.use_grad_accum_attribute:
            self.zero._fill_param_grad_accum_attribute(param)

    def reduce_gathered(self) -> None:
        """Stands for the end of a backward pass: only that of the last micro-batch has something to reduce."""
        if not self.zero.is_gradient_accumulation_boundary():
            return
        for param, group in self.waiting.items():  # those without a gradient in the last micro-batch
            if self.zero.get_gradient_for_reduction(param) is not None:
                self.process(param, group)
        self.waiting.clear()
        self.finish()
