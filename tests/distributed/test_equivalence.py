"""ReLoRA on ZeRO against plain PyTorch, and against itself at other world sizes, stages and accumulations."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_grad
from torch import nn

import relora_ds
from relora_ds.ds_config import fit as ds_config
from relora_ds.errors import ConfigError
from relora_ds.method.lora import initial_A, relora_layers
from tests.distributed import common
from tests.distributed.pool import run

LR, EVERY, RAMP, RANK, ALPHA, SEED = 1e-2, 4, 2, 3, 32.0, 5
UPDATES = 11
"""Two restarts, and three updates after the second."""


class PlainLoRA(nn.Module):
    """LoRA on a linear layer, written anew for this test."""

    def __init__(self, weight: torch.Tensor, name: str) -> None:
        super().__init__()
        self.register_buffer("frozen", weight.detach().clone())
        self.name = name
        self.down = nn.Parameter(initial_A(RANK, weight.shape[1], name=name, seed=SEED, restart=0))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.frozen) + (ALPHA / RANK) * (x @ self.down.T @ self.up.T)


class PlainEmbedding(PlainLoRA):
    """LoRA on an embedding: rows of the whole sum."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return (self.frozen + (ALPHA / RANK) * (self.up @ self.down))[ids]


def smallest_to_zero(values: torch.Tensor, by: torch.Tensor, ratio: float) -> None:
    """Zeroes floor(ratio n) entries of ``values``: those where ``by`` is smallest; of equals, the later ones."""
    keep = torch.sort(by.flatten().abs(), descending=True, stable=True).indices[: by.numel() - math.floor(ratio * by.numel())]
    mask = torch.zeros(by.numel(), dtype=torch.bool)
    mask[keep] = True
    values.mul_(mask.view_as(values))


def plain_relora(reset: dict[str, Any], with_vocabulary: bool = False) -> dict[str, Any]:
    """One process, plain PyTorch: the algorithm of the paper, step by step, on the whole global batch."""
    model = common.tiny_llama()
    adapters = []
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.Linear, nn.Embedding)) and (with_vocabulary or name not in ("lm_head", "model.embed_tokens")):
            parent = model.get_submodule(name.rpartition(".")[0])
            adapter = (PlainLoRA if isinstance(module, nn.Linear) else PlainEmbedding)(module.weight, name)
            setattr(parent, name.rpartition(".")[2], adapter)
            adapters.append(adapter)
    factors = [p for adapter in adapters for p in (adapter.down, adapter.up)]
    others = [p for p in model.parameters() if all(p is not factor for factor in factors)]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": factors}], lr=LR, weight_decay=0.0)
    losses = []
    for update in range(1, UPDATES + 1):
        since = (update - 1) % EVERY
        for group in optimizer.param_groups:
            group["lr"] = LR if update <= EVERY else LR * min(1.0, since / RAMP)
        ids = common.batch(update % 2)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if update % EVERY == 0:
            with torch.no_grad():
                for adapter in adapters:
                    adapter.frozen += (ALPHA / RANK) * (adapter.up @ adapter.down)
                    shape = adapter.down.shape
                    adapter.down.copy_(initial_A(*shape, name=adapter.name, seed=SEED, restart=update // EVERY))
                    adapter.up.zero_()
                for factor in factors:
                    state = optimizer.state[factor]
                    first, second = state["exp_avg"], state["exp_avg_sq"]
                    if reset["kind"] == "full":
                        first.zero_(), second.zero_()
                    else:
                        chosen_by = first.clone()
                        smallest_to_zero(first, first.clone(), reset["ratio"])
                        smallest_to_zero(second, chosen_by if reset["mask"] == "joint" else second.clone(), reset["ratio"])
                    if reset["restart_bias_correction"]:
                        state["step"].zero_()
    return {"losses": losses, "weights": {adapter.name: adapter.frozen.clone() for adapter in adapters}}


def zero_relora(reset: dict[str, Any], stage: int, accumulation: int, with_vocabulary: bool = False) -> dict[str, Any]:
    """The same through relora_ds.initialize, in the loop that a user of DeepSpeed has."""
    config = common.deepspeed_config(lr=LR, stage=stage, accumulation=accumulation)
    engine, optimizer, _, _ = relora_ds.initialize(
        model=common.tiny_llama(),
        config=config,
        relora={
            "rank": RANK, "alpha": ALPHA, "restart_every": EVERY, "restart_warmup": RAMP, "reset": reset,
            "targets": common.WITH_VOCABULARY if with_vocabulary else "all-linear",
        },
        seed=SEED,
    )  # fmt: skip
    losses = [common.train_update(engine, update % 2) for update in range(1, UPDATES + 1)]
    result = {
        "losses": losses,
        "restarts": optimizer.restarts,
        "weights": {name: layer.weight.values.clone() for name, layer in relora_layers(engine.module)},
    }
    common.end(engine)
    return result


RESETS: dict[str, dict[str, Any]] = {
    "default": {"kind": "magnitude", "ratio": 0.99, "mask": "joint", "restart_bias_correction": True},
    "joint": {"kind": "magnitude", "ratio": 0.9, "mask": "joint", "restart_bias_correction": False},
    "the paper's": {"kind": "magnitude", "ratio": 0.9, "mask": "independent", "restart_bias_correction": False},
    "full": {"kind": "full", "restart_bias_correction": True},
}


@pytest.mark.parametrize(
    ("reset", "stage", "accumulation", "with_vocabulary"),
    [
        ("default", 2, 1, False),
        ("joint", 2, 1, False),
        ("full", 2, 1, False),
        ("default", 1, 1, False),
        ("default", 2, 3, False),
        ("default", 1, 2, False),
        ("default", 2, 1, True),
    ],
)
def test_zero_equals_a_plain_loop(reset: str, stage: int, accumulation: int, with_vocabulary: bool) -> None:
    """Two ranks, fp32, over two restarts: only the order of sums differs, so 1e-5 holds over these few updates."""
    plain = plain_relora(RESETS[reset], with_vocabulary)
    assert ("model.embed_tokens" in plain["weights"]) == ("lm_head" in plain["weights"]) == with_vocabulary
    for result in run(2, zero_relora, RESETS[reset], stage, accumulation, with_vocabulary):
        assert result["restarts"] == 2
        assert result["losses"] == pytest.approx(plain["losses"], rel=1e-5)
        assert plain["losses"][-1] < plain["losses"][0]
        for name, weight in plain["weights"].items():
            assert torch.allclose(result["weights"][name], weight, rtol=1e-4, atol=1e-5), name


def test_zero_equals_a_plain_loop_in_the_papers_way() -> None:
    """Independent masks, until the second restart. The first leaves entries of A with m != 0 and v = 0, and with B = 0 their gradient
    is 0: Adam divides by its epsilon alone, and magnifies the order of sums a hundred million times in what the second one picks."""
    plain = plain_relora(RESETS["the paper's"])
    for result in run(2, zero_relora, RESETS["the paper's"], 2, 1):
        assert result["losses"][: 2 * EVERY] == pytest.approx(plain["losses"][: 2 * EVERY], rel=1e-5)


@pytest.mark.long
def test_world_size_and_accumulation_change_nothing() -> None:
    """A user's loop with accumulation 1 and 4 (3 rows a micro batch), at 1, 2 and 4 ranks: the same losses."""
    losses = [
        run(world, zero_relora, RESETS["default"], 2, steps)[0]["losses"] for world, steps in ((1, 1), (1, 4), (2, 1), (4, 1))
    ]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)


def train_architecture(kind: str) -> dict[str, Any]:
    model = {"gpt2": common.tiny_gpt2, "neox": common.tiny_neox}[kind]()
    engine = common.build(model, {"restart_every": 3, "restart_warmup": 1})
    losses = [common.train_update(engine, 0) for _ in range(8)]
    result = {
        "losses": losses,
        "restarts": engine.optimizer.restarts,
        "layers": [name for name, _ in relora_layers(engine.module)],
    }
    common.end(engine)
    return result


@pytest.mark.parametrize(("kind", "layers"), [("gpt2", 4), ("neox", 4)])
def test_other_architectures_train_and_restart(kind: str, layers: int) -> None:
    """GPT-2 (Conv1D, tied head, biases) and GPT-NeoX (fused attention, biases)."""
    for result in run(2, train_architecture, kind):
        assert result["restarts"] == 2
        assert len(result["layers"]) == 2 * layers
        assert result["losses"][-1] < result["losses"][0] - 0.3


def refuse_round_robin() -> list[str]:
    """By its key, and, should DeepSpeed ever lay parameters out in another order by itself, by the masters' values."""
    messages = []
    for hidden in (False, True):
        config = common.deepspeed_config(round_robin_gradients=True)
        rules = ds_config.refuse_unsupported
        if hidden:
            ds_config.refuse_unsupported = lambda content: None
        try:
            relora_ds.initialize(
                model=common.tiny_llama(), config=config, relora={"rank": RANK, "restart_every": 3, "restart_warmup": 0}
            )
        except ConfigError as error:
            messages.append(str(error))
        finally:
            ds_config.refuse_unsupported = rules
    return messages


def test_wrong_fragment_addresses_are_refused() -> None:
    """With round_robin_gradients DeepSpeed's fragment addresses point at other parameters: restarts would corrupt them."""
    for by_key, by_value in run(2, refuse_round_robin):
        assert "deepspeed.zero_optimization.round_robin_gradients" in by_key
        assert "is not where its address says" in by_value


class TwiceUsed(nn.Module):
    """A language model with all that makes gradients arrive oddly: a tied head, biases, and one block used twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(common.VOCAB, 20)
        self.block = nn.Sequential(nn.Linear(20, 33), nn.GELU(), nn.Linear(33, 20))
        self.norm = nn.LayerNorm(20)
        self.head = nn.Linear(20, common.VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        x = x + self.block(self.norm(x))
        x = x + self.block(self.norm(x))
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradients_of_zero_and_ddp(stage: int) -> dict[str, float]:
    """The largest difference between ZeRO's reduced gradients and DDP's, relative to the largest gradient, per parameter."""
    relora = {"rank": RANK, "restart_every": 2, "restart_warmup": 0}
    engine = common.build(TwiceUsed(), relora, stage=stage, lr=1e-2)
    for step in range(3):  # past a restart, so that frozen weights are merged ones and B is not zero
        loss = engine(common.my_rows(common.batch(step)))
        engine.backward(loss)
        engine.step()
    twin = copy.deepcopy(engine.module)
    for (_, mine), (_, original) in zip(twin.named_parameters(), engine.module.named_parameters(), strict=True):
        mine.data = original.data.clone()
        mine.grad = None
    plain = nn.parallel.DistributedDataParallel(twin)
    rows = common.my_rows(common.batch(50))
    plain(rows).backward()
    engine.backward(engine(rows))
    differences = {}
    for (name, mine), (_, original) in zip(twin.named_parameters(), engine.module.named_parameters(), strict=True):
        if original.requires_grad:
            reduced = safe_get_full_grad(original).double()
            differences[name] = float((reduced - mine.grad.double()).abs().max() / mine.grad.abs().max())
    engine.step()
    common.end(engine)
    return differences


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_equal_ddp(stage: int) -> None:
    for differences in run(2, gradients_of_zero_and_ddp, stage):
        assert set(differences) == {
            "embedding.weight", "norm.weight", "norm.bias",
            "block.0.bias", "block.0.lora_A", "block.0.lora_B", "block.2.bias", "block.2.lora_A", "block.2.lora_B",
        }  # fmt: skip
        assert max(differences.values()) < 1e-5, differences


def poison_one_rank(dtype: str) -> dict[str, Any]:
    """A loss that is not a number on rank 1 alone."""
    engine = common.build(common.tiny_llama(), {"restart_every": 3, "restart_warmup": 0}, dtype=dtype)
    common.train_update(engine, 0)
    before = {name: p.data.clone() for name, p in engine.module.named_parameters()}
    ids = common.my_rows(common.batch(1))
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss * (float("nan") if dist.get_rank() == 1 else 1.0))
    engine.step()
    unchanged = all(torch.equal(before[name], p.data) for name, p in engine.module.named_parameters())
    applied = engine.was_step_applied()
    after = common.train_update(engine, 2)
    result = {
        "unchanged": unchanged,
        "applied": applied,
        "after": after,
        "again": engine.was_step_applied(),
        "restarts": engine.optimizer.restarts,
    }
    common.end(engine)
    return result


def test_a_non_finite_loss_skips_the_update_on_all_ranks() -> None:
    for result in run(2, poison_one_rank, "fp32"):
        assert result["unchanged"] and not result["applied"]
        assert result["again"] and math.isfinite(result["after"])
        assert result["restarts"] == 1, "a skipped update counts as one: the third brings the restart"


def schedulers_and_clients(kind: str) -> dict[str, Any]:
    """What a user may bring along: an optimizer, groups, a scheduler, a data loader."""
    model = common.tiny_llama()
    config = common.deepspeed_config(lr=LR)
    extra: dict[str, Any] = {}
    if kind == "optimizer":
        del config["optimizer"]
        decayed = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() <= 1]
        extra["optimizer"] = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": vectors}], lr=LR)
        extra["lr_scheduler"] = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    elif kind == "generator":
        extra["model_parameters"] = (p for p in model.parameters() if p.requires_grad)
        config["scheduler"] = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.0, "warmup_max_lr": LR, "warmup_num_steps": 4}}
    elif kind == "loader":
        extra["training_data"] = [{"input_ids": row, "labels": row} for row in common.batch(0)]
    relora = {"rank": RANK, "restart_every": 3, "restart_warmup": 2}
    engine, optimizer, loader, scheduler = relora_ds.initialize(model=model, config=config, relora=relora, lora_lr=5e-3, **extra)
    lrs, losses = [], []
    for update in range(1, 6):
        losses.append(common.train_update(engine, 0))
        lrs.append(dict(optimizer.last_lrs))
        assert update <= 3 or optimizer.restarts == 1
    trainable = sum(1 for p in engine.module.parameters() if p.requires_grad)
    in_groups = sum(len(group) for group in optimizer.bit16_groups)
    result = {
        "lrs": lrs, "losses": losses, "scheduler": scheduler is not None, "groups": (trainable, in_groups),
        "batches": None if loader is None else len(list(loader)),
        "decay": [group["weight_decay"] for group in optimizer.param_groups],
    }  # fmt: skip
    common.end(engine)
    return result


def test_a_users_own_optimizer_and_scheduler() -> None:
    result = run(2, schedulers_and_clients, "optimizer")[0]
    assert result["groups"][0] == result["groups"][1]
    assert result["decay"] == [0.1, 0.1, 0.01], "kept matrices, their factors, vectors (AdamW's default)"
    factors = [lrs["lora"] for lrs in result["lrs"]]
    # 0.9**step of the scheduler times the ramp 1, 1, 1, 0/2, 1/2 of the restart after update 3
    assert factors == pytest.approx([5e-3 * f for f in (1.0, 0.9, 0.81, 0.0, 0.9**4 / 2)])


def test_parameters_from_a_generator_and_a_scheduler_from_json() -> None:
    result = run(2, schedulers_and_clients, "generator")[0]
    assert result["groups"][0] == result["groups"][1]
    assert result["scheduler"]
    assert result["lrs"][3] == pytest.approx({name: 0.0 for name in result["lrs"][3]}), "the first update after the restart"
    assert result["losses"][-1] < result["losses"][0]


def shipped_configuration() -> dict[str, Any]:
    """A file of ds_configs/ as it is: one row per rank, and no optimizer in it."""
    file = Path(__file__).resolve().parents[2] / "ds_configs" / "zero2_cpu.json"
    engine, optimizer, _, _ = relora_ds.initialize(
        model=common.tiny_llama(), config=file, relora={"rank": RANK, "restart_every": 3, "restart_warmup": 0}
    )
    losses = []
    for _ in range(5):
        ids = common.my_rows(common.batch(0))
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(common.mean_over_ranks(loss))
    result = {
        "losses": losses,
        "restarts": optimizer.restarts,
        "base": type(engine.basic_optimizer).__name__,
        "lrs": optimizer.last_lrs,
    }
    common.end(engine)
    return result


def test_a_shipped_configuration_needs_nothing_else() -> None:
    result = run(2, shipped_configuration)[0]
    assert result["restarts"] == 1 and result["base"] == "AdamW"
    assert result["losses"][-1] < result["losses"][0]
    assert set(result["lrs"]) == {"dense", "no_decay", "lora"}


def test_training_data_makes_a_loader() -> None:
    assert run(2, schedulers_and_clients, "loader")[0]["batches"] == 1


def save_and_load(dtype: str, stage: int, folder: str) -> dict[str, Any]:
    """engine.save_checkpoint and load_checkpoint, as a user calls them, between two restarts."""
    relora = {"restart_every": 3, "restart_warmup": 1}
    engine = common.build(common.tiny_llama(), relora, dtype=dtype, stage=stage)
    for update in range(5):
        common.train_update(engine, update)
    engine.save_checkpoint(folder)
    going_on = [common.train_update(engine, update) for update in range(5, 12)]
    common.end(engine)
    fresh = common.build(common.tiny_llama(seed=9), relora, dtype=dtype, stage=stage)
    common.train_update(fresh, 40)  # an engine that has already trained must load as well
    fresh.load_checkpoint(folder)
    resumed = [common.train_update(fresh, update) for update in range(5, 12)]
    result = {"going_on": going_on, "resumed": resumed, "restarts": fresh.optimizer.restarts}
    common.end(fresh)
    return result


@pytest.mark.parametrize(("dtype", "stage"), [("fp32", 2), ("bf16", 1)])
def test_a_users_own_checkpoints_resume_to_the_last_digit(dtype: str, stage: int, tmp_path: Any) -> None:
    for result in run(2, save_and_load, dtype, stage, str(tmp_path)):
        assert result["resumed"] == result["going_on"]
        assert result["restarts"] == 4


def train_checkpointed(checkpointing: bool) -> list[float]:
    model = common.tiny_llama()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    engine = common.build(model, {"restart_every": 3, "restart_warmup": 1}, accumulation=2)
    losses = [common.train_update(engine, update % 2) for update in range(8)]
    common.end(engine)
    return losses


def test_gradient_checkpointing_changes_nothing() -> None:
    assert run(2, train_checkpointed, True)[0] == pytest.approx(run(2, train_checkpointed, False)[0], rel=1e-6)
