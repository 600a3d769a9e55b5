"""Where the host waits for a GPU in an update: nowhere before the optimizer's step, and a few times after it.

Told on a CPU, by what reads the values of tensors. ``benchmarks/gpu_checks.py`` asks CUDA itself.
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from relora_ds.callbacks.callback import Callback, RunState
from relora_ds.config import parse
from relora_ds.engine.release import release
from relora_ds.launch import places
from relora_ds.models import packing
from relora_ds.training.preflight import check
from relora_ds.training.trainer import Trainer
from tests.distributed.pool import run
from tests.syncs import Syncs

NUM_MICRO_BATCHES = 4
MICRO_BATCHES = [f"micro batch {number}" for number in range(1, NUM_MICRO_BATCHES)]
"""But for the last one, at whose end the optimizer's step is."""


class Moments(Callback):
    """Tells which micro batch it is."""

    def __init__(self, syncs: Syncs) -> None:
        self.syncs, self.number = syncs, 0

    def begin_update(self, run: RunState) -> None:
        self.next()

    def beat(self, where: str, allow_s: float) -> None:
        if where == "a micro batch":
            self.next()

    def next(self) -> None:
        self.number += 1
        self.syncs.moment = f"micro batch {self.number}" if self.number <= NUM_MICRO_BATCHES else "after them"


def waits(content: dict[str, Any], phase: str, looks: bool = False) -> dict[str, Counter[str]]:
    """Who waits in the second update of a phase, by moment; ``looks``: whether transformers may look for packed sequences."""
    place = places.discover()
    assert place is not None
    content = copy.deepcopy(content)
    content["relora"]["warm_start"] = 0 if phase == "lora" else 3
    trainer = Trainer(check(parse(content), Path("recipe.yaml"), place.world_size), place, torch.device("cpu"))
    known, syncs = packing.LOOKS, Syncs()
    packing.LOOKS = () if looks else known  # type: ignore[assignment]
    try:
        trainer.update(1, False)
        trainer.callbacks.append(Moments(syncs))
        with syncs:
            trainer.update(2, False)
    finally:
        packing.LOOKS = known
        trainer.close(exit_code=1)
        release(trainer.engine)
    return syncs.found


@pytest.fixture
def content(settings: dict[str, Any]) -> dict[str, Any]:
    """Four micro batches an update and rank; restarts come later."""
    content = copy.deepcopy(settings)
    content["relora"] = {"rank": 4, "alpha": 8, "dropout": 0.1, "restart_every": 8, "restart_warmup": 1}
    content["train"] = {"updates": 16, "global_batch": 2 * 2 * NUM_MICRO_BATCHES, "micro_batch": 2}
    content["wandb"] = {"mode": "disabled"}
    return content


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "full rank": ("full", {}),
    "factors": ("lora", {}),
    "as on a GPU": (
        "lora",
        {"model": {"loss": "chunked", "gradient_checkpointing": True}, "deepspeed": {"bf16": {"enabled": True}}},
    ),
    "int8": ("lora", {"relora": {"frozen": {"dtype": "int8", "group_size": 16, "master": "sharded"}}}),
    "stage 1": ("lora", {"deepspeed": {"zero_optimization": {"stage": 1}}}),
    "offloaded": ("lora", {"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}}),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_micro_batch_waits(content: dict[str, Any], way: str) -> None:
    """Neither in our code nor in DeepSpeed's and transformers'; and in an update no more than what all ranks agree on."""
    phase, changes = WAYS[way]
    for section, values in changes.items():
        content[section] |= values
    for found in run(2, waits, content, phase):
        assert not [moment for moment in MICRO_BATCHES if found.get(moment)], found
        whole = sum(found.values(), Counter())
        if way != "offloaded":  # then DeepSpeed reads figures of each parameter
            assert sum(whole.values()) <= 7, "DeepSpeed twice, and for each of three groups that it clips; the trainer twice"
        ours = {who for who in whole if who.startswith("relora_ds")}
        assert ours == {"relora_ds.training.trainer._agree", "relora_ds.training.trainer._record"}, whole


def test_each_would_wait_if_transformers_looked_for_packed_sequences(content: dict[str, Any]) -> None:
    for found in run(2, waits, content, "lora", True):
        for moment in MICRO_BATCHES:
            assert found[moment] == {"transformers.masking_utils.find_packed_sequence_indices": 1}
