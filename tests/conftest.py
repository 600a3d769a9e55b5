"""What tests of all kinds need: a prepared token folder, and a recipe that trains a tiny LLaMA on it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the suite runs on CPUs over gloo, also where there are GPUs

import deepspeed  # noqa: F401 — its import writes a line to stdout: here, before any test captures stdout
import pytest
import yaml

from relora_ds.data.prepare import prepare

VOCAB_SIZE = 300
TINY_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="session")
def token_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text, prepared with a vocabulary of ``VOCAB_SIZE``: thousands of tokens to train on, hundreds held out."""
    folder = tmp_path_factory.mktemp("corpus")
    source, tokens = folder / "text.jsonl", folder / "tokens"
    texts = (f"Entry {i}: the square of {i} is {i * i}, and {i} words follow." + " and so on" * (i % 7) for i in range(120))
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    prepare(str(source), tokens, vocab_size=VOCAB_SIZE, holdout=0.1, progress=False)
    return tokens


def tiny_settings(run_dir: Path, tokens: Path) -> dict[str, Any]:
    """A valid configuration as nested dictionaries: 20 updates, restarts after 8 and 16."""
    return {
        "run": {"dir": str(run_dir), "seed": 1},
        "method": "relora",
        "model": {"config": dict(TINY_LLAMA)},
        "data": {"path": str(tokens), "sequence_length": 16},
        "relora": {"rank": 4, "alpha": 8, "restart_every": 8, "restart_warmup": 3},
        "optimizer": {"lr": 0.002, "warmup": 2},
        "train": {"updates": 20, "global_batch": 8, "micro_batch": 2},
        "deepspeed": {"zero_optimization": {"stage": 2}},
    }


@pytest.fixture
def settings(tmp_path: Path, token_folder: Path) -> dict[str, Any]:
    """:func:`tiny_settings` into this test's own folder."""
    return tiny_settings(tmp_path / "run", token_folder)


@pytest.fixture
def recipe(tmp_path: Path, settings: dict[str, Any]) -> Path:
    """``settings`` as a YAML file."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of its own, of 4 MiB, or of what the test names."""
    place, size = tmp_path / "disk", getattr(request, "param", "4m")
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False)
