"""The change of phase gives back all that the full-rank engine held, before the LoRA engine is built."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

import relora_ds
from relora_ds.config import Optimizer, parse
from relora_ds.engine.initialize import adamw
from relora_ds.engine.release import release
from relora_ds.errors import EXIT_DONE
from relora_ds.launch import places
from relora_ds.method import lora
from relora_ds.method.targets import find_targets
from relora_ds.training import phases
from relora_ds.training.preflight import check
from relora_ds.training.trainer import Trainer
from tests.distributed import common
from tests.distributed.pool import run
from tests.distributed.test_training import train_here
from tests.memory import live_bytes

CPU = torch.device("cpu")
WARM_START = 2
INT8 = {"dtype": "int8", "group_size": 16}


@pytest.fixture
def content(settings: dict[str, Any]) -> dict[str, Any]:
    """A warm start of two updates, then six with factors; larger layers, so that what is kept would show."""
    content = copy.deepcopy(settings)
    content["model"]["config"] |= {"hidden_size": 64, "intermediate_size": 160}
    content["relora"] = {"rank": 2, "alpha": 8, "warm_start": WARM_START, "restart_every": 4, "restart_warmup": 1}
    content["train"] = {"updates": 8, "global_batch": 4, "micro_batch": 1}
    content["wandb"] = {"mode": "disabled"}
    return content


def trainer_of(content: dict[str, Any]) -> Trainer:
    place = places.discover()
    assert place is not None
    return Trainer(check(parse(content), Path("recipe.yaml"), place.world_size), place, CPU)


def end(trainer: Trainer) -> None:
    trainer.close(exit_code=1)
    release(trainer.engine)


def what_lives_on(content: dict[str, Any]) -> dict[str, bool]:
    """What of the full-rank engine is alive when the next engine is about to be built."""
    trainer = trainer_of(content)
    for update in range(1, WARM_START + 1):
        trainer.update(update, False)
    zero = trainer.engine.optimizer
    refs = {
        "engine": weakref.ref(trainer.engine),
        "optimizer": weakref.ref(zero),
        "inner optimizer": weakref.ref(zero.optimizer),
        "master": weakref.ref(zero.single_partition_of_fp32_groups[0]),
        "moment": weakref.ref(zero.optimizer.state[zero.single_partition_of_fp32_groups[0]]["exp_avg"]),
        "flat weights": weakref.ref(zero.bit16_groups_flat[0]),
    }
    del zero
    found: dict[str, bool] = {}
    build = phases.lora_engine

    def watched(*args: Any) -> Any:
        found.update({name: ref() is not None for name, ref in refs.items()})
        return build(*args)

    phases.lora_engine = watched  # type: ignore[assignment]
    try:
        trainer.enter_phase(WARM_START + 1)
    finally:
        phases.lora_engine = build
    end(trainer)
    return found


def test_nothing_of_the_old_engine_is_left_when_the_new_one_is_built(content: dict[str, Any]) -> None:
    for found in run(2, what_lives_on, content):
        assert found and not any(found.values()), found


def full_weights_left(content: dict[str, Any]) -> list[str]:
    """The weights of target layers whose full-rank form is alive, although nothing was collected since, when all are stored."""
    trainer = trainer_of(content)
    for update in range(1, WARM_START + 1):
        trainer.update(update, False)
    refs = {name: weakref.ref(layer.weight) for name, layer in find_targets(trainer.engine.module, "all-linear").items()}
    alive: list[str] = []
    build, wrap_layers = phases.lora_engine, lora.wrap_layers

    def wrapped(*args: Any, **how: Any) -> None:
        gc.disable()
        wrap_layers(*args, **how)

    def watched(*args: Any) -> Any:
        alive.extend(name for name, ref in refs.items() if ref() is not None)
        return build(*args)

    phases.lora_engine, lora.wrap_layers = watched, wrapped  # type: ignore[assignment]
    try:
        trainer.enter_phase(WARM_START + 1)
    finally:
        phases.lora_engine, lora.wrap_layers = build, wrap_layers
        gc.enable()
    end(trainer)
    assert refs
    return alive


def test_a_layers_full_weight_goes_as_soon_as_it_is_stored_in_another_form(content: dict[str, Any]) -> None:
    content["relora"]["frozen"] = INT8
    assert run(2, full_weights_left, content) == [[], []]


def bytes_after(content: dict[str, Any], updates: int) -> int:
    """Live bytes of this rank after so many updates of a run, beside what there was before; leaves a checkpoint in its folder."""
    before = live_bytes()
    trainer = trainer_of(content)
    for update in range(trainer.done.update + 1, updates + 1):
        trainer.enter_phase(update)
        trainer.update(update, False)
    here = live_bytes() - before
    trainer.save(wait=True)
    end(trainer)
    return here


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "frozen"),
    [
        ("fp32", {}),
        *(common.long(*case) for case in [("bf16", {}), ("fp32", INT8)]),
        ("bf16", {**INT8, "master": "sharded"}),
    ],
    ids=["fp32", "bf16", "int8", "int8 and a sharded master"],
)
def test_as_many_bytes_as_the_same_run_resumed(content: dict[str, Any], stage: int, dtype: str, frozen: dict[str, Any]) -> None:
    """A run that changed its phase, and the same run resumed in the LoRA phase, one update later each: 2% for the odds and ends."""
    content["deepspeed"] = {"zero_optimization": {"stage": stage}, **({"bf16": {"enabled": True}} if dtype == "bf16" else {})}
    content["relora"]["frozen"] = frozen
    changed = run(2, bytes_after, content, WARM_START + 1)
    resumed = run(2, bytes_after, content, WARM_START + 2)
    for over_the_change, alone in zip(changed, resumed, strict=True):
        assert over_the_change == pytest.approx(alone, rel=0.02)


def updates_over_a_collection(content: dict[str, Any]) -> list[bool]:
    """Two updates of the LoRA phase, a collection, two more; whether the embedding's master was still found, and moved."""
    trainer = trainer_of(content)
    for update in range(1, WARM_START + 3):
        trainer.enter_phase(update)
        trainer.update(update, False)
    embedding = trainer.engine.module.get_input_embeddings().weight
    gc.collect()
    found = [getattr(embedding, "_hp_mapping", None) is not None]
    before = embedding.detach().clone()
    for update in range(WARM_START + 3, WARM_START + 5):
        trainer.update(update, False)
    found.append(not torch.equal(before, embedding))
    end(trainer)
    return found


def test_the_new_engine_outlives_the_old_ones_collection(content: dict[str, Any]) -> None:
    """The embedding is the same parameter in both engines: what ends the old one must not take its address from the new one."""
    content["relora"] |= {"restart_every": 6, "restart_warmup": 0}
    results = run(2, updates_over_a_collection, content)
    assert any(found[0] for found in results), "some rank owns a piece of the embedding"
    assert all(found[1] for found in results)


def own_warm_start() -> dict[str, Any]:
    """A script's own full-rank training, then relora_ds on the same module: what lives on, and whether it trains."""
    model = common.tiny_llama()
    config = common.deepspeed_config()
    del config["optimizer"]
    engine = deepspeed.initialize(model=model, optimizer=adamw(Optimizer(lr=1e-2)), config=config)[0]
    common.train_update(engine, 0)
    zero = weakref.ref(engine.optimizer)
    release(engine)
    del engine
    gc.collect()
    alive = zero() is not None
    engine, *_ = relora_ds.initialize(
        model=model, config=common.deepspeed_config(), relora={"rank": 3, "restart_every": 4, "restart_warmup": 1}
    )
    losses = [common.train_update(engine, 0) for _ in range(6)]
    common.end(engine)
    return {"alive": alive, "losses": losses}


def test_a_script_of_ones_own_can_go_on_with_the_module() -> None:
    for result in run(2, own_warm_start):
        assert not result["alive"]
        assert result["losses"][-1] < result["losses"][0]


def test_a_model_of_which_only_factors_go_on(content: dict[str, Any]) -> None:
    """OLMo's norms have no weights, and its vocabulary gets factors here: nothing is carried over, and no other rate is logged."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    content["model"]["config"] = {"model_type": "olmo", **sizes, **tokens}
    content["relora"] |= {"targets": common.WITH_VOCABULARY, "keep_moments": True, "restart_every": 2}
    content["train"]["updates"] = WARM_START + 3
    assert run(1, train_here, content) == [EXIT_DONE]
    lines = (json.loads(line) for line in (Path(content["run"]["dir"]) / "metrics.jsonl").read_text().splitlines())
    (*_, last) = (line for line in lines if "loss" in line)
    assert last["restarts"] == 1 and last["lr"] == last["lora_lr"] == 0.0
