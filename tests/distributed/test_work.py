"""The work of one update of an engine: operations, collectives and their bytes stay what the cost model says."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig

import relora_ds
from relora_ds.bandwidth import formulas
from relora_ds.config import Optimizer, ReLoRA
from relora_ds.engine.initialize import adamw
from relora_ds.method import lora
from relora_ds.models import build as models
from relora_ds.planning import rehearsal
from relora_ds.planning.plan import Phase
from tests.distributed import common
from tests.distributed.pool import run
from tests.products import Operations, counter
from tests.wire import Wire

SIZES = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
RANK, MICRO_BATCH, LENGTH = 4, 2, 24
FORMS = {
    "full": None,
    "split": {"linear": "split"},
    "merged": {"linear": "merged", "keep_merged": False},
    "kept": {"linear": "merged", "keep_merged": True},
}


def architecture() -> LlamaConfig:
    return LlamaConfig(**SIZES, bos_token_id=None, eos_token_id=None)


def work_of_an_update(form: str, accumulation: int) -> dict[str, Any]:
    """The second of two updates: its operations on this rank, its collectives by kind, and their bytes."""
    model = models.build(architecture(), attention="eager", dtype=torch.float32, device=torch.device("cpu")).train()
    relora = None if FORMS[form] is None else {"rank": RANK, "restart_every": 1000, "restart_warmup": 0, **FORMS[form]}
    config = common.deepspeed_config(accumulation=accumulation, reduce_bucket_size=10_000_000)
    del config["optimizer"]
    config["train_batch_size"] = MICRO_BATCH * accumulation * dist.get_world_size()
    groups = None if relora else lora.param_groups(model)
    engine, *_ = relora_ds.initialize(
        model=model, config=config, optimizer=adamw(Optimizer()), relora=relora, model_parameters=groups
    )
    for update in range(2):
        with ExitStack() as watched:
            counted, wire = counter(), Wire()
            if update == 1:
                watched.enter_context(counted)
                watched.enter_context(wire)
            for micro in range(accumulation):
                generator = torch.Generator().manual_seed(micro)
                ids = torch.randint(0, SIZES["vocab_size"], (MICRO_BATCH, LENGTH), generator=generator)
                engine.backward(engine(input_ids=ids, labels=ids).loss)
                engine.step()
    result = {
        "operations": counted.get_total_flops(),
        "calls": dict(sorted(wire.calls.items())),
        "sent": wire.sent_bytes,
        "trainable": sum(p.numel() for p in engine.module.parameters() if p.requires_grad),
    }
    common.end(engine)
    return result


@pytest.mark.parametrize("form", FORMS)
def test_work_is_what_the_cost_model_says(form: str) -> None:
    """Gradients are reduced, and parameters gathered, once per update, however many micro batches it has."""
    settings = None if FORMS[form] is None else ReLoRA(rank=RANK, **FORMS[form])
    rehearsed = rehearsal.build(architecture(), dtype=torch.float32, settings=settings, attention="eager", on_cuda=False)
    phase, calls = Phase(settings, rehearsed, LENGTH), []
    for accumulation in (1, 4):
        results = run(2, work_of_an_update, form, accumulation)
        tokens = MICRO_BATCH * LENGTH * accumulation * 2
        expected = phase.flops(tokens, per_pass=MICRO_BATCH * LENGTH, recomputes=False, accumulation=accumulation)
        assert sum(result["operations"] for result in results) == pytest.approx(expected, rel=0.01)
        told = formulas.update_bytes(
            results[0]["trainable"],
            world_size=2,
            gradient_width=4,
            parameter_width=4,
            stage=2,
            accumulation=accumulation,
            way="owner",
        )
        assert sum(result["sent"] for result in results) / 2 == pytest.approx(told.gradient + told.parameters, rel=0.02)
        calls.append(results[0]["calls"])
    assert calls[0] == calls[1]
    assert sum(calls[0].values()) <= 6, (
        "one exchange and one gather for each group of parameters, of which there are three at most"
    )


def operations_of_a_restart(num_layers: int) -> int:
    """On this rank, after an update."""
    sizes = LlamaConfig(**{**SIZES, "num_hidden_layers": num_layers}, bos_token_id=None, eos_token_id=None)
    model = models.build(sizes, attention="eager", dtype=torch.float32, device=torch.device("cpu")).train()
    config = common.deepspeed_config()
    del config["optimizer"]
    relora = {"rank": RANK, "restart_every": 1000, "restart_warmup": 0, "frozen": {"dtype": "bf16"}}
    engine, *_ = relora_ds.initialize(model=model, config=config, optimizer=adamw(Optimizer()), relora=relora)
    common.train_update(engine, 0)
    with Operations() as operations:
        engine.optimizer.restart()
    common.end(engine)
    return operations.num


def test_a_restart_asks_little_of_whoever_launches_it() -> None:
    """On a GPU each operation costs a launch, however small the layer: no loop over digits, or over rows, runs through every one."""
    few, many = (run(2, operations_of_a_restart, num_layers) for num_layers in (2, 6))
    linears = 7 * (6 - 2)
    for less, more in zip(few, many, strict=True):
        assert (more - less) / linears <= 110


def losses_of_a_run(keep: bool, folder: str) -> tuple[list[float], list[float]]:
    """Of six updates with two restarts, from update 3 on once more from a checkpoint."""
    model = models.build(architecture(), attention="eager", dtype=torch.float32, device=torch.device("cpu")).train()
    relora = {"rank": RANK, "restart_every": 2, "restart_warmup": 0, "linear": "merged", "keep_merged": keep}
    config = common.deepspeed_config(accumulation=2, lr=0.01)
    del config["optimizer"]
    engine, *_ = relora_ds.initialize(model=model, config=config, optimizer=adamw(Optimizer(lr=0.01)), relora=relora)

    def train(updates: range) -> list[float]:
        losses = []
        for micro in range(2 * updates.start, 2 * updates.stop):
            ids = torch.randint(0, SIZES["vocab_size"], (MICRO_BATCH, LENGTH), generator=torch.Generator().manual_seed(micro))
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            losses.append(float(loss))
        return losses

    first = train(range(3))
    engine.save_checkpoint(folder, tag="three")
    rest = train(range(3, 6))
    ids = torch.zeros(MICRO_BATCH, LENGTH, dtype=torch.int64)
    engine(input_ids=ids, labels=ids)  # keeps what the checkpoint is about to change
    engine.load_checkpoint(folder, tag="three")
    again = train(range(3, 6))
    common.end(engine)
    return first + rest, again


def test_what_is_kept_never_goes_stale(tmp_path: Path) -> None:
    """Updates, restarts and checkpoints write the factors where these do not notice; the run is the same to the bit."""
    (kept, again), (formed, _) = (run(2, losses_of_a_run, keep, str(tmp_path / str(keep)))[0] for keep in (True, False))
    assert kept == formed
    assert again == kept[6:]
