"""Frozen weights: how they are stored (fp32, bf16, fp16, int8), read and merged into; the sharded master; checksums.

The frozen weight of a layer is replicated on every rank. Merging goes through fp32 and rounds once. What rounding loses is measured
at every merge, not hidden: of many small changes that are merged into a coarse store, each is rounded away by itself. The cure is
:class:`ShardedMaster`, an fp32 copy split over the ranks: changes add up there, and the store is rounded from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora_ds.method import exact as exactly

PIECE = 1 << 20
"""Elements merged or hashed at a time on a CPU: some six fp32 tensors of that size, or three int64 ones, are near its caches."""
PIECE_ON_GPU = 1 << 23
"""The same elsewhere, where each of the thirty operations of a piece costs a launch, however little there is to do."""
Change = Callable[[slice], Tensor]
"""Gives rows of a change to a weight: (rows, in) fp32 on the weight's device."""
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INT8_MAX = 127


def quantise(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Symmetric int8 by groups along the input dimension; the last group may be shorter.

    Args:
        weight: (out, in) fp32.
        group_size: inputs that share a scale.

    Returns:
        values (out, in) int8 and scales (out, ceil(in / group_size)) fp32; weight ≈ values · scale.
    """
    rows, columns = weight.shape
    ragged = -columns % group_size
    groups = (F.pad(weight, (0, ragged)) if ragged else weight).reshape(rows, -1, group_size)
    divisor = torch.full((), INT8_MAX, dtype=torch.float32, device=weight.device)  # CUDA multiplies by the inverse of a number
    scales = groups.abs().amax(-1) / divisor
    values = (groups / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)).round_().clamp_(-INT8_MAX, INT8_MAX)
    return values.to(torch.int8).view(rows, -1)[:, :columns].contiguous(), scales


def dequantise(values: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """The (out, in) weight that :func:`quantise` stored, formed in fp32 and rounded to ``dtype``."""
    columns = values.shape[1]
    ragged = -columns % group_size
    groups = (F.pad(values, (0, ragged)) if ragged else values).reshape(*scales.shape, group_size)
    return (groups * scales.unsqueeze(-1)).flatten(1)[:, :columns].to(dtype)


def convert(values: Tensor, scales: Tensor | None, group_size: int, dtype: torch.dtype) -> Tensor:
    """A stored weight in ``dtype``: itself where it is stored in that."""
    return values.to(dtype) if scales is None else dequantise(values, scales, group_size, dtype)


def spacing(values: Tensor, scales: Tensor | None) -> Tensor:
    """Root mean square of the step from one number that a store can hold to the next, at its entries: a 0-d fp32 tensor.

    Rounding to the nearest changes an entry by a step / √12 in the mean square.
    """
    if scales is not None:
        return scales.square().mean().sqrt()
    return values.to(torch.float32).square().mean().sqrt() * torch.finfo(values.dtype).eps


class FrozenWeight(nn.Module):
    """A weight that is not trained, in buffers of its own dtype.

    Buffers, because DeepSpeed casts parameters to the engine's dtype and broadcasts them; and the dtype of these is not changed
    by ``.to(dtype)`` or ``.bfloat16()`` either, since it is what the user chose for storage.

    Args:
        weight: (out, in), any floating dtype; becomes the store itself where it is contiguous and of the dtype to be stored.
        dtype: ``fp32``, ``bf16``, ``fp16`` or ``int8``.
        group_size: of int8: inputs that share a scale.
        exact_rows: rows of ``weight`` to keep in fp32 until a :class:`ShardedMaster` takes them; None for none.

    Attributes:
        values: (out, in), floating or int8. scales: (out, ceil(in / group_size)) fp32 for int8, else None.
        in_state: whether ``state_dict`` holds it; not while a checkpoint is saved whose base holds it.
        was_loaded: whether the newest ``load_state_dict`` brought it.
        beside: a factor of the layer that it is the weight of; empty where it is of none.
    """

    values: Tensor
    scales: Tensor | None

    def __init__(self, weight: Tensor, dtype: str, group_size: int = 128, exact_rows: slice | None = None) -> None:
        super().__init__()
        self.dtype_name, self.group_size = dtype, group_size
        self.in_state = self.was_loaded = True
        self.beside: tuple[Tensor, ...] = ()  # in a tuple it is not taken for a parameter of this module
        weight = weight.detach()
        self.exact_rows = None if exact_rows is None else weight[exact_rows].to(torch.float32, copy=True)
        if dtype == "int8":
            num_groups = -(-weight.shape[1] // group_size)
            self.register_buffer("values", torch.empty(weight.shape, dtype=torch.int8, device=weight.device))
            self.register_buffer("scales", torch.empty(weight.shape[0], num_groups, device=weight.device))
            for rows in pieces(slice(0, weight.shape[0]), weight.shape[1], piece_on(weight.device)):
                self.store(*self.round(weight[rows].to(torch.float32)), rows)
        else:
            self.register_buffer("values", weight.to(FLOATS[dtype]).contiguous())
            self.register_buffer("scales", None)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        """What a model casts the input of the layer to: that of the factors, in whatever the weight is stored."""
        return (*self.beside, self.values)[0].dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def stored_bytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def round(self, exact: Tensor) -> tuple[Tensor, Tensor | None]:
        """(rows, in) fp32 -> the values and scales in which it would be stored."""
        return self.rounded(exact, self.dtype_name, self.group_size)

    @staticmethod
    def rounded(exact: Tensor, dtype: str, group_size: int) -> tuple[Tensor, Tensor | None]:
        """(rows, in) fp32 -> the values and scales of a store of that kind."""
        return quantise(exact, group_size) if dtype == "int8" else (exact.to(FLOATS[dtype]), None)

    @staticmethod
    def exact(values: Tensor, scales: Tensor | None, group_size: int) -> Tensor:
        """The counterpart of :meth:`rounded`: (rows, in) fp32."""
        return convert(values, scales, group_size, torch.float32)

    def read(self, rows: slice = slice(None)) -> Tensor:
        """The stored weight, or rows of it, in fp32."""
        return self.convert(self.values[rows], None if self.scales is None else self.scales[rows])

    def convert(self, values: Tensor, scales: Tensor | None) -> Tensor:
        """What :meth:`round` gave, in fp32 again."""
        return self.exact(values, scales, self.group_size)

    @torch.no_grad()
    def store(self, values: Tensor, scales: Tensor | None, rows: slice = slice(None)) -> None:
        """Takes over what :meth:`round` gave for these rows."""
        self.values[rows].copy_(values)
        if self.scales is not None and scales is not None:
            self.scales[rows].copy_(scales)

    @torch.no_grad()
    def merge(self, change: Change, piece: int | None = None) -> MergeStats:
        """Adds a change through fp32, rounded once; a few rows at a time, so that little memory is needed beside the store.

        ``piece``: elements at a time; None: what :func:`piece_on` says, as in all that has this argument.
        """
        stats = MergeStats.nothing(self.values.device)
        for rows in pieces(slice(0, self.shape[0]), self.shape[1], piece or piece_on(self.device)):
            before, delta = self.read(rows), change(rows)
            exact = before + delta
            stored = self.round(exact)
            stats += MergeStats.measure(before, delta, exact, self.convert(*stored))
            self.store(*stored, rows)
        return stats

    def look_up(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the stored weight: ids (...) -> (..., in) of ``dtype``; only these rows are converted."""
        flat = ids.flatten()
        values = F.embedding(flat, self.values)
        scales = None if self.scales is None else F.embedding(flat, self.scales)
        return convert(values, scales, self.group_size, dtype).view(*ids.shape, self.shape[1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenWeight:
        """Moves between devices as any module does; keeps the stored dtype where a cast is asked for."""
        for name, buffer in list(self._buffers.items()):
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any) -> Any:
        """Called where it is given for a tensor. The fast path of torch's transformer blocks sees this method, and stands back."""
        name = getattr(function, "__name__", function)
        problem = f"{name} is given the frozen weight of a layer with factors, which the model multiplies by itself"
        raise TypeError(f"{problem}: leave that layer out of relora.targets")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.in_state:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        """A state without this weight is no error here: whoever loads it must find the weight in a base."""
        self.was_loaded = f"{prefix}values" in state_dict
        if self.was_loaded:
            super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.dtype_name}" + (f", group_size={self.group_size}" if self.scales is not None else "")


@dataclass
class MergeStats:
    """Squared Frobenius norms of one or more merges, as 0-d float32 tensors on the weights' device (no synchronisation).

    Attributes:
        change: of the exact change.
        lost: of the part of the change that did not arrive in the stored weight.
        weight: of the stored weight before the merge.
    """

    change: Tensor
    lost: Tensor
    weight: Tensor

    @classmethod
    def nothing(cls, device: torch.device) -> MergeStats:
        return cls(*(torch.zeros((), device=device) for _ in range(3)))

    @classmethod
    def measure(cls, before: Tensor, change: Tensor, exact: Tensor, after: Tensor) -> MergeStats:
        """From the stored weight before and after a merge of ``change``, and their exact sum; all fp32, of one shape."""
        return cls(change.square().sum(), (exact - after).square().sum(), before.square().sum())

    def __add__(self, other: MergeStats) -> MergeStats:
        return MergeStats(self.change + other.change, self.lost + other.lost, self.weight + other.weight)

    @property
    def relative_change(self) -> float:
        """Norm of the change over norm of the weight."""
        return float((self.change / self.weight.clamp(min=1e-30)).sqrt())

    @property
    def merge_error(self) -> float:
        """Share of the change that rounding lost: norm of the loss over norm of the change; 0 when nothing changed."""
        return float((self.lost / self.change.clamp(min=1e-30)).sqrt())


def piece_on(device: torch.device) -> int:
    """How many elements are worked on at a time where these lie on ``device``."""
    return PIECE if device.type == "cpu" else PIECE_ON_GPU


def pieces(rows: slice, columns: int, piece: int) -> Iterator[slice]:
    """``rows`` cut into pieces of about ``piece`` elements."""
    step = max(1, piece // columns)
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def own_rows(num_rows: int, rank: int, world_size: int) -> slice:
    """The rows of a matrix whose master is on ``rank``: equal shares, the last ones shorter or empty."""
    share = -(-num_rows // world_size)
    return slice(min(rank * share, num_rows), min((rank + 1) * share, num_rows))


class ShardedMaster:
    """An fp32 master of every frozen matrix, split by rows over the ranks: 4 bytes x frozen parameters / ranks on each.

    A merge adds this rank's rows of the change in fp32, rounds them to the stored dtype and gathers the rounded rows: all replicas
    are the same bits by construction, and after any number of merges the store is the rounding of the exact sum, nothing more. Beside
    master and store, a merge needs one layer in its stored dtype, and what :data:`PIECE` says.

    Args:
        weights: the frozen weights by layer name, the same order on all ranks. Where a weight kept its exact rows, they are taken;
            otherwise the master starts from what is stored.
        rank, world_size: of the group that shares the master.
        gather_rows: (out, mine): fills out (world_size · share, columns) with mine (share, columns) of all ranks, any dtype.
        device: where the master lives.

    Attributes:
        rows: this rank's rows of every master, (own rows, in) fp32.
        held: what the factors began with of the rounding error, where they did: (own rows, r) and (r, in), whose product is in the
            master already and must not be added again when the factors are merged.
    """

    def __init__(
        self,
        weights: Mapping[str, FrozenWeight],
        rank: int,
        world_size: int,
        gather_rows: Callable[[Tensor, Tensor], None],
        device: torch.device | str,
    ) -> None:
        self.weights = dict(weights)
        self.rank, self.world_size, self.gather_rows = rank, world_size, gather_rows
        self.rows: dict[str, Tensor] = {}
        self.held: dict[str, tuple[Tensor, Tensor]] = {}
        for name, weight in self.weights.items():
            exact = weight.exact_rows if weight.exact_rows is not None else weight.read(self.own(name))
            self.rows[name] = exact.to(device, torch.float32, copy=True)
            weight.exact_rows = None

    def own(self, name: str) -> slice:
        return own_rows(self.weights[name].shape[0], self.rank, self.world_size)

    def _pieces(self, name: str, piece: int | None = None) -> Iterator[tuple[slice, slice]]:
        """This rank's rows of a weight, a few at a time: where they are in the weight, and in the master."""
        own, weight = self.own(name), self.weights[name]
        for rows in pieces(own, weight.shape[1], piece or piece_on(weight.device)):
            yield rows, slice(rows.start - own.start, rows.stop - own.start)

    @torch.no_grad()
    def merge(self, name: str, change: Change, piece: int | None = None) -> MergeStats:
        """Adds this rank's rows of a change and publishes; returns the figures of these rows alone. Every rank must call it."""
        weight, master = self.weights[name], self.rows[name]
        stats, parts = MergeStats.nothing(weight.values.device), self._parts(name)
        held = self._held_change(name)
        for rows, mine in self._pieces(name, piece):
            before, delta = weight.read(rows), change(rows)
            master[mine] += delta.to(master.device)
            if held is not None:
                master[mine] -= held(mine)
            after = self._round(name, mine, parts)
            stats += MergeStats.measure(before, delta, before + delta, after)
        self._gather(name, parts)
        return stats

    def _held_change(self, name: str) -> Change | None:
        """What the master holds already of a change to come, by this rank's own rows; None where that is nothing."""
        if name not in self.held:
            return None
        left, right = self.held.pop(name)
        columns = exactly.columns(right)
        return lambda mine: exactly.product(left[mine], columns).to(torch.float32)

    @torch.no_grad()
    def publish(self, name: str) -> None:
        """Rounds this rank's rows, gathers those of all ranks and stores them; every rank must call it."""
        parts = self._parts(name)
        for _, mine in self._pieces(name):
            self._round(name, mine, parts)
        self._gather(name, parts)

    def _parts(self, name: str) -> list[Tensor]:
        """Room for this rank's share of each buffer of a weight; the last ranks' may be larger than what they own."""
        buffers = self.weights[name].buffers()
        return [buffer.new_zeros(-(-buffer.shape[0] // self.world_size), buffer.shape[1]) for buffer in buffers]

    def _round(self, name: str, mine: slice, parts: list[Tensor]) -> Tensor:
        """Rounds some of this rank's rows into ``parts``; returns what they are after it, in fp32."""
        weight = self.weights[name]
        rounded = weight.round(self.rows[name][mine].to(weight.values.device))
        for part, piece in zip(parts, rounded, strict=False):
            part[mine] = piece
        return weight.convert(*rounded)

    def _gather(self, name: str, parts: list[Tensor]) -> None:
        for buffer, part in zip(self.weights[name].buffers(), parts, strict=True):
            num_rows = part.shape[0] * self.world_size
            if num_rows == buffer.shape[0]:
                self.gather_rows(buffer, part)
            else:
                padded = buffer.new_empty(num_rows, buffer.shape[1])
                self.gather_rows(padded, part)
                buffer.copy_(padded[: buffer.shape[0]])

    def publish_all(self) -> None:
        for name in self.weights:
            self.publish(name)

    def residual(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """This rank's rows of what rounding lost, master - store, a few at a time: (where in the weight, (rows, in) fp32)."""
        weight = self.weights[name]
        for rows, mine in self._pieces(name):
            yield rows, self.rows[name][mine].to(weight.values.device) - weight.read(rows)

    def residual_share(self, name: str) -> Tensor:
        """All of :meth:`residual`, (share, in) fp32: every rank's are as many rows, and zero behind those that it owns."""
        weight, own = self.weights[name], self.own(name)
        share = torch.zeros(-(-weight.shape[0] // self.world_size), weight.shape[1], device=weight.values.device)
        for rows, piece in self.residual(name):
            share[rows.start - own.start : rows.stop - own.start] = piece
        return share

    def hold(self, name: str, left: Tensor, right: Tensor) -> None:
        """Notes that the factors hold left · right, (own rows, r) and (r, in), of this rank's rows of the residual."""
        device = self.rows[name].device
        self.held[name] = (left.to(device, copy=True), right.to(device, copy=True))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this rank."""
        return {"rows": self.rows, "held": self.held}

    def load_shares(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Takes over the states of another number of ranks, in their order."""
        for name, rows in self.rows.items():
            own = self.own(name)
            rows.copy_(torch.cat([state["rows"][name] for state in states])[own])
            if name in states[0]["held"]:
                self.hold(name, torch.cat([state["held"][name][0] for state in states])[own], states[0]["held"][name][1])
        self.publish_all()

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Takes over the state of a checkpoint; or, where it was written without a master, what is stored."""
        for name, own in self.rows.items():
            own.copy_(self.weights[name].read(self.own(name)) if state is None else state["rows"][name])
        self.held.clear()
        for name, (left, right) in (state["held"] if state is not None else {}).items():
            self.hold(name, left, right)


def stored_tensors(name: str, weight: FrozenWeight | None) -> Iterator[tuple[str, Tensor]]:
    """What a replica consists of, for checksums: (name, tensor)."""
    if weight is None:
        return
    yield f"{name}.weight", weight.values
    if weight.scales is not None:
        yield f"{name}.weight.scales", weight.scales


@torch.no_grad()
def checksum(tensor: Tensor, piece: int | None = None) -> Tensor:
    """A 64-bit hash of the bits of ``tensor``: a 0-d int64 tensor on its device.

    The sum of the elements' bit patterns, each times an odd number made from its position, modulo 2**64: any single changed element
    changes it, as does a swap of two that differ (up to chance). Integer arithmetic, so the order of the sum does not matter.
    """
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(integer).flatten()
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for elements in pieces(slice(0, bits.numel()), 1, piece or piece_on(tensor.device)):
        part = bits[elements].to(torch.int64)
        position = torch.arange(elements.start, elements.stop, device=tensor.device, dtype=torch.int64)
        total += part.sum() + 2 * 0x9E3779B1 * position.mul_(part).sum()  # part * (2 * 0x9E3779B1 * position + 1)
    return total
