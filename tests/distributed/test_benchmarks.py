"""The benchmarks that compare ways of training, at sizes that take a moment: what they write, and how they end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_steps, peers, restart, step
from relora_ds.method import lora
from tests.distributed import common
from tests.distributed.pool import run
from tests.unit.benchmarks.checkouts import checkout

TINY = ["--hidden", "32", "--layers", "1", "--rank", "4", "--rounds", "2", "--warm-up", "1"]


def train_peers(words: list[str], tolerance: float) -> int:
    peers.TOLERANCE, before = tolerance, peers.TOLERANCE
    try:
        return peers.measure(peers.parse(words))
    finally:
        peers.TOLERANCE = before


def train_step(words: list[str]) -> None:
    step.measure(step.parse(words))


def train_restart(words: list[str]) -> None:
    restart.measure(restart.parse(words))


def test_peers_train_alike_on_two_ranks(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    words = [*TINY, "--nproc", "2", "--tokens", "1024", "--micro-batches", "2", "--authors", str(checkout(tmp_path / "theirs"))]
    assert run(2, train_peers, [*words, "--json", str(found)], peers.TOLERANCE) == [0, 0]
    ways = json.loads(found.read_text())["ways"]
    full, ddp, peft, authors, split, merged = ways.values()
    assert [len(way["seconds"]) for way in ways.values()] == [2] * 6
    assert full["trained"] == ddp["trained"] != peft["trained"] == authors["trained"] == split["trained"] == merged["trained"]
    assert full["returned"][-1] != split["returned"][-1], "weights and factors train"


def test_peers_on_one_rank_whose_losses_differ(tmp_path: Path) -> None:
    """No difference is below a tolerance of -1. Without a checkout the authors' layer is left out, which is said."""
    found = tmp_path / "found.json"
    assert run(1, train_peers, [*TINY, "--tokens", "256", "--json", str(found)], -1.0) == [1]
    content = json.loads(found.read_text())
    assert len(content["ways"]) == 5 and "the authors' layer is left out: no --authors" in content["notes"]


def built(case: gpu_steps.Case) -> dict[str, Any]:
    """What the settings of a case have come to."""
    engine = gpu_steps.engine_of(case, gpu_steps.build(case, torch.device("cpu")))
    layers = [layer for _, layer in lora.relora_layers(engine.module)]
    found = {
        "forms": {layer.form for layer in layers},
        "stores": {layer.weight.values.dtype for layer in layers},
        "rank": {layer.rank for layer in layers},
        "loss": getattr(engine.module.loss_function, "choice", "torch"),
        "accumulation": engine.gradient_accumulation_steps(),
    }
    common.end(engine)
    return found


def test_the_settings_of_a_case_reach_the_engine() -> None:
    case = gpu_steps.Case(
        model="llama_60m", arm="relora", micro_batch=1, length=16, accumulation=3, dtype="fp32", rank=4, frozen="int8",
        linear="merged", loss="chunked", hidden=32, layers=1, vocabulary=64,
    )  # fmt: skip
    assert run(1, built, case) == [
        {"forms": {"merged"}, "stores": {torch.int8}, "rank": {4}, "loss": "chunked", "accumulation": 3}
    ]


def test_step(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    sizes = ["--vocabulary", "256", "--length", "16", "--tokens", "64", "--compile", "off", "--json", str(found)]
    run(1, train_step, [*TINY, *sizes])
    content = json.loads(found.read_text())
    losses = [way["returned"] for way in content["ways"].values()]
    assert len(losses) == 5
    assert all(abs(one - other) < 1e-5 for own in losses for one, other in zip(own, losses[0], strict=True))
    (parts,) = content["tables"]
    assert {"forward", "backward", "optimizer step"} < {row[0] for row in parts}


def test_restart_in_bf16(tmp_path: Path) -> None:
    """What the command for a GPU asks of it."""
    found, text = tmp_path / "found.json", tmp_path / "found.md"
    sizes = ["--hidden", "32", "--layers", "1", "--rank", "4", "--rounds", "1", "--tokens", "256", "--dtype", "bf16"]
    run(1, train_restart, [*sizes, "--json", str(found), "--markdown", str(text)])
    content = json.loads(found.read_text())
    assert list(content["ways"]) == list(restart.modes("bf16"))
    for way in content["ways"].values():
        assert len(way["update_s"]) == len(way["restart_s"]) == len(way["parts"]) == 1
        assert sum(way["parts"][0].values()) <= way["restart_s"][0] * 1.001
    assert "| int8 store, factors from the residual |" in text.read_text() and "torch" in content["machine"]
