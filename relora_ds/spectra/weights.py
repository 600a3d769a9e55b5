"""The weights of a run's layers at its checkpoints, and as its LoRA phase began; read one layer at a time, without an engine."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from relora_ds.checkpoint import base as bases
from relora_ds.checkpoint import reader as checkpoints
from relora_ds.checkpoint.base import Base
from relora_ds.console import say
from relora_ds.errors import ConfigError
from relora_ds.method import lora
from relora_ds.method.frozen_weights import spacing
from relora_ds.method.targets import find_targets
from relora_ds.models.export import model_beside_base, refuse_unfilled
from relora_ds.run import manifest as manifests
from relora_ds.run.folder import RunFolder
from relora_ds.run.manifest import Manifest, ManifestError
from relora_ds.spectra.spectrum import rounding_noise


class Weights:
    """The weights of a run's layers at one moment: a stored part of each, and a product of factors. Here: of a base, without factors.

    The parts are given apart, so that a small product is not rounded off by a large weight.

    Args:
        update: after which the weights were such.
        base: that holds the stored parts; None where something else does.

    Attributes:
        restarts: so far.
        is_full: whether the layers are trained as they are, in a full-rank phase.
        has_factors: whether a product is part of the weights.
    """

    restarts = 0
    is_full = False
    has_factors = False

    def __init__(self, update: int, base: Base | None) -> None:
        self.update, self.base = update, base

    def names(self) -> list[str]:
        """Of the layers that have factors, or get them after the warm start."""
        assert self.base is not None
        return list(self.base.layers)

    def stored(self, name: str) -> tuple[Tensor, float] | None:
        """The stored part of a layer, (out, in) fp32, and the spacing of the numbers that it is kept in; None where there is none."""
        assert self.base is not None
        values, step = self.base.exact(name)
        return values, float(step)

    def product(self, name: str) -> Tensor | None:
        """The part that is a product of factors, (out, in) fp32; None where there is none."""
        return None


class CheckpointWeights(Weights):
    """Those of a checkpoint.

    Args:
        run: whose it is.
        checkpoint: its folder.
        content: its manifest.
        base: that it names, or None.
        trust: whether the user trusts whoever wrote it.
        factors: whether the products of its factors count.

    Raises:
        ConfigError: it is damaged, could run something, or is another model's.
    """

    def __init__(
        self, run: RunFolder, checkpoint: Path, content: Manifest, base: Base | None, *, trust: bool, factors: bool = True
    ) -> None:
        super().__init__(content.update, base)
        self.restarts, self.is_full = content.restarts, content.phase == "full"
        model = model_beside_base(run, checkpoint, trust=trust)
        if base is None:
            refuse_unfilled(model, checkpoint)
        targets = run.read_config().lora_settings.targets
        self.layers: dict[str, nn.Module] = {**(find_targets(model, targets) if self.is_full else {})}
        self.layers |= lora.relora_layers(model)
        # Right behind a restart B is 0: such factors have no product yet, and add no rank to what comes.
        wrapped = [layer for layer in self.layers.values() if isinstance(layer, lora.ReLoRALayer)]
        self.has_factors = factors and not self.is_full and any(bool(layer.lora_B.any()) for layer in wrapped)

    def names(self) -> list[str]:
        return list(self.layers)

    def stored(self, name: str) -> tuple[Tensor, float] | None:
        layer = self.layers[name]
        if self.base is not None:
            return super().stored(name)
        if isinstance(layer, lora.ReLoRALayer):
            store = layer.weight
            return None if store is None else (store.read(), float(spacing(store.values, store.scales)))
        weight = layer.weight.detach()
        return (weight.t() if isinstance(layer, lora.Conv1D) else weight).to(torch.float32), float(spacing(weight, None))

    @torch.no_grad()
    def product(self, name: str) -> Tensor | None:
        layer = self.layers[name]
        if not self.has_factors or not isinstance(layer, lora.ReLoRALayer):
            return None
        product = layer.delta(**layer.factors())
        held = self.base.held(name) if self.base is not None else None
        return product if held is None else product - held


def change(before: Weights, now: Weights, name: str) -> tuple[Tensor, float]:
    """What the weight of a layer changed by, (out, in) fp32, and about the largest singular value that rounding has in it."""
    parts, spacings = [(1, now.product(name)), (-1, before.product(name))], [0.0]
    stored = [weights.stored(name) for weights in (now, before)]
    if stored[0] is not None and stored[1] is not None:
        parts.insert(0, (1, stored[0][0] - stored[1][0]))
        spacings = [stored[0][1], stored[1][1]]
    there = [(sign, part) for sign, part in parts if part is not None]
    total = torch.zeros_like(there[0][1])
    for sign, part in there:
        total.add_(part, alpha=sign)
    roundings = now.restarts - before.restarts + 2 * (now.is_full or before.is_full)
    return total, rounding_noise(total.shape, max(spacings), roundings)


class RunWeights:
    """What there is of a run's weights.

    Args:
        folder: of the run.
        trust: whether the user trusts whoever wrote its checkpoints.

    Raises:
        ConfigError: no run is there, or its configuration cannot be read.
    """

    def __init__(self, folder: Path, *, trust: bool = False) -> None:
        self.run, self.trust = RunFolder(folder), trust
        if not self.run.exists():
            raise ConfigError("RUN_DIR", str(folder), "holds no run", "name the folder given as run.dir")
        self.config = self.run.read_config()
        self._bases: dict[Path, Base] = {}

    @cached_property
    def updates(self) -> dict[int, Path]:
        """The checkpoints by their updates, oldest first. Those that are not complete, by the sizes of their files, are left out.

        Raises:
            ConfigError: there is none.
        """
        found, problems = {}, []
        for path in checkpoints.find_all(self.run):
            problem = next(checkpoints.faults(path, deep=False), None)
            if problem is None:
                found[checkpoints.read_manifest(path).update] = path
            else:
                problems.append(problem)
        if not found:
            problem = ": ".join(["holds no complete checkpoint", *problems[-1:]])
            way_out = "restore the files" if problems else "wait for the run's first one"
            raise ConfigError("RUN_DIR", str(self.run.path), problem, way_out)
        for problem in problems:
            say(f"{problem}; leaving that checkpoint out")
        return found

    def at(self, update: int, option: str) -> Weights:
        """The weights at a checkpoint.

        Args:
            update: of the checkpoint.
            option: that names it, for the error.

        Raises:
            ConfigError: there is none, or it is damaged.
        """
        found = self.updates
        if update not in found:
            raise ConfigError(option, update, f"{self.run.path} has no checkpoint of this update", f"there are {_listed(found)}")
        return self._of_checkpoint(found[update])

    def start(self) -> Weights:
        """The weights as the LoRA phase began.

        Raises:
            ConfigError: the run has no such phase, or nothing holds them any more.
        """
        found, last_full = self.updates, self.config.full_updates
        if not self.config.has_lora_phase:
            problem = f"the full-rank run {self.run.path} has no LoRA phase to begin at"
            raise ConfigError("--from", None, problem, f"name one of its checkpoints: {_listed(found)}")
        folder = bases.folder_of(self.run, 0)
        if (folder / manifests.NAME).is_file():
            return Weights(last_full, self._base(folder))
        if last_full in found:
            return self._of_checkpoint(found[last_full])
        is_alone = self.config.lora_settings.frozen.dtype == "none"  # there never is a base, and B·A begins at random
        for path in found.values():
            content = checkpoints.read_manifest(path)
            if content.phase == "lora" and content.restarts == 0 and not is_alone:
                weights = CheckpointWeights(self.run, path, content, None, trust=self.trust, factors=False)
                weights.update = last_full
                return weights
        kept = "keep_every" if is_alone else "keep_first_base=true"
        raise ConfigError(
            "RUN_DIR",
            str(self.run.path),
            f"the weights with which its LoRA phase began are not kept ({folder.relative_to(self.run.path)})",
            f"compare checkpoints with --from ({_listed(found)}), and set train.{kept} in the next run",
        )

    def bound(self, before: Weights, now: Weights) -> int | None:
        """The rank that the factors allow the change of a layer; None where full-rank training has a part in it.

        A change of factors that have a product already is of twice their rank, as is any one of residual factors.
        """
        if now.is_full or (before.is_full and before.update < self.config.full_updates):
            return None
        settings = self.config.lora_settings
        return settings.rank_after(now.restarts - before.restarts + (before.has_factors and settings.init != "residual"))

    def _of_checkpoint(self, path: Path) -> Weights:
        content = checkpoints.read_manifest(path)
        base = None if content.base is None else self._base(checkpoints.base_folder(path, content))
        return CheckpointWeights(self.run, path, content, base, trust=self.trust)

    def _base(self, folder: Path) -> Base:
        """A base, whose files are compared with their checksums once."""
        if folder not in self._bases:
            try:
                problem = next(manifests.faults(folder, manifests.read_json(folder)["files"]), None)
            except ManifestError as error:
                problem = str(error)
            if problem is not None:
                raise ConfigError("RUN_DIR", str(self.run.path), problem, "restore the file, or name other checkpoints")
            self._bases[folder] = Base(folder)
        return self._bases[folder]


def _listed(updates: Iterable[int]) -> str:
    return ", ".join(map(str, updates))
