"""What lies in a run's folder, and how the line-by-line logs in it are written."""

from __future__ import annotations

import json
import math
import os
import random
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relora_ds.config import Config, parse
from relora_ds.errors import ConfigError
from relora_ds.text import json_text
from relora_ds.text.yaml_text import read_yaml_file

GONE: dict[str, Any] = {"traffic": {"vocabulary_every": 1, "vocabulary_rows": "all", "vocabulary_dtype": "auto"}}
"""Sections that earlier versions wrote into config.yaml, with what they say where a run did not use them."""


APPEND_TRIES, APPEND_PAUSE_S = 5, 0.2


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run: config.yaml, deepspeed.json, model/ (Hugging Face configuration and tokenizer), metrics.jsonl,
    restarts.jsonl, traffic.json, ranks.jsonl, starts.jsonl, faults.jsonl, stacks/ (where every rank hung), profile/ (traces and
    tables of where the time goes), checkpoints/, base/ (frozen weights, once per restart), universal/ (conversions), slurm/ (what was
    submitted, and what became of it), plots/, report.md, report.html, spectrum.html, spectrum.md, spectrum.csv."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def deepspeed(self) -> Path:
        return self.path / "deepspeed.json"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def restarts(self) -> Path:
        return self.path / "restarts.jsonl"

    @property
    def traffic(self) -> Path:
        return self.path / "traffic.json"

    @property
    def ranks(self) -> Path:
        return self.path / "ranks.jsonl"

    @property
    def starts(self) -> Path:
        return self.path / "starts.jsonl"

    @property
    def faults(self) -> Path:
        return self.path / "faults.jsonl"

    @property
    def stacks(self) -> Path:
        return self.path / "stacks"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def base(self) -> Path:
        return self.path / "base"

    @property
    def universal(self) -> Path:
        return self.path / "universal"

    @property
    def slurm(self) -> Path:
        return self.path / "slurm"

    @property
    def wandb_id(self) -> Path:
        return self.path / "wandb_id"

    def exists(self) -> bool:
        """Whether this folder holds a run, rather than, say, a Hugging Face model."""
        return self.config.is_file() and self.checkpoints.is_dir()

    def read_config(self) -> Config:
        """The configuration that the run was started with."""
        if not self.config.is_file():
            raise ConfigError("RUN_DIR", str(self.path), "holds no config.yaml", "name the folder given as run.dir")
        try:
            settings = read_yaml_file(self.config, "RUN_DIR")
            return parse(without_gone(settings))
        except GoneError:
            raise
        except ConfigError as error:
            problem = f"its config.yaml is not as a run writes it: {error}"
            raise ConfigError("RUN_DIR", str(self.path), problem, "restore it, or name another folder") from None


class GoneError(ConfigError):
    """A run used what this version does not have."""


def without_gone(content: Any) -> Any:
    """An earlier version's settings without those that are gone; what are no settings at all as they are.

    Raises:
        GoneError: the run used one of them.
    """
    if not isinstance(content, dict):
        return content
    for key, default in GONE.items():
        if content.get(key, default) != default:
            raise GoneError(key, content[key], "is not there any more", "resume with the version that the run was begun with")
    return {key: value for key, value in content.items() if key not in GONE}


def write_atomically(path: Path, text: str) -> None:
    """Replaces ``path`` in one step: a reader, or a run that is killed here, sees the old text or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def give_usual_mode(*paths: Path) -> None:
    """Gives files the mode that `open` would have made them with, by the umask and the folder's own rules.

    For safetensors, which makes them readable for their owner alone. The process's umask cannot be read without a moment in which
    threads write under another: an empty file tells it.
    """
    with suppress(OSError):  # a file system without modes
        for path in paths:
            example = path.with_name(f".{path.name}.mode")
            example.touch()
            mode = example.stat().st_mode
            example.unlink()
            path.chmod(stat.S_IMODE(mode))


def read_traffic(path: Path) -> list[dict[str, Any]]:
    """The starts of a run in its traffic.json; none where the file is missing or damaged."""
    try:
        content = json_text.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    starts = content.get("starts") if isinstance(content, dict) else None
    return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Appends one JSON object as a line, in one write; numbers that JSON cannot hold (NaN, infinities) become null.

    Behind a line that a kill or a power cut left without its end it begins a new one: else both were lost.
    """
    line = json.dumps(finite(record), allow_nan=False).encode() + b"\n"
    with open(path, "a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)


def append_surely(path: Path, record: dict[str, Any]) -> None:
    """As :func:`append_line`, for a file that several machines append to: NFS lets one write over another's line.

    The file is read back, and the line written again where it is not whole in it.
    """
    line = json.dumps(finite(record), allow_nan=False)
    for _ in range(APPEND_TRIES):
        append_line(path, record)  # closed, so that NFS has it, and opened anew, so that it is asked again
        if line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            return
        time.sleep(random.uniform(0, APPEND_PAUSE_S))  # apart from the others


def finite(value: Any) -> Any:
    """``value`` with None in the place of each number in it that is not finite: Python would write NaN, which is no JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


class Log:
    """A file of JSON lines that can be kept through times in which it cannot be written: the lines wait in memory.

    Args:
        path: of the file.
        tell: is told when it cannot be written, once, and when it can again.
    """

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        self.path, self.tell = path, tell
        self.waiting: list[dict[str, Any]] = []
        self.has_failed = False

    def append(self, record: dict[str, Any]) -> None:
        """Appends one object as a line, and those that wait before it."""
        self.waiting.append(record)
        size = None
        try:
            while self.waiting:
                size = self.path.stat().st_size if self.path.exists() else 0
                append_line(self.path, self.waiting[0])
                size = None
                self.waiting.pop(0)
        except OSError as error:
            if size is not None:
                with suppress(OSError):
                    os.truncate(self.path, size)  # part of a line may have found room
            if not self.has_failed:
                self.tell(f"{self.path} cannot be written ({error.strerror}); its lines wait in memory")
            self.has_failed = True
        else:
            if self.has_failed:
                self.tell(f"{self.path} can be written again")
            self.has_failed = False


def truncate_log(path: Path, last_update: int) -> None:
    """Drops the lines of later updates than ``last_update``, which a resumed run will write again, and a line cut off by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json_text.parse(line)["update"] <= last_update:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError):  # damaged: not of ours
            continue
    write_atomically(path, "".join(kept))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a file with one JSON object a line; a last line that a kill cut off is left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json_text.parse(line)
            is_one = isinstance(record, dict) and isinstance(record.get("update"), int)
        except ValueError:
            is_one = False
        if not is_one:
            if number == len(lines):
                break
            problem = f"line {number} of {path.name} is no JSON object with an update number"
            raise ConfigError("RUN_DIR", str(path.parent), problem, "mend or remove that line")
        records.append(record)
    return records
