"""Ranks that find something wrong at the start: real processes, each with its own command, as a launcher starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from relora_ds.comm import network
from tests.distributed.pool import ROOT

pytestmark = pytest.mark.long
TRAIN = [sys.executable, "-m", "relora_ds", "train"]
CLAIMS_CUDA = """
import sys, time
import deepspeed
from relora_ds.errors import ConfigError
from relora_ds.launch import devices, places, process_group
began = time.monotonic()
if sys.argv[1] == "1":
    devices.visible = lambda: [devices.Gpu("GPU-a", "0000:1b:00")]
try:
    process_group.start(places.discover())
except ConfigError as error:
    print(time.monotonic() - began, error, sep="|")
"""


def ranks(*commands: list[str], **environment: str) -> list[tuple[int, str]]:
    """Runs one command a rank; returns the exit code of each, and what it said."""
    port, started = str(network.free_port()), []
    for rank, command in enumerate(commands):
        place = {"RANK": str(rank), "WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {**os.environ, **place, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
        started.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        said = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def lines(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("relora-ds: error")]


def test_one_rank_says_what_all_find(recipe: Path, settings: dict[str, Any]) -> None:
    """And the job is over for good."""
    (rank_0, said), (rank_1, silence) = ranks(*[[*TRAIN, str(recipe), "relora.rank=1000"]] * 2, SLURM_JOB_ID="17")
    assert (rank_0, rank_1) == (2, 2)
    assert len(lines(said)) == 1 and "relora.rank=1000: " in said and "rank 0 on" not in said
    assert silence == ""
    outcome = json.loads((Path(settings["run"]["dir"]) / "slurm/outcome.json").read_text())
    assert (outcome["attempt"], outcome["code"]) == ("17.0", 2)


def test_one_line_names_the_rank_that_alone_finds_something(recipe: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    """A node without the mount: its name goes to whoever starts the job again, and the job is not over for good."""
    folder = Path(settings["run"]["dir"])
    folder.mkdir()
    bad = [*TRAIN, str(recipe), f"data.path={tmp_path / 'none'}"]
    (rank_0, said), (rank_1, silence) = ranks([*TRAIN, str(recipe)], bad, SLURM_JOB_ID="17", SLURMD_NODENAME="node2")
    assert (rank_0, rank_1) == (2, 2)
    (line,) = lines(said)
    assert line.startswith(f"relora-ds: error: rank 1 on node2: data.path='{tmp_path}/none'")
    assert silence == ""
    (fault,) = [json.loads(text) for text in (folder / "faults.jsonl").read_text().splitlines()]
    assert (fault["kind"], fault["rank"], fault["host"], fault["attempt"]) == ("refusal", 1, "node2", "17.0")
    assert line.endswith(fault["detail"])
    assert not (folder / "slurm/outcome.json").exists()


@pytest.mark.parametrize("local_world_size", ["", "2"], ids=["unknown", "told"])
def test_a_rank_without_a_gpu_among_others_ends_all_at_once(local_world_size: str) -> None:
    """They would have started process groups of two kinds, and waited for each other for the time of a collective."""
    commands = [[sys.executable, "-c", CLAIMS_CUDA, str(rank)] for rank in range(2)]
    found = ranks(*commands, LOCAL_WORLD_SIZE=local_world_size)
    line = (
        f"rank 0 on {socket.gethostname()}: drives the CPU, where the others drive a GPU: all must have the same kind of device"
    )
    for code, text in found:
        seconds, told = text.splitlines()[-1].split("|")
        assert (code, told) == (0, line) and float(seconds) < 60
