"""The real command line in real processes, on a model that trains in seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import tiny_settings

ROOT = Path(__file__).resolve().parents[1]
TIMES = ("tokens_per_s", "seconds", "parts", "sent_bytes")


def write_recipe(folder: Path, tokens: Path, name: str, **changes: dict[str, Any] | str) -> Path:
    """A recipe of 30 updates into ``folder / name``: warm start of 6, restarts every 8; keywords change sections' values."""
    content = tiny_settings(folder / name, tokens)
    content["relora"] |= {"warm_start": 6, "dropout": 0.1}
    content["train"] |= {"updates": 30, "eval_every": 10, "checkpoint_every": 5}
    content["wandb"] = {"mode": "disabled"}
    for section, values in changes.items():
        content[section] = {**content[section], **values} if isinstance(values, dict) else values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without a launcher's or a key's traces."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ONEDNN_MAX_CPU_ISA", "WANDB_API_KEY")
    env = {name: value for name, value in os.environ.items() if name not in names}
    return {**env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}


def relora(*arguments: object, expect: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs ``relora-ds ARGUMENTS`` to its end and checks the exit code."""
    return command([sys.executable, "-m", "relora_ds", *arguments], expect=expect, **env)


def command(words: list[object], expect: int = 0, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(list(map(str, words)), env=environment(**env), cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == expect, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def start(*arguments: object, **env: str) -> subprocess.Popen[str]:
    """Starts ``relora-ds ARGUMENTS`` in a process group of its own."""
    words = [sys.executable, "-m", "relora_ds", *map(str, arguments)]
    return subprocess.Popen(words, env=environment(**env), cwd=ROOT, text=True, stderr=subprocess.PIPE, start_new_session=True)


def read_log(path: Path) -> list[dict[str, Any]]:
    """A log's records without what differs from run to run: times, and the bytes of updates after a resume (times travel, too)."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def wait_for_update(run_dir: Path, update: int, process: subprocess.Popen[str], timeout_s: float = 120.0) -> None:
    """Until the run has logged ``update``."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it was reached"
        log = run_dir / "metrics.jsonl"
        if log.exists() and any(f'"update": {update},' in line for line in log.read_text().splitlines()):
            return
        time.sleep(0.02)
    raise AssertionError(f"update {update} was not reached within {timeout_s} s")
