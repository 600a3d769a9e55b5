"""What a user froze stays as it is, through updates, restarts and a checkpoint; and what of a model can get no factors is said."""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import relora_ds
from relora_ds.method.lora import relora_layers
from tests.distributed import common
from tests.distributed.pool import run
from tests.distributed.test_training import train_here

PROJECTION = "model.layers.0.self_attn.q_proj"
HELD = (PROJECTION, "model.layers.1.mlp.up_proj", "model.layers.1.input_layernorm", "model.embed_tokens")
UPDATES = 5
"""Restarts after the second and the fourth."""


def held_llama() -> nn.Module:
    model = common.tiny_llama()
    for name in HELD:
        model.get_submodule(name).requires_grad_(False)
    return model


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """By the names that they have without factors; those of wrapped layers merged."""
    merged = {f"{name}.weight": layer.merged() for name, layer in relora_layers(model)}
    return {
        name: value.detach().clone()
        for name, value in {**dict(model.named_parameters()), **merged}.items()
        if "lora_" not in name
    }


def engine_of(model: nn.Module, given: str, **settings: Any) -> Any:
    """An engine whose optimizer's groups hold what is frozen, too, where ``given`` says how they come."""
    groups: dict[str, Any] = {}
    if given == "parameters":
        groups["model_parameters"] = list(model.parameters())
    elif given == "optimizer":
        groups["optimizer"] = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = relora_ds.initialize(model=model, config=common.deepspeed_config(), **groups, **settings)
    return engine


def train_held(given: str, relora: dict[str, Any], folder: str) -> tuple[list[str], list[str], float, float]:
    """Names of the layers under factors; names of what changed; the loss after a checkpoint, and that of an engine that loaded it."""
    model = held_llama()
    before = weights(model)
    engine = engine_of(model, given, relora=relora)
    for index in range(UPDATES):
        common.train_update(engine, index)
    assert engine.optimizer.restarts == 2
    changed = [name for name, value in weights(model).items() if not torch.equal(value, before[name])]
    engine.save_checkpoint(folder)
    loss = common.train_update(engine, UPDATES)
    common.end(engine)
    resumed = engine_of(held_llama(), given, relora=relora)
    resumed.load_checkpoint(folder)
    again = common.train_update(resumed, UPDATES)
    layers = [name for name, _ in relora_layers(resumed.module)]
    common.end(resumed)
    return layers, changed, loss, again


@pytest.mark.parametrize(
    ("world_size", "given", "frozen"),
    [(1, "nothing", {}), (2, "parameters", {}), (2, "optimizer", {"dtype": "int8", "master": "sharded"})],
)
def test_what_is_frozen_keeps_its_bits(world_size: int, given: str, frozen: dict[str, Any], tmp_path: Path) -> None:
    relora = {"rank": 3, "restart_every": 2, "restart_warmup": 0, "frozen": frozen}
    for layers, changed, loss, again in run(world_size, train_held, given, relora, str(tmp_path)):
        everything = {name for name, _ in common.tiny_llama().named_parameters()}
        held = {f"{name}.weight" for name in HELD}
        assert set(changed) == everything - held
        linears = {name.removesuffix(".weight") for name in everything if name.endswith("_proj.weight")}
        assert set(layers) == linears - set(HELD)
        assert loss == again


def train_full_rank(given: str) -> list[str]:
    model = held_llama()
    before = weights(model)
    engine = engine_of(model, given)
    common.train_update(engine, 0)
    changed = [name for name, value in weights(model).items() if not torch.equal(value, before[name])]
    common.end(engine)
    return changed


def test_without_factors_as_well() -> None:
    held = {f"{name}.weight" for name in HELD}
    everything = {name for name, _ in common.tiny_llama().named_parameters()}
    assert [set(changed) for changed in run(2, train_full_rank, "parameters")] == [everything - held] * 2


def told_of_mixtral() -> list[str]:
    sizes = {"vocab_size": common.VOCAB, "hidden_size": 20, "intermediate_size": 36, "num_hidden_layers": 1}
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = common.build(model, {"restart_every": 2, "restart_warmup": 0})
    common.end(engine)
    return [str(warning.message) for warning in caught if "full-rank" in str(warning.message)]


def test_rank_0_says_what_can_get_no_factors() -> None:
    first, second = run(2, told_of_mixtral)
    assert second == []
    (said,) = first
    assert (
        "of the parameters can get no factors and stay full-rank: 3-D parameters (model.layers.*.mlp.experts.gate_up_proj" in said
    )


def train_and_listen(content: dict[str, Any]) -> tuple[int, str]:
    with redirect_stderr(io.StringIO()) as said:
        code = train_here(content)
    return code, said.getvalue()


def test_a_run_of_a_mixture_with_weights_that_are_frozen_by_construction(settings: dict[str, Any]) -> None:
    """The experts' bias of AFMoE is a frozen parameter, for which there is no master: a change of phase leaves it alone."""
    settings["model"]["config"] = {
        "model_type": "afmoe", "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2, "num_dense_layers": 1,
        "max_position_embeddings": 64, "head_dim": 8,
    }  # fmt: skip
    settings["relora"] |= {"warm_start": 2, "restart_every": 3, "restart_warmup": 1}
    settings["train"]["updates"] = 6
    settings["wandb"] = {"mode": "disabled"}
    ((code, said),) = run(1, train_and_listen, settings)
    assert code == 0
    assert "of the parameters can get no factors and stay full-rank: 3-D parameters (model.layers.*.mlp.experts" in said
