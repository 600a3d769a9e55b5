"""Where SLURM is, before a job's ranks and after them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from relora_ds.config import Config
from relora_ds.run import manifest as manifests
from relora_ds.run.folder import RunFolder
from relora_ds.run.manifest import Manifest
from relora_ds.slurm import client as slurm_client
from relora_ds.slurm import job as slurm_job
from relora_ds.slurm.client import Job, SlurmError
from relora_ds.slurm.job import Attempt

Before = After = Callable[..., int]
RUNNING = Job(17, "a", "RUNNING", "node[1-2]", 0, 1.0, 2.0, "", "", "/runs/job.sbatch", ())
FIRST = Attempt(17, 0, ("node1", "node2"))


class Cluster:
    """Stands where SLURM is: answers, and notes what it was asked to do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.job: Job | None = RUNNING
        self.bad: list[str] = []
        self.calls: list[str] = []
        self.refuses = False
        self.environments: list[Mapping[str, str]] = []
        """What sbatch was called in, each time."""
        monkeypatch.setattr(slurm_client, "shown", lambda job, *_, **__: self.job and replace(self.job, id=job))
        monkeypatch.setattr(slurm_client, "unusable", lambda nodes: [node for node in nodes if node in self.bad])
        monkeypatch.setattr(slurm_client, "insist", self.insist)
        monkeypatch.setattr(slurm_client, "submit", self.submit)

    def insist(self, *words: object, **_: object) -> str:
        if self.refuses:
            raise SlurmError("Access/permission denied")
        self.calls.append(" ".join(map(str, words)))
        return ""

    def submit(self, script: Path, *options: object, environment: Mapping[str, str]) -> tuple[int, str]:
        self.calls.append(" ".join(["sbatch", *map(str, options), str(script)]))
        self.environments.append(environment)
        return 17 + len(self.environments), ""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def before(config: Config, said: list[str]) -> Before:
    def call(attempt: Attempt = FIRST, fits: Callable[[int], None] = lambda _: None, requeue_by: str = "requeue") -> int:
        return slurm_job.before(config, attempt, fits, requeue_by=requeue_by, say=said.append)

    return call


@pytest.fixture
def after(config: Config, said: list[str]) -> After:
    def call(code: int, attempt: Attempt = FIRST, requeue_by: str = "requeue", max_stalled: int = 3) -> int:
        return slurm_job.after(config, attempt, code, requeue_by=requeue_by, max_stalled=max_stalled, say=said.append)

    return call


def checkpoint(run: RunFolder, update: int) -> None:
    """A folder that says it is a checkpoint of ``update``."""
    folder = run.checkpoints / f"update_{update:07}"
    folder.mkdir(parents=True)
    content = Manifest(
        update=update, phase="lora", restarts=1, lora_updates=update, world_size=4, zero_stage=2, precision="bf16", config_sha256="",
        data={}, rng={}, progress={}, base=None, versions={},
    )  # fmt: skip
    manifests.write(folder, content)
