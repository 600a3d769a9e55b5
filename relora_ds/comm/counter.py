"""Every collective counted: by operation, dtype, group and purpose, in payload bytes and in the bytes a ring sends for it.

All Python code that communicates, torch.distributed's own, DeepSpeed's and ours, ends in a method of
``torch.distributed.ProcessGroup``. These are wrapped: nothing has to be told of the counting, and nothing is synchronised. What C++
sends by itself is not seen: the reducer of DistributedDataParallel without a communication hook, and the collectives of compiled
graphs.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13

GRADIENT, PARAMETERS, NORM, LOSS = "gradient", "parameters", "norm", "loss"
RESTART, VERIFY, EVALUATION, CHECKPOINT, START_UP, OTHER = "restart", "verify", "evaluation", "checkpoint", "start-up", "other"
UPDATE = (GRADIENT, PARAMETERS, NORM, LOSS)
"""The purposes that every update has."""
PURPOSES = (*UPDATE, RESTART, VERIFY, EVALUATION, CHECKPOINT, START_UP, OTHER)


def ring_bytes(operation: str, payload: float, world_size: int) -> float:
    """What a rank sends, on the mean over the ranks, for a collective of ``payload`` bytes as ring algorithms do it.

    All-reduce: 2(N-1)/N of the payload. All-gather (payload: what all ranks hold afterwards), reduce-scatter and all-to-all
    (payload: what a rank brings), broadcast, reduce, gather and scatter: (N-1)/N. A message from one rank to another: all of it.
    (Patarasuk and Yuan, Journal of Parallel and Distributed Computing 69, 2009.)
    """
    if operation in ("barrier", "receive"):
        return 0.0
    if operation == "send":
        return float(payload)
    share = (world_size - 1) / world_size * payload
    return 2 * share if operation == "all-reduce" else share


@dataclass(frozen=True, order=True)
class Kind:
    """What is counted apart. ``group``: the number of its ranks, and ``world`` if these are all."""

    purpose: str
    operation: str
    dtype: str
    group: str


@dataclass
class Tally:
    """calls: how often. payload_bytes: of the tensors. wire_bytes: sent by this rank, as rings send."""

    calls: int = 0
    payload_bytes: int = 0
    wire_bytes: float = 0.0


class Counter:
    """The counts of this process.

    Attributes:
        tallies: by kind.
    """

    def __init__(self) -> None:
        self.tallies: dict[Kind, Tally] = {}
        self._purpose = OTHER
        self._dtype: str | None = None
        self._groups: dict[str, tuple[int, int, str]] = {}

    @contextmanager
    def purpose(self, name: str) -> Iterator[None]:
        """What is sent inside is for ``name``; the innermost one counts. Not by thread: autograd's threads work for the caller.

        But a start-up and the change of phase, which gather masters as restarts do, are no restarts.
        """
        before = self._purpose
        self._purpose = START_UP if (before, name) == (START_UP, RESTART) else name
        try:
            yield
        finally:
            self._purpose = before

    def serving(self, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """The decorator of :meth:`purpose`."""

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def inside(*args: Any, **kwargs: Any) -> Any:
                with self.purpose(name):
                    return function(*args, **kwargs)

            return inside

        return decorate

    @contextmanager
    def standing_for(self, dtype: torch.dtype) -> Iterator[None]:
        """Inside, what is sent as bytes is counted as ``dtype``: backends do not carry them all."""
        before, self._dtype = self._dtype, _name(dtype)
        try:
            yield
        finally:
            self._dtype = before

    def add(self, operation: str, tensors: Sequence[Tensor], group: dist.ProcessGroup, own_bytes: float | None = None) -> None:
        """Counts one collective.

        Args:
            operation: as in :func:`ring_bytes`.
            tensors: whose bytes together are the payload.
            group: of the ranks.
            own_bytes: what this rank sends, where that is known exactly.
        """
        world_size, _, label = self._group(group)
        payload = sum(tensor.nbytes for tensor in tensors)
        dtype = self._dtype or (_name(tensors[0].dtype) if tensors else "")
        purpose = self._purpose
        if purpose == NORM and operation in ("all-gather", "broadcast"):
            purpose = PARAMETERS  # ZeRO's step does both: scalars are reduced, parameters gathered
        tally = self.tallies.setdefault(Kind(purpose, operation, dtype, label), Tally())
        tally.calls += 1
        tally.payload_bytes += payload
        tally.wire_bytes += ring_bytes(operation, payload, world_size) if own_bytes is None else own_bytes

    def rank_of(self, group: dist.ProcessGroup) -> int:
        return self._group(group)[1]

    def _group(self, group: dist.ProcessGroup) -> tuple[int, int, str]:
        """World size, own rank and label, asked once."""
        known = self._groups.get(group.group_name)
        if known is None or known[0] != group.size():
            size = group.size()
            label = f"world ({size})" if dist.is_initialized() and size == dist.get_world_size() else str(size)
            known = self._groups[group.group_name] = (size, group.rank(), label)
        return known

    def wire_bytes(self, purposes: Iterable[str] = PURPOSES) -> float:
        """Sent by this rank so far for ``purposes``."""
        wanted = frozenset(purposes)
        return sum(tally.wire_bytes for kind, tally in self.tallies.items() if kind.purpose in wanted)

    def payload_bytes(self, purposes: Iterable[str] = PURPOSES) -> int:
        """Payload so far of collectives for ``purposes``."""
        wanted = frozenset(purposes)
        return sum(tally.payload_bytes for kind, tally in self.tallies.items() if kind.purpose in wanted)

    def snapshot(self) -> dict[Kind, Tally]:
        """A copy, to take differences from."""
        return {kind: Tally(**asdict(tally)) for kind, tally in self.tallies.items()}

    def since(self, before: dict[Kind, Tally]) -> dict[Kind, Tally]:
        """What was counted after ``before`` was taken."""
        differences = {}
        for kind, now in sorted(self.tallies.items()):
            then = before.get(kind, Tally())
            if now.calls > then.calls:
                differences[kind] = Tally(
                    now.calls - then.calls, now.payload_bytes - then.payload_bytes, now.wire_bytes - then.wire_bytes
                )
        return differences


COUNTER = Counter()
"""The process's own: there is one network under it."""


class CountedGroup:
    """The collectives that restarts use, each for a purpose.

    Args:
        group: a torch process group; None for the default one.
        device: where tensors must lie for this group's backend; others are moved there and back.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device | str) -> None:
        self.group = group
        self.device = torch.device(device)
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)

    def all_reduce(self, tensor: Tensor, purpose: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduces ``tensor`` over the ranks in place and returns it."""
        if self.world_size > 1:
            moved = tensor.to(self.device)
            with COUNTER.purpose(purpose):
                dist.all_reduce(moved, op=op, group=self.group)
            if moved is not tensor:
                tensor.copy_(moved)
        return tensor

    def all_gather(self, out: Tensor, mine: Tensor, purpose: str) -> None:
        """Fills ``out``, (world_size · rows, columns), with ``mine``, (rows, columns), of every rank; contiguous, of any dtype."""
        if self.world_size == 1:
            out.copy_(mine)
            return
        target = out.to(self.device)
        with COUNTER.purpose(purpose), COUNTER.standing_for(out.dtype):
            _all_gather(target.view(torch.uint8), mine.to(self.device).view(torch.uint8), group=self.group)
        if target is not out:
            out.copy_(target)

    def gather(self, mine: Tensor, owner: int, purpose: str) -> Tensor | None:
        """All ranks' ``mine``, (rows, columns) on :attr:`device`, on the rank ``owner``: (world_size · rows, columns); else None."""
        if self.world_size == 1:
            return mine
        out = mine.new_empty(self.world_size * mine.shape[0], mine.shape[1]) if owner == self.rank else None
        target = owner if self.group is None else dist.get_global_rank(self.group, owner)
        with COUNTER.purpose(purpose):
            dist.gather(mine, None if out is None else list(out.chunk(self.world_size)), dst=target, group=self.group)
        return out

    def broadcast(self, tensor: Tensor, owner: int, purpose: str) -> Tensor:
        """Sends ``tensor`` (on :attr:`device`) from the rank ``owner`` of this group to all others, in place."""
        if self.world_size > 1:
            source = owner if self.group is None else dist.get_global_rank(self.group, owner)
            with COUNTER.purpose(purpose):
                dist.broadcast(tensor, src=source, group=self.group)
        return tensor

    def agree(self, text: str, purpose: str) -> bool:
        """Whether ``text`` is the same on all ranks, by a 64-bit hash: 16 bytes, however long it is."""
        digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()[:8]), dtype=torch.int64)
        lowest, inverted_highest = self.all_reduce(torch.cat([digest, ~digest]), purpose, dist.ReduceOp.MIN).tolist()
        return bool(lowest == ~inverted_highest)


def by_purpose(tallies: dict[Kind, Tally]) -> dict[str, float]:
    """Wire bytes of each purpose that has any, in the order of :data:`PURPOSES`."""
    sums = {purpose: sum(tally.wire_bytes for kind, tally in tallies.items() if kind.purpose == purpose) for purpose in PURPOSES}
    return {purpose: value for purpose, value in sums.items() if value}


def rows(tallies: dict[Kind, Tally]) -> list[dict[str, Any]]:
    """The tallies as lines of a table, for JSON."""
    return [{**asdict(kind), **asdict(tally)} for kind, tally in sorted(tallies.items())]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _flat(value: Any) -> list[Tensor]:
    """The tensors of an argument: one, a list of them, or a list of lists."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value or () for tensor in _flat(item)]


def _all_to_all_base(group: dist.ProcessGroup, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """All but the own part of the input, which may be cut unevenly."""
    source, splits = _argument(1, "input", args, kwargs), _argument(3, "input_split_sizes", args, kwargs)
    world_size, rank = group.size(), COUNTER.rank_of(group)
    if not splits:
        return source.nbytes * (world_size - 1) / world_size
    return source.nbytes - source.nbytes * splits[rank] / max(1, sum(splits))


def _all_to_all(group: dist.ProcessGroup, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    sources = _argument(1, "input_tensors", args, kwargs)
    return float(sum(source.nbytes for rank, source in enumerate(sources) if rank != COUNTER.rank_of(group)))


def _reduce_scatter(group: dist.ProcessGroup, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """All but the own part of a list. Parts may differ in length: NCCL then reduces each to its rank, along a ring of its own."""
    outputs, inputs = _argument(0, "output_tensors", args, kwargs), _argument(1, "input_tensors", args, kwargs)
    return float(sum(tensor.nbytes for tensor in _flat(inputs)) - sum(tensor.nbytes for tensor in _flat(outputs)))


def _argument(index: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) > index:
        return args[index]
    return kwargs.get(name)


OPERATIONS: dict[str, tuple[str, int | None, Callable[..., float] | None]] = {
    # method: operation, which argument is the payload, what this rank sends where the mean over the ranks will not do
    "allreduce": ("all-reduce", 0, None),
    "allreduce_coalesced": ("all-reduce", 0, None),
    "broadcast": ("broadcast", 0, None),
    "reduce": ("reduce", 0, None),
    "allgather": ("all-gather", 0, None),
    "allgather_coalesced": ("all-gather", 0, None),
    "allgather_into_tensor_coalesced": ("all-gather", 0, None),
    "_allgather_base": ("all-gather", 0, None),
    "all_gather_single": ("all-gather", 0, None),
    "all_gather_single_coalesced": ("all-gather", 0, None),
    "reduce_scatter": ("reduce-scatter", 1, _reduce_scatter),
    "reduce_scatter_tensor_coalesced": ("reduce-scatter", 1, None),
    "_reduce_scatter_base": ("reduce-scatter", 1, None),
    "reduce_scatter_single": ("reduce-scatter", 1, None),
    "reduce_scatter_single_coalesced": ("reduce-scatter", 1, None),
    "alltoall_base": ("all-to-all", 1, _all_to_all_base),
    "all_to_all_single": ("all-to-all", 1, _all_to_all_base),
    "alltoall": ("all-to-all", 1, _all_to_all),
    "gather": ("gather", 1, None),
    "scatter": ("scatter", 0, None),
    "send": ("send", 0, None),
    "recv": ("receive", 0, None),
    "recv_anysource": ("receive", 0, None),
    "barrier": ("barrier", None, None),
}
"""Of ProcessGroup, as torch 2.4 to 2.13 have them; those that a version lacks are left out."""


def count_everything() -> None:
    """Counts all collectives of this process in :data:`COUNTER` from now on; may be called again."""
    for method, (operation, payload, own_bytes) in OPERATIONS.items():
        original = dist.ProcessGroup.__dict__.get(method)
        if original is not None and not hasattr(original, "counts"):
            setattr(dist.ProcessGroup, method, _counted(original, operation, payload, own_bytes))


def _counted(original: Any, operation: str, payload: int | None, own_bytes: Callable[..., float] | None) -> Any:
    @functools.wraps(original)
    def counted(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        if group.size() > 1:
            source = () if payload is None else args[payload] if len(args) > payload else next(iter(kwargs.values()), ())
            COUNTER.add(operation, _flat(source), group, own_bytes(group, args, kwargs) if own_bytes else None)
        return original(group, *args, **kwargs)

    counted.counts = True  # type: ignore[attr-defined]
    return counted


def label(engine: Any) -> None:
    """Tells the counter what a DeepSpeed engine sends for: gradients while it goes backward, norms and parameters while it steps."""
    purposes = {"backward": GRADIENT, "step": NORM, "save_checkpoint": CHECKPOINT, "load_checkpoint": CHECKPOINT}
    for method, purpose in purposes.items():
        setattr(engine, method, COUNTER.serving(purpose)(getattr(engine, method)))
