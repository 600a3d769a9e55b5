"""Going on with another number of ranks: DeepSpeed's universal checkpoint, made once by rank 0 and reused.

DeepSpeed's converter takes the shards of the optimizer apart into one file per parameter and state. They are read here, not by
``load_universal``, which fails where a rank owns nothing of a parameter group.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from relora_ds.checkpoint import reader as checkpoints
from relora_ds.launch import launcher
from relora_ds.optimizer.wrapper import ReLoRAOptimizer
from relora_ds.run import manifest as manifests
from relora_ds.run import unpickle
from relora_ds.run.folder import RunFolder
from relora_ds.run.manifest import Manifest
from relora_ds.zero import state as zero

PATIENCE = timedelta(days=2)
"""How long ranks wait for rank 0's conversion; where rank 0 dies, the store or the launcher ends them."""
_CONVERSIONS = itertools.count()
"""Numbers the keys in the store: the same on all ranks, which all convert alike."""
OldStates = Callable[[], Iterator[dict[str, Any]]]
"""Reads what the optimizer of each old rank saved, in their order."""


class ConversionError(RuntimeError):
    """DeepSpeed's converter failed."""


def load(
    engine: Any, run: RunFolder, checkpoint: Path, tell: Callable[[str], None], *, trust: bool = False
) -> checkpoints.Progress:
    """Restores the engine from a checkpoint of any number of ranks; every rank must call it.

    Raises:
        ConversionError: the converter failed.
        ConfigError: a file could run something, and the user does not trust (``trust``) whoever wrote it.
    """
    content = manifests.read(checkpoint)
    folder = _convert_on_rank_0(run, checkpoint, tell, trust)
    optimizer = engine.optimizer
    zero.load_universal(getattr(optimizer, "zero", optimizer), folder, next(engine.module.parameters()).device, trust=trust)
    state = unpickle.read(checkpoint / checkpoints.MODEL_STATES, trust=trust)
    engine.module.load_state_dict(state["module"])
    engine.global_steps, engine.skipped_steps = state["global_steps"], state["skipped_steps"]
    engine.global_samples = state["global_samples"]
    old = partial(_optimizer_states, checkpoint, content, trust)
    _load_restarts(optimizer, checkpoint, content, old)
    return checkpoints.Progress(**content.progress)


def _load_restarts(optimizer: Any, checkpoint: Path, content: Manifest, old: OldStates) -> None:
    """How far the restarts have come, and the frozen weights, from the base or from the checkpoint itself."""
    if not isinstance(optimizer, ReLoRAOptimizer):
        return
    optimizer.updates, optimizer.restarts = content.lora_updates, content.restarts
    if content.base is not None:
        checkpoints.load_base(optimizer, checkpoint)
    elif optimizer.frozen_master is not None:
        _load_contained_master(optimizer, old)


def _load_contained_master(optimizer: ReLoRAOptimizer, old: OldStates) -> None:
    """The rows of a sharded master from the ZeRO files of a self-contained checkpoint, which hold them by the old ranks."""
    master = optimizer.frozen_master
    assert master is not None
    shares = [optimizer.own_state(state).get("frozen_master") for state in old()]
    whole = [share for share in shares if share is not None]
    if len(whole) == len(shares):
        master.load_shares(whole)
    else:
        master.load(None)


def _optimizer_states(checkpoint: Path, content: Manifest, trust: bool) -> Iterator[dict[str, Any]]:
    """What the optimizer of each old rank saved, in their order."""
    for rank in range(content.world_size):
        name = next(file for file in content.files if f"zero_pp_rank_{rank}_" in file)
        yield unpickle.read(checkpoint / name, trust=trust)["optimizer_state_dict"]


def _convert_on_rank_0(run: RunFolder, checkpoint: Path, tell: Callable[[str], None], trust: bool) -> Path:
    """The universal form of a checkpoint; all ranks learn whether it worked.

    They wait at the process group's store, not in a collective, whose timeout a large conversion may exceed.
    """
    folder, problem = run.universal / checkpoint.name, "it was broken off"
    store, key = dist.distributed_c10d._get_default_store(), f"relora_ds/conversion/{next(_CONVERSIONS)}"
    if dist.get_rank() == 0:
        try:
            convert(checkpoint, folder, tell, trust=trust)
            problem = ""
        except (OSError, ConversionError) as error:
            problem = " ".join(str(error).split())
        finally:
            store.set(key, problem)
    store.wait([key], PATIENCE)
    problem = store.get(key).decode()
    if problem:
        raise ConversionError(problem)
    return folder


def convert(checkpoint: Path, folder: Path, tell: Callable[[str], None], *, trust: bool = False) -> None:
    """Makes the universal form of a checkpoint in ``folder``, unless it is there already. Raises ConversionError."""
    source = manifests.digest(checkpoint / manifests.NAME)
    with suppress(manifests.ManifestError):
        there = manifests.read_json(folder)
        # without files: of an earlier version, which did not say whether it is whole
        if there.get("source") == source and there["files"] and not any(manifests.faults(folder, there["files"])):
            tell(f"reusing the universal checkpoint {folder}")
            return
    tell(f"converting {checkpoint} for another number of ranks, once (DeepSpeed's ds_to_universal)")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Unbuffered, so that what it says last comes last.
    command = [sys.executable, "-u", "-m", "relora_ds.checkpoint.converter", "--inject_missing_state"]
    command += ["--input_folder", str(checkpoint), "--output_folder", str(folder)]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1", *["--trust"] * trust]
    # What asks a run to stop reaches all processes of a SLURM step: the conversion is finished first, and the run then stops.
    command = ["sh", "-c", "trap '' TERM INT HUP USR1 USR2; exec \"$@\"", "sh", *command]
    done = subprocess.run(launcher.tied(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        raise ConversionError(f"ds_to_universal failed on {checkpoint}: {lines[-1] if lines else done.returncode}")
    written = [path for path in folder.rglob("*") if path.is_file()]
    files = {str(path.relative_to(folder)): manifests.flush_and_describe(path) for path in written}
    manifests.write(folder, {"source": source, "files": files})
