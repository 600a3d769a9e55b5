"""LoRA factors on linear layers: the arithmetic, which layers get them, and the groups that train them."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from relora_ds.config import Frozen, Model
from relora_ds.method import lora
from relora_ds.method.lora import ReLoRALinear, count_parameters, initial_A, param_groups, relora_layers, wrap
from relora_ds.method.targets import find_targets
from relora_ds.models import build as models
from tests.conftest import TINY_LLAMA, VOCAB_SIZE
from tests.products import ExactProducts

RANK, ALPHA = 3, 6.0
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": TINY_LLAMA,
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": TINY_LLAMA | {"model_type": "gpt_neox"},
}
LINEARS = {  # of one layer
    "llama": {*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))},
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    "gpt_neox": {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
}
LAYERS = {"llama": "model.layers", "gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}


def build(architecture: str, **changes: Any) -> PreTrainedModel:
    config = models.hf_config(Model(config=ARCHITECTURES[architecture] | changes), VOCAB_SIZE)
    return models.build(config, attention="eager", dtype=torch.float32, device=torch.device("cpu"), seed=5).eval()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def fill_factors(module: nn.Module) -> None:
    """Random A and B, as after some training."""
    for seed, (_, layer) in enumerate(relora_layers(module)):
        layer.lora_A.copy_(0.3 * random(*layer.lora_A.shape, seed=2 * seed))
        layer.lora_B.copy_(0.3 * random(*layer.lora_B.shape, seed=2 * seed + 1))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids).logits


def linear(kind: str) -> nn.Linear | Conv1D:
    """A layer from 8 inputs to 5 outputs."""
    base = Conv1D(5, 8) if kind == "Conv1D" else nn.Linear(8, 5, bias=kind == "with bias")
    if base.bias is not None:
        nn.init.normal_(base.bias)
    return base


def alone(layer: ReLoRALinear) -> Tensor:
    """The weight that a layer without a frozen one stands for."""
    return layer.scaling * layer.lora_B @ layer.lora_A


KINDS = pytest.mark.parametrize("kind", ["with bias", "without bias", "Conv1D"])


# One layer


@KINDS
def test_forward_is_that_of_the_sum_of_weight_and_product(kind: str) -> None:
    base = linear(kind)
    weight = base.weight.detach().clone().t() if kind == "Conv1D" else base.weight.detach().clone()
    layer = ReLoRALinear(base, RANK, ALPHA)
    fill_factors(layer)
    assert (layer.in_features, layer.out_features) == (8, 5)
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((RANK, 8), (5, RANK))
    x = random(2, 7, 8)
    expected = F.linear(x, weight + ALPHA / RANK * layer.lora_B @ layer.lora_A, base.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(layer(x), F.linear(x, weight, base.bias), atol=1e-2)  # the product matters


@KINDS
def test_fresh_factors_leave_the_function_unchanged(kind: str) -> None:
    base = linear(kind)
    x = random(4, 8)
    before = base(x).detach()
    layer = ReLoRALinear(base, RANK, ALPHA)
    layer.reset("layer", seed=1, restart=0)
    assert torch.equal(layer.lora_B, torch.zeros(5, RANK))
    assert float(layer.lora_A.detach().abs().min()) > 0
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-6)


@KINDS
def test_delta_is_out_by_in_for_every_kind_of_layer(kind: str) -> None:
    layer = ReLoRALinear(linear(kind).to(torch.bfloat16), RANK, ALPHA)
    lora_A, lora_B = random(RANK, 8), random(5, RANK, seed=1)
    product = ALPHA / RANK * lora_B @ lora_A
    delta = layer.delta(lora_A, lora_B)
    assert delta.dtype == torch.float32
    assert delta.shape == layer.weight.shape
    torch.testing.assert_close(delta, product, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.delta(lora_A, lora_B[1:3]), product[1:3], rtol=1e-6, atol=1e-6)  # rows of B give rows


@KINDS
def test_gradients_reach_factors_and_bias_but_not_the_weight(kind: str) -> None:
    layer = ReLoRALinear(linear(kind), RANK, ALPHA)
    fill_factors(layer)
    layer(random(4, 8)).square().sum().backward()
    trained = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert trained == {"lora_A", "lora_B"} | ({"bias"} if layer.bias is not None else set())
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in layer.parameters() if parameter.grad is not None)
    assert not any(buffer.requires_grad for buffer in layer.weight.buffers())


def test_dropout_only_in_training_and_only_before_A() -> None:
    base = linear("with bias")
    layer = ReLoRALinear(base, RANK, ALPHA, dropout=0.5)
    x = random(64, 8)
    layer.reset("layer", seed=1, restart=0)
    torch.testing.assert_close(layer.train()(x), base(x), rtol=0, atol=1e-6)  # with B = 0 there is nothing to drop
    fill_factors(layer)
    torch.testing.assert_close(layer.eval()(x), base(x) + F.linear(x, layer.delta(layer.lora_A, layer.lora_B)))
    assert not torch.allclose(layer.train()(x), layer.eval()(x), atol=1e-3)


@pytest.mark.parametrize("stored", ["int8", "fp32"])
def test_who_asks_for_the_dtype_of_the_weight_is_told_that_of_the_factors(stored: str) -> None:
    """DeepSeek-V3.2 casts what goes into a layer to it."""
    layer = ReLoRALinear(nn.Linear(8, 8), rank=2, alpha=4.0, frozen=Frozen(dtype=stored)).bfloat16()
    assert layer.weight.dtype == copy.deepcopy(layer).weight.dtype == torch.bfloat16
    assert set(dict(layer.named_parameters())) == {"lora_A", "lora_B", "bias"}


def test_factors_have_the_dtype_of_the_weight() -> None:
    layer = ReLoRALinear(linear("with bias").to(torch.bfloat16), RANK, ALPHA)
    layer.reset("layer", seed=1, restart=0)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    expected = initial_A(RANK, 8, name="layer", seed=1, restart=0)
    assert torch.equal(layer.lora_A, expected.to(torch.bfloat16))


# Initialisation


def test_initial_A_depends_on_seed_restart_and_name_only() -> None:
    first = initial_A(4, 16, name="a.q_proj", seed=1, restart=2)
    torch.manual_seed(99)
    assert torch.equal(initial_A(4, 16, name="a.q_proj", seed=1, restart=2), first)
    others = [
        initial_A(4, 16, name="a.k_proj", seed=1, restart=2),
        initial_A(4, 16, name="a.q_proj", seed=2, restart=2),
        initial_A(4, 16, name="a.q_proj", seed=1, restart=3),
        initial_A(4, 16, name="a.q_proj", seed=12, restart=2),
    ]
    assert not any(torch.equal(other, first) for other in others)
    assert first.dtype == torch.float32


def test_initial_A_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    initial_A(4, 16, name="layer", seed=1, restart=0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("in_features", [16, 100])
def test_initial_A_is_uniform_within_one_over_the_root_of_the_inputs(in_features: int) -> None:
    bound = 1 / math.sqrt(in_features)
    values = initial_A(200, in_features, name="layer", seed=1, restart=0)
    assert 0.99 * bound < float(values.abs().max()) <= bound
    assert float(values.mean()) == pytest.approx(0.0, abs=0.05 * bound)
    assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_initial_A_is_the_same_on_every_machine() -> None:
    """A resumed run, or a rank elsewhere, must draw these very numbers."""
    values = initial_A(1, 4, name="model.layers.0.self_attn.q_proj", seed=1, restart=0)
    torch.testing.assert_close(values, torch.tensor([[-0.477051, -0.499312, 0.491060, -0.292766]]), rtol=0, atol=1e-6)


@KINDS
def test_low_rank_is_the_product_alone(kind: str) -> None:
    """No weight, no buffer; both factors Kaiming-uniform, so the layer is no layer of zeros."""
    layer = ReLoRALinear(linear(kind), RANK, ALPHA, frozen=Frozen(dtype="none"))
    layer.reset("layer", seed=1, restart=0)
    assert layer.weight is None and not list(layer.buffers())
    assert 0 < float(layer.lora_B.detach().abs().max()) <= RANK**-0.5
    x = random(4, 8)
    torch.testing.assert_close(layer(x), F.linear(x, alone(layer), layer.bias), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.merged(), alone(layer).detach(), rtol=1e-6, atol=1e-7)


def test_trainable_scaling_is_the_tanh_of_a_number_that_is_trained() -> None:
    layer = ReLoRALinear(linear("with bias"), RANK, ALPHA, trainable_scaling=True)
    layer.reset("layer", seed=1, restart=0)
    fill_factors(layer)
    assert layer.lora_scaling is not None and list(layer.factors()) == ["lora_A", "lora_B", "lora_scaling"]
    assert torch.equal(layer.lora_scaling, torch.ones(1))
    with torch.no_grad():
        layer.lora_scaling.fill_(0.3)
    x, product = random(4, 8), math.tanh(0.3) * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight.read() + product, layer.bias), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.merged(), (layer.weight.read() + product).detach(), rtol=1e-6, atol=1e-6)
    layer(x).square().sum().backward()
    assert layer.lora_scaling.grad is not None and float(layer.lora_scaling.grad.abs()) > 0


# Which layers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wrapping_changes_no_output_and_freezes_the_weights_alone(architecture: str) -> None:
    model = build(architecture)
    before, names = logits(model), set(model.state_dict())
    wrap(model, rank=RANK, alpha=ALPHA)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)
    wrapped = {name for name, _ in relora_layers(model)}
    assert all(parameter.requires_grad for parameter in model.parameters()), "frozen weights are buffers"
    ours = {f"{x}.{part}" for x in wrapped for part in ("lora_A", "lora_B", "weight.values")}
    assert set(model.state_dict()) - names == ours
    assert names - set(model.state_dict()) == {f"{x}.weight" for x in wrapped}


def test_wrapping_initialises_by_seed_and_name() -> None:
    model = wrap(build("llama"), rank=RANK, alpha=ALPHA, seed=9)
    for name, layer in relora_layers(model):
        assert torch.equal(layer.lora_A, initial_A(RANK, layer.in_features, name=name, seed=9, restart=0))


@pytest.mark.parametrize("training", [True, False])
def test_wrapped_layers_take_over_the_mode(training: bool) -> None:
    model = wrap(build("llama").train(training), rank=RANK, alpha=ALPHA, dropout=0.1)
    assert {layer.training for _, layer in relora_layers(model)} == {training}
    assert {layer.dropout.training for _, layer in relora_layers(model)} == {training}


# Shared modules and shared weights


class Shared(nn.Module):
    """One layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_what_a_user_hung_on_a_layer_hangs_on_the_wrapped_one() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(6, 2))
    seen: list[str] = []
    handles = [
        model[1].register_forward_pre_hook(lambda module, args: seen.append("before")),
        model[1].register_forward_hook(lambda module, args, kwargs, out: seen.append("after"), with_kwargs=True),
        model[1].register_full_backward_hook(lambda module, inside, outside: seen.append("backward")),
    ]
    lora.wrap(model, rank=1, alpha=1.0, targets=["0", "1"])
    model(torch.ones(1, 6)).sum().backward()
    assert seen == ["before", "after", "backward"]
    for handle in handles:
        handle.remove()
    model(torch.ones(1, 6)).sum().backward()
    assert len(seen) == 3


def test_a_module_in_two_places_is_wrapped_once() -> None:
    model = Shared()
    x = random(3, 6)
    before = model(x).detach()
    wrap(model, rank=2, alpha=4.0)
    assert [name for name, _ in relora_layers(model)] == ["first"]
    assert model.first is model.second
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)
    fill_factors(model)
    merged = model.first.merged()
    torch.testing.assert_close(model(x), F.linear(torch.tanh(F.linear(x, merged, model.first.bias)), merged, model.first.bias))


@pytest.mark.parametrize(
    ("architecture", "changes"), [("gpt2", {}), ("llama", {"tie_word_embeddings": True})], ids=["gpt2", "llama"]
)
def test_tied_embeddings_stay_tied_trainable_and_untouched(architecture: str, changes: dict[str, Any]) -> None:
    model = build(architecture, **changes)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.weight is embedding.weight
    before = embedding.weight.detach().clone()
    wrap(model, rank=RANK, alpha=ALPHA)
    assert model.get_output_embeddings() is head
    assert head.weight is embedding.weight
    assert head.weight.requires_grad
    assert torch.equal(head.weight, before)


# How many


@pytest.mark.parametrize("stored", ["auto", "int8"])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_frozen_weights_are_counted_and_tied_ones_once(changes: dict[str, Any], stored: str) -> None:
    """However they are stored: scales of int8 are no parameters."""
    model = build("llama", **changes)
    whole = sum(p.numel() for p in model.parameters())
    assert count_parameters(model) == (whole, whole)
    model.get_parameter("model.norm.weight").requires_grad_(False)  # by the user
    norm = model.get_parameter("model.norm.weight").numel()
    targets = find_targets(model, "all-linear")
    wrapped = sum(module.weight.numel() for module in targets.values())
    factors = sum(RANK * sum(module.weight.shape) for module in targets.values())
    wrap(model, rank=RANK, alpha=ALPHA, frozen=Frozen(dtype=stored, group_size=8))
    assert count_parameters(model) == (whole - wrapped - norm + factors, whole + factors)


def test_without_frozen_weights_only_what_is_there_is_counted() -> None:
    model = wrap(build("gpt2"), rank=RANK, alpha=ALPHA, targets=["all-linear"], frozen=Frozen(dtype="none"))
    there = sum(p.numel() for p in model.parameters())
    assert count_parameters(model) == (there, there)


# The merged weight


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_weights_in_an_ordinary_model_compute_the_same(architecture: str) -> None:
    original, model = build(architecture), wrap(build(architecture), rank=RANK, alpha=ALPHA)
    untrained = logits(original)
    fill_factors(model)
    for name, layer in relora_layers(model):
        merged = layer.merged()
        assert merged.dtype == torch.float32
        original.get_submodule(name).weight.data = merged.t() if layer.is_conv1d else merged
    torch.testing.assert_close(logits(original), logits(model), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(original), untrained, atol=1e-2)


# Parameter groups


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "plain"])
def test_param_groups_hold_every_trainable_parameter_once(architecture: str, wrapped: bool) -> None:
    model = build(architecture)
    if wrapped:
        wrap(model, rank=RANK, alpha=ALPHA)
    groups = param_groups(model)
    assert [group["name"] for group in groups] == ["dense", "no_decay", *(["lora"] if wrapped else [])]
    counts = Counter(id(parameter) for group in groups for parameter in group["params"])
    assert set(counts.values()) == {1}
    assert set(counts) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_param_groups_by_kind() -> None:
    model = wrap(build("gpt2"), rank=RANK, alpha=ALPHA)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in param_groups(model)}
    assert groups["dense"] == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert groups["lora"] == {name for name in names.values() if name.endswith(("lora_A", "lora_B"))}
    assert all(".ln_" in name or name.endswith("bias") for name in groups["no_decay"])
    assert {"transformer.h.0.attn.c_attn.bias", "transformer.ln_f.weight"} <= groups["no_decay"]


def test_param_groups_settings() -> None:
    model = wrap(build("llama"), rank=RANK, alpha=ALPHA)
    groups = {group["name"]: group for group in param_groups(model, weight_decay=0.1, lr=1e-3, lora_lr=2e-3)}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {"dense": 0.1, "no_decay": 0.0, "lora": 0.1}
    assert {name: group["lr"] for name, group in groups.items()} == {"dense": 1e-3, "no_decay": 1e-3, "lora": 2e-3}
    groups = {group["name"]: group for group in param_groups(model, lr=1e-3)}
    assert {group["lr"] for group in groups.values()} == {1e-3}
    groups = {group["name"]: group for group in param_groups(model, lora_lr=0.0)}
    assert groups["lora"]["lr"] == 0.0
    assert "lr" not in groups["dense"]
    assert [name for name, group in groups.items() if "weight_decay" in group] == [lora.NO_DECAY_GROUP]


@pytest.mark.parametrize("trainable_scaling", [False, True])
@pytest.mark.parametrize("base", [nn.Linear(40, 61), Conv1D(61, 40), nn.Embedding(61, 40)], ids=["linear", "conv1d", "embedding"])
def test_a_change_is_the_same_bits_in_whichever_pieces(base: nn.Module, trainable_scaling: bool) -> None:
    """And so is a merge: whole on every rank, or by the rows that a rank has of a sharded master, by their number."""
    kind = lora.ReLoRAEmbedding if isinstance(base, nn.Embedding) else ReLoRALinear
    layer = kind(base, rank=8, alpha=5, trainable_scaling=trainable_scaling, frozen=Frozen(dtype="bf16"))
    layer.reset("layer", seed=0, restart=0)
    factors = {name: torch.randn(factor.shape) * 0.1 for name, factor in layer.factors().items()}
    with ExactProducts() as asked:
        whole = layer.delta(**factors)
    assert asked.num == 1
    change = layer.change(**factors)
    for size in (1, 2, 5, 16, 31):
        rows = [slice(start, start + size) for start in range(0, 61, size)]
        assert torch.equal(torch.cat([change(piece) for piece in rows]), whole), size
    expected = float(layer.scale(factors.get("lora_scaling"))) * (factors["lora_B"].double() @ factors["lora_A"].double())
    torch.testing.assert_close(whole.double(), expected, rtol=1e-6, atol=1e-7)
    merged = (layer.weight.read() + whole).to(torch.bfloat16)
    layer.weight.merge(change)
    assert torch.equal(layer.weight.values, merged)
