"""The reset of Adam's moments of the factors, exactly, wherever their shards lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from relora_ds.config import Reset
from relora_ds.method import pruning
from relora_ds.zero.state import ZeroState


def prune(masters: ZeroState, reset: Reset, comm: Any, draw: str) -> float:
    """Zeroes the chosen entries of the factors' moments; returns the share of all entries that was zeroed.

    Args:
        masters: the factors, with this rank's fragments of Adam's moments.
        reset: which entries are chosen.
        comm: over all ranks that hold fragments.
        draw: names the draw of random pruning: another one, other entries.
    """
    keys = masters.moment_keys()
    if reset.kind == "none" or not keys:
        return 0.0
    if reset.kind == "full":
        for key in keys:
            for name in masters.params:
                if (fragment := masters.fragment(name, key)) is not None:
                    fragment.zero_()
        return 1.0
    kept = torch.zeros((), dtype=torch.int64, device=comm.device)
    for together in [keys] if reset.mask == "joint" else [[key] for key in keys]:
        for name, mask in _keep_masks(masters, reset, comm, draw, together[0]).items():
            kept += mask.sum().to(kept.device) * len(together)
            pruned = ~mask
            for key in together:
                fragment = masters.fragment(name, key)
                assert fragment is not None, "masks exist only for fragments"
                fragment.masked_fill_(pruned, 0.0)
    comm.all_reduce(kept, "restart")
    return 1.0 - int(kept) / (len(keys) * sum(p.numel() for p in masters.params.values()))


def _keep_masks(masters: ZeroState, reset: Reset, comm: Any, draw: str, key: str) -> dict[str, Tensor]:
    """Which entries of this rank's fragments survive, chosen over all ranks: {parameter: (n,) bool}."""
    if reset.kind == "random" and reset.scope == "tensor":
        return _random_masks(masters, reset, draw, key)
    masks = pruning.select_largest(
        _key_fragments(masters, reset, draw, key),
        [p.numel() for p in masters.params.values()],
        reset.ratio,
        lambda counts: comm.all_reduce(counts, "restart"),
        pieces=masters.pieces(),
        across_tensors=reset.scope == "global",
        device=comm.device,
    )
    names = list(masters.params)
    return {names[tensor]: mask for tensor, mask in masks.items()}


def _key_fragments(masters: ZeroState, reset: Reset, draw: str, key: str) -> Iterator[pruning.KeyFragment]:
    """What this rank's fragments of a moment are sorted by; one after another, so that those in use alone are held."""
    for index, name in enumerate(masters.params):
        values = masters.fragment(name, key)
        if values is None:
            continue
        own = masters.own_slice(name)
        if reset.kind == "magnitude":
            keys = pruning.magnitude_keys(values)
        else:
            everything = pruning.random_keys(masters.params[name].numel(), _random_seed(draw, name, key))
            keys = everything[own.start : own.start + own.numel].to(values.device)
        yield pruning.KeyFragment(index, own.start, keys)


def _random_masks(masters: ZeroState, reset: Reset, draw: str, key: str) -> dict[str, Tensor]:
    """The same for random pruning of each tensor by itself: any rank can draw all the keys, so nothing has to travel."""
    masks = {}
    for name, param in masters.params.items():
        values = masters.fragment(name, key)
        if values is not None:
            own = masters.own_slice(name)
            keys = pruning.random_keys(param.numel(), _random_seed(draw, name, key))
            mask = pruning.select_largest_of_one(keys, reset.ratio)
            masks[name] = mask[own.start : own.start + own.numel].to(values.device)
    return masks


def _random_seed(draw: str, name: str, key: str) -> int:
    digest = hashlib.sha256(f"{draw}/{name}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
