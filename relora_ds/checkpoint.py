"""Checkpoints of a run: DeepSpeed checkpoints, each completed by a manifest; finding, resuming, reading and rotating them."""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import transformers

from relora_ds.errors import ConfigError
from relora_ds.run_folder import RunFolder, write_atomically

MANIFEST = "manifest.json"
MODEL_STATES = "mp_rank_00_model_states.pt"


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


@dataclass(frozen=True)
class Manifest:
    """Written last: a checkpoint exists when its manifest does."""

    update: int
    phase: str
    restarts: int
    world_size: int
    versions: dict[str, str]


def save(engine: Any, folder: RunFolder, progress: Progress, *, phase: str, restarts: int, keep: int) -> Path:
    """Writes a checkpoint on all ranks together, then removes all but the newest ``keep``.

    A run that is killed on the way leaves a folder without a manifest, which is not taken for a checkpoint.
    """
    tag = f"update_{progress.update:07d}"
    target = folder.checkpoints / tag
    if dist.get_rank() == 0:
        (target / MANIFEST).unlink(missing_ok=True)
    dist.barrier()
    engine.save_checkpoint(str(folder.checkpoints), tag=tag, client_state={"progress": asdict(progress)})
    if dist.get_rank() == 0:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions |= {"deepspeed": deepspeed.__version__, "transformers": transformers.__version__}
        manifest = Manifest(progress.update, phase, restarts, dist.get_world_size(), versions)
        write_atomically(target / MANIFEST, json.dumps(asdict(manifest), indent=1))
        _rotate(folder, keep)
    dist.barrier()
    return target


def _rotate(folder: RunFolder, keep: int) -> None:
    complete = find_all(folder)
    for path in folder.checkpoints.glob("update_*"):
        if path not in complete[-keep:] and path.is_dir():
            (path / MANIFEST).unlink(missing_ok=True)  # first: a half-removed checkpoint must not look whole
            shutil.rmtree(path, ignore_errors=True)


def find_all(folder: RunFolder) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in folder.checkpoints.glob(f"update_*/{MANIFEST}"))


def newest(folder: RunFolder) -> Path | None:
    """The newest complete checkpoint; None when there is none."""
    return next(reversed(find_all(folder)), None)


def read_manifest(checkpoint: Path) -> Manifest:
    try:
        return Manifest(**json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError("CHECKPOINT", str(checkpoint), f"its manifest cannot be read: {error}") from None


def load(engine: Any, checkpoint: Path) -> Progress:
    """Restores the engine (weights, masters, moments, restarts) from a checkpoint of the same number of ranks."""
    path, client_state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if path is None:
        raise ConfigError("CHECKPOINT", str(checkpoint), "DeepSpeed cannot load it")
    return Progress(**client_state["progress"])


def read_model_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The module's weights in a checkpoint, on the CPU, in the dtype that the engine held them in.

    The file is a pickle: read only checkpoints that you trust.
    """
    content = torch.load(checkpoint / MODEL_STATES, map_location="cpu", weights_only=False, mmap=True)
    return content["module"]


def locate(place: Path) -> tuple[RunFolder, Path]:
    """The run and the checkpoint that a RUN_DIR or CHECKPOINT argument means.

    Raises:
        ConfigError: neither a run with a complete checkpoint nor a complete checkpoint.
    """
    if (place / MANIFEST).is_file():
        return RunFolder(place.resolve().parent.parent), place
    folder = RunFolder(place)
    checkpoint = newest(folder)
    if checkpoint is None:
        raise ConfigError("RUN_DIR", str(place), "holds no complete checkpoint", "name a run's folder or one of its checkpoints")
    return folder, checkpoint
