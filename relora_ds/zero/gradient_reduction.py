"""The gradients' way to the ranks that own them, once per update: each piece to its owner and nowhere else.

Of every n bytes of gradients (N-1)/N·n leave each rank, where an all-reduce sends twice as many. :class:`GradientRoute` leads them
there through DeepSpeed's ZeRO optimizer; :func:`means_of_own` knows nothing of ZeRO.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from relora_ds.comm.counter import COUNTER

_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its name before torch 2.13

Exchange = Callable[[Tensor, Sequence[int], dist.ProcessGroup | None, int], Tensor]
"""The sum of one's own part over a divisor: of what belongs to rank 0, to rank 1, … in one tensor, and the entries of each rank."""
ROUND = 2**24
"""Entries that all ranks together exchange over gloo at a time: packing and receiving take no more than this each."""
REDUCTION = (
    "average_tensor", "allreduce_and_scatter", "buffered_reduce_fallback", "_buffered_reduce_fallback_preserving_fp32",
    "use_multi_rank_bucket_allreduce", "gradient_average", "sequence_parallel_size",
    "partition_gradients", "gradient_accumulation_steps", "process_gradients", "get_gradient_for_reduction",
    "overlapping_partition_gradients_reduce_epilogue",
    "_fill_param_grad_accum_attribute", "use_separate_grad_accum", "use_grad_accum_attribute", "_coalesce_grad_reduction",
    "overlap_comm", "reduction_stream",
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
    exchange: Exchange,
    *,
    average: bool = True,
    numel_per_round: int | None = ROUND,
) -> Iterator[tuple[Cut, Tensor]]:
    """The pieces that this rank owns, averaged over the ranks; a collective, to be gone through to its end.

    Args:
        pieces: (n_i,) each, of any floating dtype, the same lengths on all ranks. A yielded one may be written to.
        owners: the rank in ``group`` that each piece belongs to, the same on all ranks.
        wire: the dtype that is sent.
        group: None for the default one.
        exchange: how it is sent and summed.
        average: False for the sum.
        numel_per_round: entries to exchange at a time; None for all at once.

    Yields:
        A cut of an own piece and its mean: (numel,), in the dtype in which ``exchange`` sums.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    numels = [piece.numel() for piece in pieces]
    divisor = world_size if average else 1
    limit = max(1, sum(numels) if numel_per_round is None else numel_per_round // world_size)
    for turn in rounds(owners, numels, world_size, limit):
        sizes = [sum(cut.numel for cut in cuts) for cuts in turn]
        packed = torch.cat([pieces[cut.index].narrow(0, cut.start, cut.numel).to(wire) for cuts in turn for cut in cuts])
        total = packed if world_size == 1 else exchange(packed, sizes, group, divisor)
        yield from zip(turn[rank], total.split([cut.numel for cut in turn[rank]]), strict=True)


def sum_exchanged(packed: Tensor, sizes: Sequence[int], group: dist.ProcessGroup | None, divisor: int) -> Tensor:
    """The :data:`Exchange` for gloo: an all-to-all, and a sum in fp32. Its own reduce and reduce-scatter send up to twice the bytes.

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
    return total.div_(divisor)


def sum_scattered(packed: Tensor, sizes: Sequence[int], group: dist.ProcessGroup | None, divisor: int) -> Tensor:
    """The :data:`Exchange` for NCCL: one reduce-scatter, on the current stream. It divides first, or sums in fp16 would overflow.

    Where the ranks' parts differ in length, torch makes one group of reduces of it, each part to its rank, which sends no byte more.
    Padding the parts to one length would send up to N times as much, since a small bucket belongs to one or two ranks.

    Returns:
        (sizes[rank],) in the dtype of ``packed``, whose entries are lost.
    """
    packed.div_(divisor)
    own = packed.new_empty(sizes[dist.get_rank(group)])
    if len(set(sizes)) == 1:
        _reduce_scatter(own, packed, group=group)
    else:
        dist.reduce_scatter(own, list(packed.split(list(sizes))), group=group)
    return own


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

    - ``average_tensor`` still says which slice of a bucket belongs to which rank. Its all-reduce is :func:`means_of_own`; buckets
      that are not contiguous pass through it as well.
    - Under stage 2 with accumulation, gradients gather in ``param.grad``, as under stage 1 (in ``param.grad_accum`` where they are
      to be summed in another dtype), until the last micro-batch, which reduces them while it goes backward, as a lone one does.

    What DeepSpeed does with the reduced slices is untouched: its own partition is complete, the rest of a bucket is thrown away.

    Args:
        zero: DeepSpeed's optimizer, before its first backward pass.
        on_cpu: whether gradients travel by gloo; else by NCCL.
        defer: whether gradients may wait for the last micro-batch, which the engine has to announce.
    """

    def __init__(self, zero: Any, *, on_cpu: bool, defer: bool) -> None:
        self.zero = zero
        self.waiting: dict[nn.Parameter, int] = {}
        self.producers: set[Any] = set()
        self.means = partial(
            means_of_own,
            exchange=sum_exchanged if on_cpu else sum_scattered,
            average=zero.gradient_average,
            numel_per_round=ROUND if on_cpu else None,
        )
        zero.gradient_average = False  # the exchange divides
        zero.use_multi_rank_bucket_allreduce = True  # the branch that hands over all slices of a bucket at once
        zero.allreduce_and_scatter = self.scatter
        zero.buffered_reduce_fallback = lambda rank, grads, wire, **others: self.reduce_apart(grads, wire)
        zero._buffered_reduce_fallback_preserving_fp32 = lambda grads, params, wire, **others: self.reduce_apart(grads, wire)
        self.process, zero.process_gradients = zero.process_gradients, self.gather
        self.defers = defer and zero.partition_gradients and zero.gradient_accumulation_steps > 1
        if self.defers:
            zero.use_grad_accum_attribute = zero.use_separate_grad_accum
            self.finish = zero.overlapping_partition_gradients_reduce_epilogue
            zero.overlapping_partition_gradients_reduce_epilogue = self.reduce_gathered

    def reducing(self) -> AbstractContextManager[Any]:
        """The stream of reductions, which waits for every stream that makes gradients: the device itself is waited for nowhere."""
        accelerator = get_accelerator()
        stream = self.zero.reduction_stream if self.zero.overlap_comm else accelerator.current_stream()
        if not accelerator.resolves_data_dependency():
            for producer in self.producers:
                stream.wait_stream(producer)
        return accelerator.stream(stream)

    def scatter(self, bucket: Sequence[Any], wire: torch.dtype, *, process_group: Any, **others: Any) -> None:
        """Reduces the slices of a bucket, (owners, slice, fp32 accumulator or None) each, to their owners."""
        owners = [next(iter(ranks)) for ranks, _, _ in bucket]
        pieces = [piece for _, piece, _ in bucket]
        with self.reducing():
            if not get_accelerator().resolves_data_dependency():
                # The slices are of one tensor. Where it is no bucket but a gradient larger than one, DeepSpeed drops it at once.
                pieces[0].record_stream(get_accelerator().current_stream())
            for cut, mean in self.means(pieces, owners, wire, process_group):
                _, piece, accumulator = bucket[cut.index]
                piece.narrow(0, cut.start, cut.numel).copy_(mean)
                if accumulator is not None:
                    accumulator.narrow(0, cut.start, cut.numel).add_(mean)

    def reduce_apart(self, grads: Sequence[Tensor], wire: torch.dtype) -> None:
        """Reduces a bucket of gradients that lie apart (``contiguous_gradients: false``) in a copy of them."""
        if not grads:
            return
        with self.reducing():
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            self.zero.average_tensor(flat, wire)
            for grad, reduced in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(reduced.view_as(grad))

    def gather(self, param: nn.Parameter, group: int) -> None:
        """Stands for ``process_gradients``, called with every gradient that is ready."""
        self.producers.add(get_accelerator().current_stream())
        if not self.defers or self.zero._coalesce_grad_reduction or self.zero.is_gradient_accumulation_boundary():
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
