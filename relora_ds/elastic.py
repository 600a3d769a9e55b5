"""Going on with another number of ranks: DeepSpeed's universal checkpoint, made once by rank 0 and reused.

DeepSpeed's converter takes the shards of the optimizer apart into one file per parameter and state. They are read here, not by
``load_universal``, which fails where a rank owns nothing of a parameter group.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from relora_ds import checkpoint as checkpoints
from relora_ds import launch, zero
from relora_ds import manifest as manifests
from relora_ds.manifest import Manifest
from relora_ds.optimizer import ReLoRAOptimizer
from relora_ds.run_folder import RunFolder


class ConversionError(RuntimeError):
    """DeepSpeed's converter failed."""


def load(engine: Any, run: RunFolder, checkpoint: Path, tell: Callable[[str], None]) -> checkpoints.Progress:
    """Restores the engine from a checkpoint of any number of ranks; every rank must call it.

    Raises:
        ConversionError: the converter failed.
    """
    content = manifests.read(checkpoint)
    folder = _convert_on_rank_0(run, checkpoint, tell)
    optimizer = engine.optimizer
    zero.load_universal(getattr(optimizer, "zero", optimizer), folder, next(engine.module.parameters()).device)
    state = torch.load(checkpoint / checkpoints.MODEL_STATES, map_location="cpu", weights_only=False, mmap=True)
    engine.module.load_state_dict(state["module"])
    engine.global_steps, engine.skipped_steps = state["global_steps"], state["skipped_steps"]
    engine.global_samples = state["global_samples"]
    _load_restarts(optimizer, checkpoint, content)
    vocabulary = getattr(optimizer, "vocabulary", None)
    if vocabulary is not None:
        vocabulary.load_shares(list(_optimizer_states(checkpoint, content)))
    return checkpoints.Progress(**content.progress)


def _load_restarts(optimizer: Any, checkpoint: Path, content: Manifest) -> None:
    """How far the restarts have come, and the frozen weights, from the base or from the checkpoint itself."""
    if not isinstance(optimizer, ReLoRAOptimizer):
        return
    optimizer.updates, optimizer.restarts = content.lora_updates, content.restarts
    if content.base is not None:
        checkpoints.load_base(optimizer, checkpoint)
    elif optimizer.frozen_master is not None:
        _load_contained_master(optimizer, checkpoint, content)


def _load_contained_master(optimizer: ReLoRAOptimizer, checkpoint: Path, content: Manifest) -> None:
    """The rows of a sharded master from the ZeRO files of a self-contained checkpoint, which hold them by the old ranks."""
    master = optimizer.frozen_master
    assert master is not None
    shares = [optimizer.own_state(state).get("frozen_master") for state in _optimizer_states(checkpoint, content)]
    whole = [share for share in shares if share is not None]
    if len(whole) == len(shares):
        master.load_shares(whole)
    else:
        master.load(None)


def _optimizer_states(checkpoint: Path, content: Manifest) -> Iterator[dict[str, Any]]:
    """What the optimizer of each old rank saved, in their order."""
    for rank in range(content.world_size):
        name = next(file for file in content.files if f"zero_pp_rank_{rank}_" in file)
        yield torch.load(checkpoint / name, map_location="cpu", weights_only=False, mmap=True)["optimizer_state_dict"]


def _convert_on_rank_0(run: RunFolder, checkpoint: Path, tell: Callable[[str], None]) -> Path:
    """The universal form of a checkpoint; all ranks learn whether it worked."""
    folder, problem = run.universal / checkpoint.name, [""]
    if dist.get_rank() == 0:
        try:
            convert(checkpoint, folder, tell)
        except (OSError, ConversionError) as error:
            problem = [" ".join(str(error).split())]
    dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise ConversionError(problem[0])
    return folder


def convert(checkpoint: Path, folder: Path, tell: Callable[[str], None]) -> None:
    """Makes the universal form of a checkpoint in ``folder``, unless it is there already."""
    source = manifests.digest(checkpoint / manifests.NAME)
    try:
        if manifests.read_json(folder).get("source") == source:
            tell(f"reusing the universal checkpoint {folder}")
            return
    except manifests.ManifestError:
        pass
    tell(f"converting {checkpoint} for another number of ranks, once (DeepSpeed's ds_to_universal)")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(checkpoint), "--output_folder", str(folder)]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    # What asks a run to stop reaches all processes of a SLURM step: the conversion is finished first, and the run then stops.
    command = ["sh", "-c", "trap '' TERM INT HUP USR1 USR2; exec \"$@\"", "sh", *command]
    done = subprocess.run(launch.tied(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        raise ConversionError(f"ds_to_universal failed on {checkpoint}: {lines[-1] if lines else done.returncode}")
    manifests.write(folder, {"source": source, "files": {}})
