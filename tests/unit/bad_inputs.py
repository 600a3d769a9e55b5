"""What bad inputs are tried on: a folder with everything in it that a command reads, and what must be said of one that is spoilt.

Nothing is patched but the starter of ranks, which must not be called.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from relora_ds.cli.main import main
from relora_ds.launch import launcher, process_group

CHECKPOINT = "run/checkpoints/update_0000002"
MANIFEST = f"{CHECKPOINT}/manifest.json"
STATES = f"{CHECKPOINT}/mp_rank_00_model_states.pt"
OPTIMIZER = f"{CHECKPOINT}/zero_pp_rank_0_mp_rank_00_optim_states.pt"
BASE = "run/base/restart_0000"
INDEX = "tokens/index.json"
TRAIN = "train recipe.yaml --nproc 2"
NEW = "train recipe.yaml run.dir=other --nproc 2"
"""Of a run that has no folder yet."""
PROGRESS = ("training a byte-level BPE", "passed over:")
"""Lines in which ``prepare`` says what it does: they may come before it finds that it cannot go on."""
LAUNCHERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_STEP_ID", "SLURM_JOB_ID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"),
)

Spoil = Callable[[Path], object]


@dataclass(frozen=True)
class Bad:
    """One bad input.

    Attributes:
        command: the words of the command line, as a shell reads them.
        told: what the one line must hold: the key or file, the value, the way out.
        spoil: what is done to the folder first.
        environment: variables that are set.
        wording: of the test's name, where the command says too little.
    """

    command: str
    told: Sequence[str]
    spoil: Spoil | None = None
    environment: dict[str, str] = field(default_factory=dict)
    wording: str = ""

    def __str__(self) -> str:
        return self.wording or " ".join([self.command, *(f"{name}={value}" for name, value in self.environment.items())])


def overridden(override: str, *told: str) -> Bad:
    """A setting that is given as an override of a good recipe, whose run has no folder yet."""
    words = " ".join(shlex.quote(word) for word in override.split(" "))
    return Bad(f"train recipe.yaml run.dir=other {words} --nproc 2", told, wording=override)


def spoilt(wording: str, spoil: Spoil, command: str, *told: str) -> Bad:
    return Bad(command, told, spoil, wording=wording)


# Ways to spoil


def write(name: str, content: str | bytes) -> Spoil:
    def spoil(place: Path) -> None:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def edit(name: str, dotted: str, value: Any) -> Spoil:
    """Sets one entry of a JSON file."""

    def spoil(place: Path) -> None:
        content = json.loads((place / name).read_text())
        *path, last = dotted.split(".")
        inner = content
        for key in path:
            inner = inner[key]
        inner[last] = value
        (place / name).write_text(json.dumps(content))

    return spoil


def drop(name: str, key: str) -> Spoil:
    """Takes an entry out of a JSON file."""

    def spoil(place: Path) -> None:
        content = json.loads((place / name).read_text())
        del content[key]
        (place / name).write_text(json.dumps(content))

    return spoil


def cut(name: str, num_bytes: int = 10) -> Spoil:
    return lambda place: (place / name).write_bytes((place / name).read_bytes()[:-num_bytes])


def flip(name: str) -> Spoil:
    """Changes a byte in the middle of a file."""

    def spoil(place: Path) -> None:
        content = bytearray((place / name).read_bytes())
        content[len(content) // 2] ^= 0xFF
        (place / name).write_bytes(bytes(content))

    return spoil


def remove(name: str) -> Spoil:
    return lambda place: shutil.rmtree(place / name) if (place / name).is_dir() else (place / name).unlink()


def become_folder(name: str) -> Spoil:
    return lambda place: ((place / name).unlink(missing_ok=True), (place / name).mkdir(parents=True))


def become_file(name: str) -> Spoil:
    return lambda place: (shutil.rmtree(place / name, ignore_errors=True), (place / name).write_text("x"))


def replaced(old: str, new: str) -> Spoil:
    """Other words in the recipe."""

    def spoil(place: Path) -> None:
        text = (place / "recipe.yaml").read_text()
        assert old in text
        (place / "recipe.yaml").write_text(text.replace(old, new))

    return spoil


def appended(text: str) -> Spoil:
    return lambda place: (place / "recipe.yaml").write_text((place / "recipe.yaml").read_text() + text)


class Harmful:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch harm",)


def harm(place: Path) -> None:
    """A pickle that runs a command, in a checkpoint whose manifest says that it is whole."""
    import torch

    torch.save({"module": {}, "more": Harmful()}, place / STATES)
    content = (place / STATES).read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = json.loads((place / MANIFEST).read_text())
    manifest["files"][Path(STATES).name] = entry
    (place / MANIFEST).write_text(json.dumps(manifest))


# The judge


def contents(place: Path) -> dict[str, bytes | None]:
    """Every file of a folder with its bytes, every folder with None."""
    return {str(path.relative_to(place)): path.read_bytes() if path.is_file() else None for path in sorted(place.rglob("*"))}


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, the two outputs by lines."""

    code: object
    out: list[str]
    errors: list[str]


def run(command: str, capfd: pytest.CaptureFixture[str]) -> Outcome:
    capfd.readouterr()
    try:
        code: object = main(shlex.split(command))
    except SystemExit as stop:
        code = stop.code
    out, errors = capfd.readouterr()
    return Outcome(code, out.splitlines(), errors.splitlines())


def must_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one patch: whoever starts ranks, or is one, fails the test."""

    def start(*_: object, **__: object) -> None:
        pytest.fail("ranks were started")

    monkeypatch.setattr(launcher, "spawn", start)
    monkeypatch.setattr(process_group, "start", start)


def judge(bad: Bad, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Refused: exit code 2, one line that holds the words, nothing written, no rank started."""
    must_not_start(monkeypatch)
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in bad.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(place)
    if bad.spoil is not None:
        bad.spoil(place)
    before = contents(place)
    outcome = run(bad.command, capfd)
    lines = [line for line in outcome.errors if not line.startswith(PROGRESS)]
    assert outcome.code == 2, outcome
    assert outcome.out == []
    assert len(lines) == 1, outcome.errors
    assert lines[0].startswith("relora-ds: error: ")
    missing = [words for words in bad.told if words not in lines[0]]
    assert not missing, f"{missing} not in: {lines[0]}"
    assert contents(place) == before, "something was written"
    assert not dist.is_initialized()
