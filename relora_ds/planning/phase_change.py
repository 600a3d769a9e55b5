"""Memory of one GPU at the change of phase: what :mod:`relora_ds.training.phases` does there, played on the sizes of both phases.

The masters of what goes on are gathered one after the other, and wait in host memory; the full-rank engine gives masters and moments
back; the weights move to the host; they come back one layer at a time, stored as they will be kept; the LoRA engine is built. Where
ranks compute on a CPU, host and device are one memory, and what waits counts, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from relora_ds.config import Frozen
from relora_ds.method import lora
from relora_ds.method.frozen_weights import own_rows
from relora_ds.planning.footprint import FP32, Engine, Layout, Peak, held, sharded_bytes, start
from relora_ds.planning.rehearsal import Rehearsed

MOMENT = "change of phase"
WAITING = "waiting for the LoRA phase"
"""The part that is what the LoRA phase begins with."""


def change_of_phase(full: Rehearsed, factored: Rehearsed, engine: Engine, frozen: Frozen, *, keep_moments: bool) -> Peak:
    """The most that one GPU holds between the last update of the warm start and the first one with factors, by part.

    Args:
        full: the model of the full-rank phase.
        factored: that of the LoRA phase.
        engine: of both.
        frozen: how the frozen weights are kept.
        keep_moments: ``relora.keep_moments``.
    """
    layers = {name: layer for name, layer in lora.relora_layers(factored.model) if layer.weight is not None}
    left_behind = {f"{name}.weight" for name in layers}
    numels = {name: param.numel() for name, param in full.model.named_parameters()}
    carried = {name: numel for name, numel in numels.items() if name not in left_behind}
    waits = 0 if engine.on_cuda else FP32 * (3 if keep_moments else 1) * sum(carried.values())
    candidates = [
        *_gathering(full, factored, engine, frozen, carried, waits),
        _moving(full, engine, waits + (_exact_bytes(factored, engine, frozen))),
        _building(factored, engine, frozen, waits, keep_moments=keep_moments),
    ]
    return max(candidates, key=lambda peak: peak.total)


def _exact_bytes(factored: Rehearsed, engine: Engine, frozen: Frozen) -> int:
    """Of the exact rows that wait for a sharded master, where they wait in the same memory."""
    return 0 if engine.on_cuda or frozen.master != "sharded" else sharded_bytes(factored, engine.world_size)


def _gathering(
    full: Rehearsed, factored: Rehearsed, engine: Engine, frozen: Frozen, carried: Mapping[str, int], waits: int
) -> Iterator[Peak]:
    """The full-rank engine, whole, and masters that are gathered beside it: of what goes on, and of what a sharded master takes."""
    parts = held(full, Layout.of(full.model, engine.world_size), engine, None)
    if engine.on_cuda:
        yield _peak(parts, gathering=FP32 * max(carried.values()))
    else:
        yield _peak(parts, waits)
    if frozen.master != "sharded":
        return
    rows = 0
    for _, layer in lora.relora_layers(factored.model):
        if layer.weight is not None:
            num_rows, columns = layer.weight.shape
            rows += 0 if engine.on_cuda else FP32 * own_rows(num_rows, 0, engine.world_size).stop * columns
            yield _peak(parts, waits + rows, gathering=FP32 * num_rows * columns)


def _moving(full: Rehearsed, engine: Engine, waits: int) -> Peak:
    """Weights on their way to the host, in module order; a group's flat buffer ends with the last of its parameters."""
    layout = Layout.of(full.model, engine.world_size)
    flat = [group.partition * engine.world_size * engine.width for group in layout.groups]
    left = [len(group.numels) for group in layout.groups]
    group_of = {name: index for index, group in enumerate(layout.groups) for name in group.numels}
    live = most = sum(flat)
    for name, param in full.model.named_parameters():
        live += 0 if engine.on_cuda else param.numel() * engine.width
        most = max(most, live)
        if name in group_of:
            left[group_of[name]] -= 1
            live -= 0 if left[group_of[name]] else flat[group_of[name]]
    parts = held(full, layout, engine, None)
    return _peak({"trainable weights": most, "buffers": parts.get("buffers", 0)}, waits)


def _building(factored: Rehearsed, engine: Engine, frozen: Frozen, waits: int, *, keep_moments: bool) -> Peak:
    """The LoRA engine: while it is built, or when it has taken over what waited."""
    layout = Layout.of(factored.model, engine.world_size)
    parts = held(factored, layout, engine, frozen)
    begun = start(layout, engine, parts, _exact_bytes(factored, engine, frozen))
    taken = {part: size for part, size in parts.items() if part != "moments" or keep_moments}
    return max(_peak(begun.parts, waits), _peak(taken, waits), key=lambda peak: peak.total)


def _peak(parts: Mapping[str, int], waits: int = 0, gathering: int = 0) -> Peak:
    more = {WAITING: waits, "gathered master": gathering}
    return Peak({part: size for part, size in {**parts, **more}.items() if size})
