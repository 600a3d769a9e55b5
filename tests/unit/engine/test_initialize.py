"""What initialize() does with parameter groups, and what it refuses, before DeepSpeed is asked."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import deepspeed
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import relora_ds
from relora_ds.engine import initialize as engines
from relora_ds.engine.initialize import regroup
from relora_ds.errors import ConfigError
from relora_ds.launch import libraries, process_group
from relora_ds.method.lora import param_groups, wrap


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 4))


def names_in(net: nn.Module, groups: list[dict]) -> list[list[str]]:
    names = {id(p): name for name, p in net.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in groups]


def test_deepspeed_is_told_which_gpu_is_this_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    named = SimpleNamespace(device_rank=0)

    def stop(args: object, *_: object, **__: object) -> NoReturn:
        raise RuntimeError(args is named)

    monkeypatch.setattr(libraries, "naming_gpu", lambda args: named)
    monkeypatch.setattr(process_group, "require", lambda: None)
    monkeypatch.setattr(deepspeed, "initialize", stop)
    for relora in (None, {"rank": 2, "alpha": 4, "targets": ["0"]}):
        with pytest.raises(RuntimeError, match="True"):
            relora_ds.initialize(model=model(), config={"train_batch_size": 1, "zero_optimization": {"stage": 2}}, relora=relora)


@pytest.mark.parametrize(("version", "rank", "times"), [("0.15.4", 0, 1), ("0.15.4", 1, 0), ("0.19.8", 0, 0)])
def test_rank_0_warns_of_a_deepspeed_that_was_not_tried(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, version: str, rank: int, times: int
) -> None:
    monkeypatch.setattr(deepspeed, "__version__", version)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
    engines._route(SimpleNamespace(optimizer=None))  # an engine that is none of ZeRO's is left as it is
    assert sum(f"DeepSpeed {version} was not tried" in str(warning.message) for warning in recwarn) == times


def test_factors_follow_the_group_of_their_weight() -> None:
    net = model()
    groups = [
        {"params": list(net[0].parameters()), "lr": 1.0, "betas": (0.1, 0.2)},
        {"params": list(net[1:].parameters()), "lr": 2.0},
    ]
    wrap(net, rank=2, alpha=4, targets=["0", "2"])
    new = regroup(net, groups, None)
    assert names_in(net, new) == [
        ["0.bias"],
        ["0.lora_A", "0.lora_B"],
        ["1.weight", "1.bias", "2.bias", "3.weight", "3.bias"],
        ["2.lora_A", "2.lora_B"],
    ]
    assert [(group["lr"], group.get("name")) for group in new] == [(1.0, None), (1.0, "lora"), (2.0, None), (2.0, "lora")]
    assert new[1]["betas"] == (0.1, 0.2)


def test_factors_of_an_embedding_follow_its_group() -> None:
    net = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12))
    groups = [{"params": [net[0].weight], "lr": 1.0}, {"params": list(net[1:].parameters()), "lr": 2.0}]
    wrap(net, rank=2, alpha=4, targets=["0", "2"])
    new = regroup(net, groups, 5.0)
    assert names_in(net, new) == [["0.lora_A", "0.lora_B"], ["1.weight", "1.bias", "2.bias"], ["2.lora_A", "2.lora_B"]]
    assert [group["lr"] for group in new] == [5.0, 2.0, 5.0]


def test_lora_lr_replaces_the_group_rate() -> None:
    net = model()
    groups = [{"params": list(net.parameters()), "lr": 1.0}]
    wrap(net, rank=2, alpha=4, targets=["0"])
    assert [group["lr"] for group in regroup(net, groups, 5.0)] == [1.0, 5.0]


def test_groups_that_hold_the_factors_already() -> None:
    net = wrap(model(), rank=2, alpha=4, targets=["0"])
    groups = [{"params": [p for p in net.parameters() if p.requires_grad], "name": "mine"}]
    assert names_in(net, regroup(net, groups, None)) == names_in(net, groups)


def test_what_would_not_reach_factors_in_groups_of_the_users_is_refused() -> None:
    """Their rate was neither ``lora_lr`` nor re-warmed."""
    net = wrap(model(), rank=2, alpha=4, targets=["0"])
    groups = [{"params": [p for p in net.parameters() if p.requires_grad], "lr": 1.0}]
    with pytest.raises(ConfigError, match=r"^lora_lr=5\.0: the factors are in groups of yours; give these groups their rate"):
        regroup(net, groups, 5.0)
    settings = {"rank": 2, "restart_every": 5, "restart_warmup": 1, "rewarm": "factors"}
    for given in ({"model_parameters": groups}, {"optimizer": torch.optim.AdamW(groups)}):
        with pytest.raises(ConfigError, match=r"^relora\.rewarm='factors': factors are in a group that is not theirs alone"):
            relora_ds.initialize(model=net, config=ZERO_2, relora=settings, **given)
    engines._refuse_unnamed(net, param_groups(net))


def test_a_target_outside_all_groups_is_refused() -> None:
    net = model()
    groups = [{"params": list(net[1:].parameters())}]
    wrap(net, rank=2, alpha=4, targets=["0", "2"])
    with pytest.raises(ConfigError, match=r"model_parameters='0': this layer is a target"):
        regroup(net, groups, None)


ZERO_2 = {"train_batch_size": 1, "zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW", "params": {}}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": None}, "model=None: is required"),
        ({"relora": {"rnak": 4}}, "relora.rnak=4: unknown key; did you mean 'rank'?"),
        ({"relora": {"rank": 4, "warm_start": 5}}, "relora.warm_start=5"),
        ({"relora": {"rank": 40}}, "relora.rank=40: larger than layer '3'"),
        ({"relora": {"rank": 2, "targets": ["q_proj"]}}, "relora.targets='q_proj': matches no linear layer"),
        ({"config": {**ZERO_2, "zero_optimization": {"stage": 3}}}, "deepspeed.zero_optimization.stage=3"),
        ({"config": {"train_batch_size": 1}}, "deepspeed.zero_optimization.stage=None"),
        ({"config": "no/such/file.json"}, "deepspeed='no/such/file.json': no such file"),
        ({"config": {**ZERO_2, "tensor_parallel": {"autotp_size": 2}}}, "deepspeed.tensor_parallel.autotp_size=2"),
        ({"mpu": object()}, "pipeline and tensor parallelism are not supported"),
    ],
)
def test_refusals_in_one_line(arguments: dict, message: str) -> None:
    arguments = {"model": model(), "config": ZERO_2, "relora": {"rank": 2, "restart_every": 5, "restart_warmup": 0}, **arguments}
    with pytest.raises(ConfigError) as error:
        relora_ds.initialize(**arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not torch.distributed.is_initialized()


def test_a_configuration_may_be_named_as_deepspeed_lets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By --deepspeed_config, as most scripts have it, or by the older name of the argument; DeepSpeed gets it in one place."""
    seen: list[Any] = []

    def stop(args: Any, *_: object, config: dict[str, Any], **others: object) -> NoReturn:
        seen.append(
            (args and args.deepspeed_config, args and args.local_rank, config["zero_optimization"]["stage"], others.keys())
        )
        raise RuntimeError

    monkeypatch.setattr(process_group, "require", lambda: None)
    monkeypatch.setattr(deepspeed, "initialize", stop)
    (tmp_path / "ds.json").write_text(json.dumps(ZERO_2))
    args = SimpleNamespace(deepspeed_config=str(tmp_path / "ds.json"), local_rank=0)
    for given in ({"args": args}, {"config_params": ZERO_2}):
        with pytest.raises(RuntimeError):
            relora_ds.initialize(model=model(), relora={"rank": 2, "targets": ["0"]}, **given)
    assert seen == [(None, 0, 2, {"collate_fn"}), (None, None, 2, {"collate_fn"})]
    assert args.deepspeed_config == str(tmp_path / "ds.json"), "the user's own"
    with pytest.raises(ConfigError, match=r"^config=.*: args\.deepspeed_config='.*ds\.json' is given, too; leave one"):
        relora_ds.initialize(args, model(), config=ZERO_2)
    with pytest.raises(ConfigError, match=r"^config=None: is required; pass DeepSpeed's JSON file"):
        relora_ds.initialize(model=model())


def test_a_model_under_peft_is_refused_until_it_is_merged() -> None:
    """PEFT freezes what it wraps and adds linear layers of its own, which would be all that is left to wrap."""
    arguments = {"config": ZERO_2, "relora": {"rank": 2, "restart_every": 5, "restart_warmup": 0}}
    adapted = get_peft_model(model(), LoraConfig(r=4, target_modules=["0", "2"]))
    with pytest.raises(ConfigError, match=r"^model='PeftModel': holds PEFT's adapters; merge them with merge_and_unload"):
        relora_ds.initialize(model=adapted, **arguments)
    with pytest.raises(
        ConfigError, match=r"^relora\.targets='all-linear': all its layers .* are frozen .*; call requires_grad_\(True\)"
    ):
        relora_ds.initialize(model=adapted.merge_and_unload(), **arguments)


def test_a_stepped_optimizer_and_a_ready_scheduler_are_refused() -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(ConfigError, match="lr_scheduler='ConstantLR'.*pass lambda optimizer: scheduler"):
        relora_ds.initialize(
            model=net, optimizer=optimizer, lr_scheduler=scheduler, config=ZERO_2, relora={"rank": 2, "targets": ["0"]}
        )
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    with pytest.raises(ConfigError, match="has already taken a step"):
        relora_ds.initialize(model=net, optimizer=optimizer, config=ZERO_2, relora={"rank": 2, "targets": ["0"]})
