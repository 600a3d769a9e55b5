"""Saving while training goes on: the state is copied to host memory, a thread of each rank writes it, rank 0's completes it.

No collective runs outside the main thread: the threads meet in the file system. Each leaves a small file that lists what it wrote;
when those of all ranks are there, rank 0 writes the manifest, and the checkpoint exists. (DeepSpeed's own asynchronous writers do not
serve: one needs an I/O library that is compiled at the first start, the other a package of its own.)
"""

from __future__ import annotations

import copy
import json
import secrets
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from safetensors.torch import save_file
from torch import Tensor

from relora_ds.checkpoint import base as bases
from relora_ds.comm.counter import CHECKPOINT, COUNTER
from relora_ds.run import manifest as manifests
from relora_ds.run.folder import RunFolder, give_usual_mode, write_atomically
from relora_ds.run.manifest import Manifest

POLL_S, MOST_POLL_S = 0.02, 0.5
"""How often rank 0 looks for what the others wrote, at first and after a while."""
GRACE_S = 60.0
"""How long a run that ends by an error waits for a checkpoint that is being written."""


class FencedError(RuntimeError):
    """Another job has taken over the run's folder."""


class HostCopy(TorchCheckpointEngine):
    """Stands in for DeepSpeed's checkpoint engine while it saves: keeps copies in host memory, touches no file.

    Attributes:
        states: {path: what DeepSpeed would have written there}.
    """

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[Path, Any] = {}
        self._copies: dict[tuple[Any, ...], Tensor] = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """The writing thread makes folders: here a full disk would stop one rank in the middle of a collective."""

    def save(self, state_dict: Any, path: str) -> None:
        self.states[Path(path)] = self._copy(state_dict)

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            # A tied weight is copied once, and a view takes no more than itself, where torch.save would write its whole storage.
            key = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride(), value.dtype)
            if key not in self._copies:
                self._copies[key] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            return self._copies[key]
        if isinstance(value, dict):
            copied = {key: self._copy(item) for key, item in value.items()}
            return copied if type(value) is dict else _like(value, copied)
        if type(value) in (list, tuple):
            return type(value)(self._copy(item) for item in value)
        return value if isinstance(value, (str, int, float, bool, type(None))) else copy.deepcopy(value)


def _like(original: dict[Any, Any], items: dict[Any, Any]) -> dict[Any, Any]:
    """The same kind of dictionary (OrderedDict) with other values."""
    result = original.copy()
    result.clear()
    result.update(items)
    return result


@dataclass
class _Job:
    """One checkpoint on its way."""

    target: Path
    states: dict[Path, Any]
    base: Path | None
    base_tensors: dict[str, Tensor]
    base_content: dict[str, Any]
    manifest: Manifest
    thread: threading.Thread | None = None
    own_done: threading.Event = field(default_factory=threading.Event)
    abandoned: threading.Event = field(default_factory=threading.Event)
    error: str | None = None
    fenced: bool = False


class Saver:
    """Writes the checkpoints of a run.

    Args:
        run: the run's folder.
        rank, world_size: of the job.
        is_mine: whether this job still holds the run's folder; asked by rank 0 before anything becomes visible.
        rotate: called by rank 0 when a checkpoint is complete.
        self_contained: whether the frozen weights go into every checkpoint.
    """

    def __init__(
        self,
        run: RunFolder,
        rank: int,
        world_size: int,
        *,
        is_mine: Callable[[], bool],
        rotate: Callable[[], None],
        self_contained: bool = False,
    ) -> None:
        self.run, self.rank, self.world_size = run, rank, world_size
        self.is_mine, self.rotate, self.self_contained = is_mine, rotate, self_contained
        self.base: dict[str, str] | None = None
        """The newest complete base: its folder and the digest of its manifest."""
        self._job: _Job | None = None
        self._token = _from_rank_0(secrets.token_hex(4))

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is on its way; the same on all ranks."""
        return self._job is not None

    @property
    def has_failed(self) -> bool:
        """Whether this rank's part of the checkpoint on its way went wrong; does not wait."""
        return self._job is not None and self._job.error is not None

    def start(self, engine: Any, manifest: Manifest, progress: dict[str, Any]) -> None:
        """Copies the state to host memory and begins to write it. Every rank must call it, after :meth:`finish`."""
        assert self._job is None, "the last checkpoint must be finished first"
        target = self.run.checkpoints / f"update_{manifest.update:07d}"
        optimizer, base = engine.optimizer, None
        tensors: dict[str, Tensor] = {}
        content: dict[str, Any] = {}
        if bases.frozen_weights(optimizer) and not self.self_contained:
            base = bases.folder_of(self.run, optimizer.restarts)
            if self.base is None or self.base["folder"] != self._relative(base):
                tensors, content = bases.snapshot(optimizer), bases.describe(optimizer)
        if self.rank == 0:  # what an earlier attempt left; what cannot be removed is found when the files are written
            manifests.remove(target)
            if content and base is not None:
                manifests.remove(base)
        states = _states(engine, self.run.checkpoints, target.name, progress, leave_out_frozen=base is not None)
        self._job = job = _Job(target, states, base, tensors, content, manifest)
        job.thread = threading.Thread(target=self._write, args=(job,), name="checkpoint", daemon=True)
        job.thread.start()

    def finish(self) -> str | None:
        """Waits until the checkpoint on its way is complete on all ranks, which must all call it; returns what went wrong.

        Raises:
            FencedError: another job has the run's folder.
        """
        job, self._job = self._job, None
        if job is None:
            return None
        assert job.thread is not None
        job.own_done.wait()
        errors = _from_all_ranks(job.error)
        if any(errors):
            job.abandoned.set()
        job.thread.join()
        error, fenced, base = _from_rank_0((job.error, job.fenced, self.base))
        self.base = base
        if fenced:
            raise FencedError(error)
        problem = next((text for text in [*errors, error] if text), None)
        if problem and self.rank == 0:
            self._remove_pieces(job)
        return problem

    def _remove_pieces(self, job: _Job) -> None:
        """Of a checkpoint that could not be written: on a full disk they take the room that the next one needs."""
        with suppress(OSError):  # a disk that fails: where it cannot be seen whether it is complete, it is left
            if not (job.target / manifests.NAME).is_file():
                manifests.remove(job.target)
        if job.base is not None and job.base_content and (self.base is None or self.base["folder"] != self._relative(job.base)):
            manifests.remove(job.base)

    def abandon(self) -> None:
        """Waits a while for the checkpoint on its way, without the other ranks: the run ends by an error."""
        job, self._job = self._job, None
        if job is not None and job.thread is not None:
            job.thread.join(GRACE_S)
            job.abandoned.set()

    def _relative(self, base: Path) -> str:
        return str(base.relative_to(self.run.path))

    # In the thread

    def _write(self, job: _Job) -> None:
        try:
            self._write_own(job)
        except Exception as error:  # whatever a file system, torch or safetensors raises: the run goes on
            job.error = f"rank {self.rank}: {' '.join(str(error).split()) or type(error).__name__}"
        job.own_done.set()
        if self.rank == 0 and job.error is None:
            try:
                self._complete(job)
            except FencedError as error:
                job.error, job.fenced = str(error), True
            except Exception as error:
                job.error = f"rank 0: {' '.join(str(error).split()) or type(error).__name__}"

    def _write_own(self, job: _Job) -> None:
        """This rank's files, and the small one that lists them."""
        own: dict[str, Any] = {"files": {}, "base_files": {}}
        if job.base is not None and job.base_content:
            job.base.mkdir(exist_ok=True)  # not its parents: where they are gone, the mount is
            path = job.base / bases.file_of(self.rank)
            save_file(job.base_tensors, path)
            give_usual_mode(path)
            own["base_files"][path.name] = manifests.flush_and_describe(path)
        job.target.mkdir(exist_ok=True)
        for path, state in job.states.items():
            torch.save(state, path)
            own["files"][path.name] = manifests.flush_and_describe(path)
        job.states.clear()
        write_atomically(self._part(job, self.rank), json.dumps(own))

    def _part(self, job: _Job, rank: int) -> Path:
        return job.target / f".written_{self._token}_{rank}.json"

    def _complete(self, job: _Job) -> None:
        """Rank 0: when all ranks have written, the manifests, base first; then what is no longer needed goes."""
        parts = [self._part(job, rank) for rank in range(self.world_size)]
        if not _await(parts, job.abandoned):
            return
        written = [json.loads(part.read_text(encoding="utf-8")) for part in parts]
        if not self.is_mine():
            raise FencedError(f"another job has taken over {self.run.path}")
        if job.base is not None and job.base_content:
            files = {name: entry for part in written for name, entry in part["base_files"].items()}
            manifests.flush_folder(job.base)
            self.base = {
                "folder": self._relative(job.base),
                "sha256": manifests.write(job.base, {**job.base_content, "files": files}),
            }
        files = {name: entry for part in written for name, entry in part["files"].items()}
        for part in parts:
            part.unlink()
        manifests.flush_folder(job.target)
        manifests.write(job.target, replace(job.manifest, files=files, base=self.base if job.base is not None else None))
        # The checkpoint exists. What follows is tried again with the next one, and must not take this one along.
        with suppress(OSError, manifests.ManifestError):
            write_atomically(self.run.checkpoints / "latest", job.target.name)  # the tag that DeepSpeed loads unasked
            if job.base is None:  # whole in itself, as DeepSpeed's own are, so its script can read it
                script = Path(deepspeed.__file__).parent / "utils" / "zero_to_fp32.py"
                shutil.copyfile(script, self.run.checkpoints / script.name)
            self.rotate()


def _await(parts: Sequence[Path], abandoned: threading.Event) -> bool:
    """Whether all of some files of one folder came, rather than that they are not wanted any more.

    They are looked for in the folder's list: asked for by name, NFS may remember for a minute that one was not there.
    """
    missing, pause_s = {part.name for part in parts}, POLL_S
    while True:
        with suppress(OSError):
            missing -= {path.name for path in parts[0].parent.iterdir()}
        if not missing or abandoned.wait(pause_s):
            return not missing
        pause_s = min(1.5 * pause_s, MOST_POLL_S)


def _states(engine: Any, folder: Path, tag: str, progress: dict[str, Any], *, leave_out_frozen: bool) -> dict[Path, Any]:
    """What ``engine.save_checkpoint`` would write on this rank, in host memory."""
    copier, original, optimizer = HostCopy(), engine.checkpoint_engine, engine.optimizer
    weights = list(bases.frozen_weights(optimizer).values()) if leave_out_frozen else []
    engine.checkpoint_engine, engine._copy_recovery_script = copier, lambda _path: None
    try:
        for weight in weights:
            weight.in_state = False
        if weights:
            optimizer.saves_frozen = False
        engine.save_checkpoint(str(folder), tag=tag, client_state={"progress": progress}, save_latest=False)
    finally:
        for weight in weights:
            weight.in_state = True
        if weights:
            optimizer.saves_frozen = True
        engine.checkpoint_engine = original
        del engine._copy_recovery_script
    return copier.states


@COUNTER.serving(CHECKPOINT)
def _from_rank_0(value: Any) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@COUNTER.serving(CHECKPOINT)
def _from_all_ranks(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
