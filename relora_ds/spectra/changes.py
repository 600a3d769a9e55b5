"""How the weights of a run changed between two of its moments: the spectrum of each layer, and the figures of each kind of layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from relora_ds.console import say
from relora_ds.errors import ConfigError
from relora_ds.spectra.spectrum import EXACT_SIDE, SMALL, Spectrum, mean, measure
from relora_ds.spectra.weights import RunWeights, Weights, change


@dataclass(frozen=True)
class LayerChange:
    """How a layer changed.

    Attributes:
        name: of the layer, in the model.
        shape: (out, in) of its weight.
        bound: the rank that its factors allow; None where it was trained at full rank.
        spectrum: of the change.
    """

    name: str
    shape: tuple[int, int]
    bound: int | None
    spectrum: Spectrum

    @property
    def kind(self) -> str:
        """``q_proj`` of ``model.layers.0.self_attn.q_proj``."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Figures:
    """The figures of some layers, each the mean over them.

    Attributes:
        num_layers: how many they are.
        bound: the rank that their factors allow; None where they were trained at full rank.
        above_noise, effective_rank, stable_rank, below_small, largest: see :class:`Spectrum`.
        error: the largest error of a sketch among them; 0 where all values were computed.
    """

    num_layers: int
    bound: float | None
    above_noise: float
    effective_rank: float
    stable_rank: float
    below_small: float
    largest: float
    error: float

    @classmethod
    def of(cls, layers: Sequence[LayerChange]) -> Figures:
        spectra = [layer.spectrum for layer in layers]
        bounds = [layer.bound for layer in layers if layer.bound is not None]
        return cls(
            len(layers),
            mean(bounds) if bounds else None,
            mean([one.num_above_noise for one in spectra]),
            mean([one.effective_rank for one in spectra]),
            mean([one.stable_rank for one in spectra]),
            mean([one.share_below(SMALL) for one in spectra]),
            mean([one.largest for one in spectra]),
            max(one.error for one in spectra),
        )


@dataclass(frozen=True)
class Change:
    """How the layers changed from one update to another, with the restarts until then."""

    before: int
    now: int
    restarts: int
    layers: list[LayerChange]

    def kinds(self) -> list[str]:
        """Of the layers, in model order."""
        return list(dict.fromkeys(layer.kind for layer in self.layers))

    def of_kind(self, kind: str) -> list[LayerChange]:
        return [layer for layer in self.layers if layer.kind == kind]


@dataclass(frozen=True)
class RunChanges:
    """What is compared of a run.

    Attributes:
        label: tells it from the other runs.
        method: of its recipe.
        newest: the change that is shown in full.
        earlier: those at its other checkpoints, oldest first, where they were asked for.
    """

    label: str
    method: str
    newest: Change
    earlier: list[Change] = field(default_factory=list)

    @property
    def all(self) -> list[Change]:
        return [*self.earlier, self.newest]


def changes_of(
    run: RunWeights, label: str, *, before: int | None, now: int | None, every: bool = False, exact_side: int = EXACT_SIDE
) -> RunChanges:
    """Measures the changes of a run.

    Args:
        run: whose.
        label: of it.
        before: the update from which on; None, or the last one of the warm start, for the start of the LoRA phase.
        now: the update until which; None for the newest checkpoint that is whole.
        every: whether the checkpoints between the two are measured, too.
        exact_side: the longest side of a matrix for which all values are computed.

    Raises:
        ConfigError: one of the two is not there, or not before the other; a weight is not finite.
    """
    if before is None or (run.config.has_lora_phase and before == run.config.full_updates):
        first = run.start()
    else:
        first = run.at(before, "--from")
    last = max(run.updates) if now is None else now
    if last <= first.update:
        problem = f"is not later than update {first.update}, from which on {label} is compared"
        raise ConfigError("--to", last, problem, "name a later checkpoint" if now else "wait for the next checkpoint")
    moments = [update for update in run.updates if first.update < update < last] if every else []
    measured = [_measure(run, label, first, run.at(update, "--to"), exact_side) for update in [*moments, last]]
    return RunChanges(label, run.config.method, measured[-1], measured[:-1])


def _measure(run: RunWeights, label: str, before: Weights, now: Weights, exact_side: int) -> Change:
    names, allowed = now.names(), run.bound(before, now)
    say(f"{label}: singular values of {len(names)} layers, from update {before.update:,} to {now.update:,}")
    layers = []
    for name in names:
        matrix, noise = change(before, now, name)
        if not bool(torch.isfinite(matrix).all()):
            problem = f"{label} had diverged: what {name} changed by since update {before.update:,} is not all finite"
            raise ConfigError("--to", now.update, problem, "name an earlier checkpoint")
        bound = None if allowed is None else min(allowed, *matrix.shape)
        spectrum = measure(matrix, bound=bound, rounding=noise, exact_side=exact_side)
        layers.append(LayerChange(name, (matrix.shape[0], matrix.shape[1]), bound, spectrum))
    return Change(before.update, now.update, now.restarts, layers)
