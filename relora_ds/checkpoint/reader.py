"""Checkpoints of a run: which there are, which are whole, what each needs, which may go; and loading one into an engine.

checkpoints/update_N/ is a DeepSpeed checkpoint with a manifest, without the frozen weights; those are in base/restart_K/, once for
all checkpoints between two restarts. :mod:`relora_ds.checkpoint.writer` writes them.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import transformers

from relora_ds.checkpoint import base as bases
from relora_ds.config import Config, dump
from relora_ds.ds_config import fit as ds_config
from relora_ds.errors import ConfigError
from relora_ds.optimizer.wrapper import ReLoRAOptimizer
from relora_ds.run import manifest as manifests
from relora_ds.run import unpickle
from relora_ds.run.folder import RunFolder
from relora_ds.run.manifest import Manifest, ManifestError
from relora_ds.version import __version__

MODEL_STATES = "mp_rank_00_model_states.pt"
DESCRIPTION = "relora_ds.json"
"""Of a checkpoint that a script wrote: which layers were wrapped, and how (:mod:`relora_ds.models.script_checkpoint`)."""


@dataclass
class Progress:
    """How far a run has come: with the checkpointed engine, all that is needed to go on.

    Attributes:
        update: updates done; the data order and the learning rate follow from it.
        tokens: tokens trained on.
        skipped: updates skipped for a non-finite gradient.
        skipped_in_a_row: of them, the newest unbroken row.
    """

    update: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


def describe(engine: Any, config: Config, progress: Progress, phase: str, tokens: dict[str, str]) -> Manifest:
    """The manifest of the checkpoint that would be written now, without files and base; ``tokens``: :attr:`TokenIndex.digests`."""
    optimizer = engine.optimizer
    is_relora = isinstance(optimizer, ReLoRAOptimizer)
    return Manifest(
        update=progress.update,
        phase=phase,
        restarts=optimizer.restarts if is_relora else 0,
        lora_updates=optimizer.updates if is_relora else 0,
        world_size=dist.get_world_size(),
        zero_stage=engine.zero_optimization_stage(),
        precision=ds_config.precision_of(engine),
        config_sha256=hashlib.sha256(dump(config).encode()).hexdigest(),
        data={
            "epoch_seed": config.run.seed,
            "sequences": progress.update * config.train.global_batch,
            "sha256": tokens,
        },
        rng={"seed": config.run.seed},
        progress=asdict(progress),
        base=None,
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Of Python and of the packages that a training depends on."""
    packages = {"torch": torch.__version__, "deepspeed": deepspeed.__version__, "transformers": transformers.__version__}
    return {"python": platform.python_version(), "relora_ds": __version__} | packages


def find_all(run: RunFolder) -> list[Path]:
    """The checkpoints of a run that have a manifest, whole or not, oldest first. Raises OSError where that cannot be seen."""
    return [path for path in manifests.numbered(run.checkpoints, "update") if (path / manifests.NAME).is_file()]


def read_manifest(checkpoint: Path) -> Manifest:
    """Raises ConfigError where there is none that can be read."""
    try:
        return manifests.read(checkpoint)
    except ManifestError as error:
        raise ConfigError("CHECKPOINT", str(checkpoint), str(error)) from None


def newest(run: RunFolder) -> Path | None:
    """The newest checkpoint whose manifest can be read; contents are not looked at. Raises OSError where that cannot be seen."""
    found = manifests.newest(run.checkpoints)
    return found[0] if found else None


def newest_in_words(run: RunFolder) -> str:
    """The same, for a message; raises nothing, since the disk may be what the message is about."""
    try:
        return str(newest(run) or "none")
    except OSError as error:
        return f"not known ({error.strerror})"


def faults(checkpoint: Path, *, deep: bool = True) -> Iterator[str]:
    """What is wrong with a checkpoint and the base that it needs, one line each, by file; nothing for a whole one.

    Args:
        checkpoint: its folder, with a manifest.
        deep: whether contents are compared with their checksums, too, and not only sizes.
    """
    try:
        content = manifests.read(checkpoint)
        yield from manifests.faults(checkpoint, content.files, deep=deep)
        if content.base is not None:
            folder = base_folder(checkpoint, content)
            listed = manifests.read_json(folder)
            if manifests.digest(folder / manifests.NAME) != content.base["sha256"]:
                yield f"{folder / manifests.NAME}: belongs to another base than the checkpoint was written with"
            yield from manifests.faults(folder, listed["files"], deep=deep)
    except ManifestError as error:
        yield str(error)


def base_folder(checkpoint: Path, content: Manifest) -> Path:
    """Where the base of a checkpoint is."""
    assert content.base is not None
    return checkpoint.parent.parent / content.base["folder"]


def choose(run: RunFolder, tell: Callable[[str], None], *, deep: bool = True) -> Path | None:
    """The newest checkpoint that is whole; None when the run has none at all.

    Args:
        run: its folder.
        tell: is told of those that are not.
        deep: whether contents are compared with their checksums, too, and not only sizes.

    Raises:
        ConfigError: there are checkpoints, but none is whole. A run is never started anew over them.
    """
    found, problem = find_all(run), None
    for path in reversed(found):
        problem = next(faults(path, deep=deep), None)
        if problem is None:
            return path
        tell(f"{problem}; trying the checkpoint before")
    if found:
        raise ConfigError(
            "run.dir",
            str(run.path),
            f"none of its {len(found)} checkpoint(s) is whole: {problem}",
            "restore the files, or name another run.dir",
        )
    return None


def tidy(run: RunFolder, resumed: Path | None) -> None:
    """Clears the way of a run that goes on from ``resumed``: removes half-written folders, and renames what lies after it.

    What is renamed (``damaged_…``) did not verify; it is left to the user, since a file that is missing may come back.
    """
    for folder in manifests.numbered(run.checkpoints, "update"):
        if not (folder / manifests.NAME).is_file():
            manifests.remove(folder)
        elif resumed is not None and manifests.number(folder) > manifests.number(resumed):
            _set_aside(folder)
    for folder in bases.entries(run):
        if resumed is None or not (folder / manifests.NAME).is_file():
            manifests.remove(folder)
        elif manifests.number(folder) > manifests.read(resumed).restarts:
            _set_aside(folder)


def _set_aside(folder: Path) -> None:
    aside = folder.with_name(f"damaged_{folder.name}")
    manifests.remove(aside)
    folder.rename(aside)


def rotate(run: RunFolder, *, keep: int, keep_every: int | None, keep_first_base: bool = False) -> None:
    """Removes the checkpoints that are not to be kept, and the bases that none of the others needs.

    Args:
        run: its folder.
        keep: so many of the newest checkpoints stay.
        keep_every: checkpoints after multiples of so many updates stay, too.
        keep_first_base: whether the base with which the LoRA phase began stays.
    """
    found = find_all(run)
    contents = {path: manifests.read(path) for path in found[-keep:]}  # first: where one cannot be read, none before it goes
    milestones = []
    for path in found[:-keep]:
        if keep_every is not None and manifests.number(path) % keep_every == 0:
            milestones.append(path)
        else:
            manifests.remove(path)
            manifests.remove(run.universal / path.name)
    contents |= {path: manifests.read(path) for path in milestones}  # where one cannot be read, no base goes that it may need
    needed = {base_folder(path, content) for path, content in contents.items() if content.base is not None}
    if keep_first_base:
        needed.add(bases.folder_of(run, 0))
    for folder in bases.entries(run):
        if folder not in needed:
            manifests.remove(folder)


def load(engine: Any, checkpoint: Path) -> Progress:
    """Restores the engine (weights, frozen ones included, masters, moments, restarts) from a checkpoint of as many ranks."""
    path, client_state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if path is None:
        raise ConfigError("CHECKPOINT", str(checkpoint), "DeepSpeed cannot load it")
    return Progress(**client_state["progress"])


def load_base(optimizer: ReLoRAOptimizer, checkpoint: Path) -> None:
    """Fills the frozen weights from the base that a checkpoint names; every rank must call it.

    Raises:
        ConfigError: the checkpoint holds no frozen weights, and names no base that is there.
    """
    problem = "it holds no frozen weights and has no manifest that says where they are"
    try:
        content = manifests.read(checkpoint)
        if content.base is not None:
            bases.Base(base_folder(checkpoint, content)).load_into(optimizer)
            return
    except (ManifestError, OSError) as error:
        problem = f"{problem}: {error}"
    raise ConfigError("CHECKPOINT", str(checkpoint), problem, "keep base/ beside checkpoints/")


def check_pickles(checkpoint: Path, *, trust: bool) -> None:
    """Raises ConfigError for a file of a checkpoint that could run something when it is opened; contents of tensors are not read."""
    names = [name for name in read_manifest(checkpoint).files if name.endswith(".pt")]
    unpickle.check([checkpoint / name for name in names], trust=trust)


def read_model_state(checkpoint: Path, *, trust: bool = False) -> dict[str, torch.Tensor]:
    """The module's weights in a checkpoint, on the CPU, in the dtype that the engine held them in; not the frozen ones of a base.

    Args:
        checkpoint: its folder.
        trust: whether the user trusts whoever wrote it.

    Raises:
        ConfigError: there is no manifest, it lists another content, or the file could run something.
    """
    path = checkpoint / MODEL_STATES
    files = read_manifest(checkpoint).files
    problem = f"its manifest does not list {MODEL_STATES}"
    if MODEL_STATES in files:
        problem = next(manifests.faults(checkpoint, {MODEL_STATES: files[MODEL_STATES]}), "")
    if problem:
        raise ConfigError("CHECKPOINT", str(checkpoint), problem, "take another checkpoint")
    return unpickle.read(path, trust=trust)["module"]


def locate(place: Path) -> tuple[RunFolder, Path]:
    """The run and the checkpoint that a RUN_DIR or CHECKPOINT argument means.

    Raises:
        ConfigError: neither a run with a complete checkpoint nor a complete checkpoint.
    """
    if (place / manifests.NAME).is_file():
        return RunFolder(place.resolve().parent.parent), place.resolve()
    run = RunFolder(place)
    checkpoint = newest(run)
    if checkpoint is None and of_script(place) is not None:
        way_out = "relora-ds export makes a Hugging Face folder of it"
        raise ConfigError("RUN_DIR", str(place), "is a script's checkpoint, and not a run", way_out)
    if checkpoint is None:
        raise ConfigError("RUN_DIR", str(place), "holds no complete checkpoint", "name a run's folder or one of its checkpoints")
    return run, checkpoint


def of_script(place: Path) -> Path | None:
    """The checkpoint of a script that ``place`` means: itself, or the one in it that ``latest`` names; None where it is none."""
    latest = place / "latest"
    tag = place / latest.read_text(encoding="utf-8").strip() if latest.is_file() else place
    return tag if (tag / DESCRIPTION).is_file() else None
