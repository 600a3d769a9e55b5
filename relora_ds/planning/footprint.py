"""Memory of one GPU: what an engine holds, and what it holds at most, from a rehearsed micro batch and ZeRO's arithmetic.

The sizes follow from the code of DeepSpeed 0.19.8 (ZeRO stages 1 and 2) and of this project's gradient reduction; ``w`` is the
engine's bytes an entry, ``n`` the trainable parameters, N the ranks. Held always: trainable weights, flat, w·n; fp32 masters, 4·n/N;
Adam's moments, 8·n/N; frozen weights. Gradients wait in the parameters for the last micro batch (w·n) and pass through buckets of
``reduce_bucket_size`` entries; what a rank owns of them is copied out, whole parameters at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate

import torch
from torch import nn

from relora_ds.config import Frozen
from relora_ds.method import frozen_weights, lora
from relora_ds.method.frozen_weights import ShardedMaster, checksum, own_rows, piece_on, stored_tensors
from relora_ds.method.pruning import batch_on
from relora_ds.method.reinit import normal_product
from relora_ds.planning.rehearsal import Rehearsed, Trace, num_bytes
from relora_ds.zero.gradient_reduction import ROUND, rounds

FP32, FP64 = 4, 8
NORM_WIDTH = 8
"""Gradient norms are taken in fp64, one parameter's at a time."""
PRUNE_KEYS, PRUNE_WORK = 6, 15
"""Bytes an entry of the selection of moments: of keys, candidates and masks of all that this rank owns, and of what comes and goes
for the tensors that are worked on together."""


@dataclass(frozen=True)
class Engine:
    """What decides the buffers of a DeepSpeed engine.

    Attributes:
        world_size: ranks N.
        stage: of ZeRO, 1 or 2.
        accumulation: micro batches of an update.
        width, wire: bytes of an entry of the parameters, and of a gradient that travels.
        bucket: ``reduce_bucket_size``, entries.
        overlap: ``overlap_comm``: a second bucket, and reductions within the backward pass under stage 1, too.
        on_cuda: whether gradients are reduced by DeepSpeed's own collectives, or exchanged here, as on gloo.
    """

    world_size: int
    stage: int
    accumulation: int
    width: int
    wire: int
    bucket: int
    overlap: bool
    on_cuda: bool


@dataclass(frozen=True)
class Group:
    """Parameters that ZeRO lays one behind the other, and cuts into equal partitions.

    Attributes:
        numels: entries by parameter name, in order.
        partition: entries of one rank; what all ranks have beyond the parameters is padding.
    """

    numels: Mapping[str, int]
    partition: int

    @classmethod
    def of(cls, numels: Mapping[str, int], world_size: int) -> Group:
        return cls(numels, 2 * -(-sum(numels.values()) // (2 * world_size)))

    def owned(self) -> Iterable[tuple[str, list[tuple[int, int]]]]:
        """By parameter: which ranks own how much of it, (rank, entries), in order."""
        start = 0
        for name, numel in self.numels.items():
            end, pieces = start + numel, []
            while start < end:
                rank = start // self.partition
                cut = min(end, (rank + 1) * self.partition)
                pieces.append((rank, cut - start))
                start = cut
            yield name, pieces


@dataclass(frozen=True)
class Layout:
    """Where ZeRO puts the trainable parameters of a model.

    Attributes:
        groups: in the optimizer's order.
        owners: ranks that own each parameter, with their entries.
        rank: the one that is looked at.
        own: entries of each parameter that this rank owns.
    """

    groups: tuple[Group, ...]
    owners: Mapping[str, list[tuple[int, int]]]
    rank: int
    own: Mapping[str, int]

    @classmethod
    def of(cls, model: nn.Module, world_size: int) -> Layout:
        """As the last rank sees it; see :meth:`seen_by`."""
        names = {param: name for name, param in model.named_parameters()}
        groups = tuple(Group.of({names[p]: p.numel() for p in group["params"]}, world_size) for group in lora.param_groups(model))
        owners = {name: pieces for group in groups for name, pieces in group.owned()}
        return cls(groups, owners, 0, {}).seen_by(world_size - 1)

    def seen_by(self, rank: int) -> Layout:
        return Layout(self.groups, self.owners, rank, {name: dict(pieces).get(rank, 0) for name, pieces in self.owners.items()})

    def heaviest(self, engine: Engine) -> Iterable[Layout]:
        """The ranks that may have the most to hold.

        A rank keeps the gradients of all parameters of which it owns a piece, whole. Over gloo, what it receives at a time
        matters, too, so a few ranks are all looked at.
        """
        change = [0] * (engine.world_size + 1)  # of the entries to keep, from one rank to the next
        for name, pieces in self.owners.items():
            change[pieces[0][0]] += self.numels[name]
            change[pieces[-1][0] + 1] -= self.numels[name]
        kept = list(accumulate(change[:-1]))
        ranks = {kept.index(max(kept))}
        if not engine.on_cuda:
            ranks |= {*range(min(engine.world_size, 8)), engine.world_size - 1}
        return map(self.seen_by, sorted(ranks))

    @cached_property
    def numels(self) -> dict[str, int]:
        return {name: numel for group in self.groups for name, numel in group.numels.items()}

    @property
    def partition(self) -> int:
        return sum(group.partition for group in self.groups)

    @property
    def kept(self) -> int:
        """Entries of the parameters of which :attr:`rank` owns a piece."""
        return sum(numel for name, numel in self.numels.items() if self.own[name])


@dataclass(frozen=True)
class Peak:
    """The most bytes at one time of an update, or of what surrounds it, by part."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass
class Replay:
    """An update's allocations one after the other: the rehearsed micro batch, and what ZeRO does with each gradient.

    Attributes:
        live: bytes now, by part.
        peaks: the highest so far, by moment.
    """

    layout: Layout
    engine: Engine
    live: dict[str, int]
    peaks: dict[str, Peak] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.total = sum(self.live.values())
        self.numels = self.layout.numels
        self.waiting: dict[str, int] = {}
        self.bucket: list[str] = []
        self.filled = 0
        self.oversized: dict[str, int] = {}
        self.has_buckets = self.has_own = False
        self.highest: dict[str, int] = {}

    def add(self, part: str, num_bytes: int) -> None:
        self.live[part] = self.live.get(part, 0) + num_bytes
        self.total += num_bytes

    def look(self, moment: str) -> None:
        if self.total > self.highest.get(moment, -1):
            self.highest[moment] = self.total
            self.peaks[moment] = Peak({part: size for part, size in self.live.items() if size})

    def passing(self, moment: str, part: str, num_bytes: int) -> None:
        """Something that is there for a moment only."""
        self.add(part, num_bytes)
        self.look(moment)
        self.add(part, -num_bytes)

    def update(self, trace: Trace) -> dict[str, Peak]:
        """One update; of equal micro batches in the middle, one is played."""
        for micro in range(min(self.engine.accumulation, 3)):
            self.micro_batch(trace, is_last=micro == min(self.engine.accumulation, 3) - 1)
        self.step()
        return self.peaks

    def micro_batch(self, trace: Trace, *, is_last: bool) -> None:
        """Forward and backward; in the last one, the exchange of the gradients."""
        within = is_last and (self.engine.stage == 2 or self.engine.overlap)
        for step in trace.steps:
            if not isinstance(step, str):
                size = trace.sizes[abs(step) - 1]
                self.add("activations", size if step > 0 else -size)
                if step > 0:
                    self.look("backward pass")
                continue
            added = self.waiting.get(step, 0)  # to what waited: by now the gradient of this micro batch alone is gone
            self.add("activations", -added)
            if self.engine.stage == 1 or is_last:
                self.make_buckets()
            if within:
                self.into_bucket(step)
            elif step not in self.waiting:
                self.waiting[step] = self.numels[step] * self.engine.width
                self.add("gradients", self.waiting[step])
            self.add("activations", added)
        if is_last:
            if not within:
                for name in self.numels:
                    self.into_bucket(name)
            self.flush()
            self.add("buckets", -self.live.get("buckets", 0))
            self.add("gradients", -sum(self.oversized.values()))

    def make_buckets(self) -> None:
        if not self.has_buckets:
            self.has_buckets = True
            self.add("buckets", self.engine.bucket * self.engine.width * (2 if self.engine.overlap else 1))
            self.look("backward pass")

    def into_bucket(self, name: str) -> None:
        """A gradient is complete: what waited of it goes into a bucket, or stays where it is if it is larger than one."""
        numel = self.numels[name]
        if self.filled + numel > self.engine.bucket:
            self.flush()
        self.add("gradients", -self.waiting.pop(name, 0))
        if numel > self.engine.bucket:
            self.oversized[name] = numel * self.engine.width
            self.add("gradients", self.oversized[name])
        self.bucket.append(name)
        self.filled += numel

    def flush(self) -> None:
        """The gradients of a bucket go to their owners; what is this rank's is copied out of it."""
        self.passing("exchange", "exchange", exchange_bytes(self.layout, self.engine, self.bucket))
        for name in self.bucket:
            if self.layout.own[name]:
                if not self.has_own:
                    self.has_own = True
                    self.add("gradients", self.layout.kept * self.engine.width)
                    self.look("exchange")
            elif self.engine.stage == 1:
                continue  # stays in the parameter until the end
            self.add("gradients", -self.oversized.pop(name, 0))
        self.bucket, self.filled = [], 0

    def step(self) -> None:
        """The norm, then group by group: the gradients of this rank's partition, flat and in fp32, and Adam's update in place."""
        own = self.layout.own
        self.passing("step", "norm and step", NORM_WIDTH * max(own.values()))
        for group in self.layout.groups:
            is_flat = sum(own[name] > 0 for name in group.numels) <= 1 and sum(own[n] for n in group.numels) == group.partition
            flat = 0 if is_flat else self.engine.width * group.partition
            self.passing("step", "norm and step", flat + (0 if self.engine.width == FP32 else FP32 * group.partition))


def exchange_bytes(layout: Layout, engine: Engine, names: Sequence[str]) -> int:
    """What the reduction of a bucket takes at most beside the bucket itself.

    As :func:`relora_ds.zero.gradient_reduction.means_of_own` goes. On CUDA: what is packed, and the most that one rank gets of it. On
    a CPU: what is packed, what is received, and the fp32 sum, of one round; with the sum of the round before and, while packing, what
    was packed then.
    """
    slices: list[list[int]] = []
    for name in names:
        for rank, entries in layout.owners[name]:
            if slices and slices[-1][0] == rank:
                slices[-1][1] += entries
            else:
                slices.append([rank, entries])
    if not slices:
        return 0
    owners, numels = [rank for rank, _ in slices], [entries for _, entries in slices]
    limit = sum(numels) if engine.on_cuda else max(1, ROUND // engine.world_size)
    most = packed_before = total_before = 0
    for turn in rounds(owners, numels, engine.world_size, limit):
        sizes = [sum(cut.numel for cut in cuts) for cuts in turn]
        packed = engine.wire * sum(sizes)
        cast = packed if engine.wire != engine.width else 0
        if engine.world_size == 1:
            received = total = 0  # the sum is what was packed
        elif engine.on_cuda:
            received, total = 0, engine.wire * max(sizes)
        else:
            received, total = engine.wire * engine.world_size * sizes[layout.rank], FP32 * sizes[layout.rank]
        most = max(most, packed_before + total_before + cast + packed, total_before + packed + received + total)
        packed_before, total_before = packed, total
    return most


def held(rehearsed: Rehearsed, layout: Layout, engine: Engine, frozen: Frozen | None) -> dict[str, int]:
    """What lies on one GPU between two updates, by part; with a sharded master where it is kept there."""
    model, n = rehearsed.model, layout.partition
    weights = [layer.weight for _, layer in lora.relora_layers(model) if layer.weight is not None]
    stored = {id(buffer) for weight in weights for buffer in weight.buffers()}
    parts = {
        "frozen weights": num_bytes([weight.values for weight in weights]),
        "their scales": num_bytes([weight.scales for weight in weights if weight.scales is not None]),
        "trainable weights": n * engine.world_size * engine.width,
        "fp32 masters": FP32 * n,
        "moments": 2 * FP32 * n,
        "sharded master": sharded_bytes(rehearsed, engine.world_size) if frozen and _is_here(frozen, engine) else 0,
        "buffers": num_bytes([buffer for buffer in model.buffers() if id(buffer) not in stored]),
    }
    return {part: size for part, size in parts.items() if size}


def _is_here(frozen: Frozen, engine: Engine) -> bool:
    return frozen.master == "sharded" and (frozen.master_device == "device" or not engine.on_cuda)


def sharded_bytes(rehearsed: Rehearsed, world_size: int) -> int:
    """Of one rank's rows of the fp32 master of the frozen weights; the first rank's, which has the most."""
    shapes = [layer.weight.shape for _, layer in lora.relora_layers(rehearsed.model) if layer.weight is not None]
    return sum(FP32 * own_rows(rows, 0, world_size).stop * columns for rows, columns in shapes)


def start(layout: Layout, engine: Engine, parts: Mapping[str, int], sharded: int) -> Peak:
    """The most while an engine is built: a group is flattened in a copy; at the end every master has a gradient once.

    ``sharded`` are the bytes of exact rows that wait for a sharded master.
    """
    live = {**parts, "moments": 0, "fp32 masters": 0, "sharded master": max(sharded, parts.get("sharded master", 0))}
    live["trainable weights"] = sum(layout.numels.values()) * engine.width
    peaks = []
    for group in layout.groups:
        flat = group.partition * engine.world_size * engine.width
        peaks.append(Peak({**live, "flattening": flat}))
        live["trainable weights"] += flat - sum(group.numels.values()) * engine.width
        live["fp32 masters"] += FP32 * group.partition
    peaks.append(Peak({**live, "gradients": FP32 * layout.partition}))
    peak = max(peaks, key=lambda candidate: candidate.total)
    return Peak({part: size for part, size in peak.parts.items() if size})


def restart(
    rehearsed: Rehearsed, layout: Layout, engine: Engine, parts: Mapping[str, int], frozen: Frozen, *, from_residual: bool
) -> Peak:
    """The most at a restart: merging one layer, finding its factors, choosing which moments stay, or comparing checksums."""
    work, seen = [0], set()
    for _, layer in lora.relora_layers(rehearsed.model):
        if layer.weight is not None and (kind := (layer.weight.shape, layer.rank)) not in seen:
            seen.add(kind)
            gathered = sum(factor.numel() for factor in layer.factors().values())
            work.append(FP32 * gathered + rehearsed.peak_of(_merge(rehearsed, layer, engine, frozen)))
            work.append(rehearsed.peak_of(partial(_checksums, layer, piece_on(_device(engine)))))
            if from_residual:
                work.append(_residual_factors(rehearsed, layer, engine))
    factors = next((group for group in layout.groups if any("lora_" in name for name in group.numels)), None)
    if factors is not None:
        together = max(*factors.numels.values(), batch_on(_device(engine)))
        work.append(PRUNE_KEYS * factors.partition + PRUNE_WORK * min(together, factors.partition))
    return Peak({**parts, "restart": max(work)})


def _device(engine: Engine) -> torch.device:
    """Where the engine runs; what is rehearsed lies elsewhere, so that it has to be told how much a restart works on at a time."""
    return torch.device("cuda" if engine.on_cuda else "cpu")


def _merge(rehearsed: Rehearsed, layer: lora.ReLoRALayer, engine: Engine, frozen: Frozen) -> Callable[[], object]:
    """What :meth:`relora_ds.optimizer.wrapper.ReLoRAOptimizer.restart` does with one layer, once its masters are there."""
    assert layer.weight is not None
    merge: Callable[..., object] = layer.weight.merge
    if frozen.master == "sharded":
        with rehearsed.mode:
            master = ShardedMaster(
                {"": layer.weight}, 0, engine.world_size, lambda out, mine: out[: mine.shape[0]].copy_(mine), "cpu"
            )
        merge = partial(master.merge, "")

    with rehearsed.mode:
        factors = {name: torch.empty(factor.shape) for name, factor in layer.factors().items()}

    def work() -> None:
        merge(layer.change(**factors), piece=piece_on(_device(engine)))

    return work


def _residual_factors(rehearsed: Rehearsed, layer: lora.ReLoRALayer, engine: Engine) -> int:
    """Bytes of finding the factors of one layer, whose residual is gathered here, beside the first A of the others in its batch."""
    share, columns = -(-layer.out_features // engine.world_size), layer.in_features
    with rehearsed.mode:
        cut = frozen_weights.pieces(slice(0, layer.out_features), columns, piece_on(_device(engine)))
        parts = [torch.empty(rows.stop - rows.start, columns) for rows in cut]
        numbers, unit = torch.empty(columns, layer.rank, dtype=torch.float64), torch.ones(layer.rank, dtype=torch.float64)
    held = FP32 * engine.world_size * (share + layer.rank) * columns
    # Beside a product are Q, its whole numbers, and the product before.
    iteration = 3 * FP64 * numbers.numel() + rehearsed.peak_of(lambda: normal_product(parts, numbers, unit))
    return held + max(FP32 * share * columns if engine.world_size > 1 else 0, iteration)


def _checksums(layer: lora.ReLoRALayer, piece: int) -> None:
    for _, tensor in stored_tensors("", layer.weight):
        checksum(tensor, piece)


def peaks(
    rehearsed: Rehearsed, engine: Engine, trace: Trace, frozen: Frozen | None, *, restarts: bool, from_residual: bool = False
) -> dict[str, Peak]:
    """The most that one GPU holds in a phase, by moment: start, backward pass, exchange, step, restart.

    Args:
        rehearsed: the model of the phase.
        engine: that trains it.
        trace: of a micro batch.
        frozen: how frozen weights are kept; None in the full-rank phase.
        restarts: whether factors are merged in this phase.
        from_residual: whether they then begin with what rounding lost.
    """
    layout = Layout.of(rehearsed.model, engine.world_size)
    parts = held(rehearsed, layout, engine, frozen)
    sharded = sharded_bytes(rehearsed, engine.world_size) if frozen is not None and frozen.master == "sharded" else 0
    found = {"start": start(layout, engine, parts, sharded)}
    for seen in layout.heaviest(engine):
        for moment, peak in Replay(seen, engine, dict(parts)).update(trace).items():
            found[moment] = max(peak, found.get(moment, peak), key=lambda candidate: candidate.total)
    if restarts and frozen is not None:
        found["restart"] = restart(rehearsed, layout, engine, parts, frozen, from_residual=from_residual)
    return found
