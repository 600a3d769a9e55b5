"""LoRA factors on the vocabulary's matrices: the arithmetic of an embedding, which targets name it and the head, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora_ds.config import Frozen
from relora_ds.errors import ConfigError
from relora_ds.method import lora
from relora_ds.method.lora import ReLoRAEmbedding, relora_layers, wrap
from relora_ds.method.targets import find_targets
from tests.conftest import VOCAB_SIZE
from tests.unit.method.test_lora import ALPHA, ARCHITECTURES, LAYERS, LINEARS, RANK, build, fill_factors, logits, random

NUM_IDS, HIDDEN = 11, 24
IDS = torch.tensor([[3, 0, 3, 7], [10, 7, 3, 2]])
"""Some of them more than once, one of them the padding where there is one."""
PADDING = 2
VOCABULARY = ["all-linear", "output-head", "input-embedding"]
NAMES = {
    "llama": ("lm_head", "model.embed_tokens"),
    "gpt2": ("lm_head", "transformer.wte"),
    "gpt_neox": ("lm_head", "gpt_neox.embed_in"),
}
UNTIED = {"tie_word_embeddings": False}


def embedding(**options: Any) -> nn.Embedding:
    base = nn.Embedding(NUM_IDS, HIDDEN, **options)
    base.weight.data = random(NUM_IDS, HIDDEN, seed=8)
    return base


def wrapped(frozen: Frozen | None = None, **options: Any) -> ReLoRAEmbedding:
    """A layer with trained factors; the padding's row of B is 0, as training leaves it."""
    layer = ReLoRAEmbedding(embedding(**options), RANK, ALPHA, frozen=frozen)
    layer.reset("layer", seed=1, restart=0)
    fill_factors(layer)
    if layer.padding_idx is not None:
        layer.lora_B.data[layer.padding_idx] = 0
    return layer


# One layer


@pytest.mark.parametrize("padding_idx", [None, PADDING])
@pytest.mark.parametrize("trainable_scaling", [False, True])
def test_embedding_equals_the_dense_formula(padding_idx: int | None, trainable_scaling: bool) -> None:
    """In fp64, output and gradients: rows of W + s·B·A, and what the chain rule makes of the gradient of that matrix."""
    layer = ReLoRAEmbedding(embedding(padding_idx=padding_idx), RANK, ALPHA, trainable_scaling=trainable_scaling).double()
    layer.reset("layer", seed=1, restart=0)
    fill_factors(layer)
    if padding_idx is not None:
        layer.lora_B.data[padding_idx] = 0
    assert layer.weight is not None and (layer.lora_A.shape, layer.lora_B.shape) == ((RANK, HIDDEN), (NUM_IDS, RANK))
    factors = [factor.detach().clone().requires_grad_() for factor in layer.factors().values()]
    scale = factors[2].tanh() if trainable_scaling else ALPHA / RANK
    weight = layer.weight.values.double() + scale * factors[1] @ factors[0]
    outputs = layer(IDS), F.embedding(IDS, weight, padding_idx)
    assert outputs[0].shape == (*IDS.shape, HIDDEN)
    torch.testing.assert_close(*outputs, rtol=1e-13, atol=1e-13)
    direction = random(*IDS.shape, HIDDEN, seed=9).double()
    gradients = [
        torch.autograd.grad((y * direction).sum(), p)
        for y, p in zip(outputs, (list(layer.factors().values()), factors), strict=True)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    assert all(float(gradient.abs().max()) > 0.1 for gradient in gradients[0])


def test_fresh_factors_leave_an_embedding_unchanged_to_the_bit() -> None:
    base = embedding()
    before = base(IDS).detach()
    layer = ReLoRAEmbedding(base, RANK, ALPHA)
    layer.reset("layer", seed=1, restart=0)
    assert torch.equal(layer(IDS), before)
    assert float(layer.lora_A.detach().abs().min()) > 0


@pytest.mark.parametrize(("dtype", "rounding"), [("fp32", 1e-6), ("bf16", 2e-2), ("int8", 8e-2)])
def test_a_merge_changes_no_row_but_for_the_rounding_of_the_store(dtype: str, rounding: float) -> None:
    """Rows of size 4 or so: half a unit of bf16 there is 2**-7, half a step of int8 1/254 of the largest; before and after."""
    layer = wrapped(Frozen(dtype=dtype, group_size=8))
    assert layer.weight is not None
    before, plain = layer(IDS).detach(), layer.weight.look_up(IDS, torch.float32)
    layer.weight.merge(lambda rows: layer.delta(layer.lora_A.detach(), layer.lora_B.detach()[rows]))
    layer.reset("layer", seed=1, restart=1)
    torch.testing.assert_close(layer(IDS).detach(), before, rtol=0, atol=rounding)
    assert float((before - plain).abs().max()) > 0.5, "the factors must matter for this to mean anything"


def test_an_id_beyond_the_vocabulary_is_an_error() -> None:
    for frozen in (None, Frozen(dtype="int8"), Frozen(dtype="none")):
        for outside in (NUM_IDS, -1):
            with pytest.raises(IndexError):
                wrapped(frozen)(torch.tensor([0, outside]))


def test_training_leaves_the_padding_alone() -> None:
    layer = wrapped(padding_idx=PADDING)
    before = layer(torch.arange(NUM_IDS)).detach()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(IDS).square().sum().backward()
        optimizer.step()
    moved = (layer(torch.arange(NUM_IDS)).detach() - before).abs().amax(1)
    assert moved[PADDING] == 0.0 and float(moved[3]) > 0.1


def test_a_low_rank_embedding_is_the_product_alone() -> None:
    """Both factors random, or it would give zeros; and zeros for the padding, as nn.Embedding begins with."""
    layer = ReLoRAEmbedding(embedding(padding_idx=PADDING), RANK, ALPHA, frozen=Frozen(dtype="none"))
    layer.reset("layer", seed=1, restart=0)
    rows = layer(torch.arange(NUM_IDS)).detach()
    torch.testing.assert_close(rows, ALPHA / RANK * (layer.lora_B @ layer.lora_A).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows, layer.merged(), rtol=1e-5, atol=1e-6)
    largest = rows.abs().amax(1)
    assert largest[PADDING] == 0.0 and float(largest.sort().values[1]) > 0


# In a model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_roles_name_head_and_embedding_whatever_they_are_called(architecture: str) -> None:
    model = build(architecture, **UNTIED)
    head, embedded = NAMES[architecture]
    linears = {f"{LAYERS[architecture]}.{i}.{name}" for i in range(2) for name in LINEARS[architecture]}
    assert set(find_targets(model, "output-head")) == {head}
    assert set(find_targets(model, ["input-embedding"])) == {embedded}
    assert set(find_targets(model, VOCABULARY)) == {*linears, head, embedded}
    assert set(find_targets(model, ["all-linear", head, embedded.rpartition(".")[2]])) == {*linears, head, embedded}
    assert set(find_targets(model, ["all-linear"])) == set(find_targets(model, "all-linear")) == linears


@pytest.mark.parametrize(
    ("target", "embeddings"),
    [("wpe", {"transformer.wpe"}), ("transformer.wte", {"transformer.wte"}), ("transformer", set()), ("h", set())],
)
def test_a_part_that_holds_an_embedding_means_its_linear_layers(target: str, embeddings: set[str]) -> None:
    chosen = find_targets(build("gpt2", **UNTIED), [target])
    assert {name for name, module in chosen.items() if isinstance(module, nn.Embedding)} == embeddings
    assert len(chosen) == (len(embeddings) or 8)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_wrapped_vocabulary_computes_what_its_merged_weights_do(architecture: str, dtype: str) -> None:
    """Positions, too, where they are embedded. The untrained model is the same but for the rounding of the store."""
    original = build(architecture, **UNTIED)
    model = build(architecture, **UNTIED)
    targets = [*VOCABULARY, *(["wpe"] if architecture == "gpt2" else [])]
    before = logits(model)
    wrap(model, rank=RANK, alpha=ALPHA, targets=targets, frozen=Frozen(dtype=dtype, group_size=8))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6 if dtype == "auto" else 0.02)
    fill_factors(model)
    layers = dict(relora_layers(model))
    assert {*NAMES[architecture]} < layers.keys()
    for name, layer in layers.items():
        original.get_submodule(name).weight.data = layer.merged().t() if layer.is_conv1d else layer.merged()
    # fp32 sums in another order, of logits that random factors make as large as 20
    torch.testing.assert_close(logits(original), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(original), before, atol=0.1)


def test_dropout_leaves_an_embedding_alone() -> None:
    model = wrap(build("llama"), rank=RANK, alpha=ALPHA, targets=["input-embedding"], dropout=0.5).train()
    fill_factors(model)
    assert torch.equal(model.model.embed_tokens(IDS), model.model.embed_tokens(IDS))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_num_trainable_counts_what_is_wrapped(architecture: str) -> None:
    model = build(architecture, **UNTIED)
    counted = lora.num_trainable(model, find_targets(model, VOCABULARY), RANK)
    less = lora.num_trainable(model, find_targets(model, "all-linear"), RANK) - counted
    assert less == 2 * (VOCAB_SIZE * 32 - RANK * (VOCAB_SIZE + 32))
    wrap(model, rank=RANK, alpha=ALPHA, targets=VOCABULARY)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == counted
    groups = {group["name"]: {id(parameter) for parameter in group["params"]} for group in lora.param_groups(model)}
    assert {id(f) for _, layer in relora_layers(model) for f in layer.factors().values()} == groups["lora"]


# What is refused


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return 3.0 * super().forward(ids)


@pytest.mark.parametrize(
    ("base", "problem"),
    [
        (Scaled(NUM_IDS, HIDDEN), "is a Scaled, which does more than look rows up; leave it out"),
        (
            embedding(max_norm=1.0),
            r"is an embedding with max_norm=1\.0, which its factors cannot keep to; leave it out, or build",
        ),
        (embedding(scale_grad_by_freq=True), "is an embedding with scale_grad_by_freq=True"),
        (embedding(sparse=True), "is an embedding with sparse=True"),
    ],
    ids=["scaled", "max_norm", "scale_grad_by_freq", "sparse"],
)
def test_embeddings_that_factors_cannot_stand_for(base: nn.Embedding, problem: str) -> None:
    model = nn.ModuleDict({"table": base, "inner": nn.Linear(HIDDEN, HIDDEN)})
    with pytest.raises(ConfigError, match=rf"^relora\.targets='table': {problem}") as caught:
        wrap(model, rank=2, alpha=4.0, targets=["all-linear", "table"])
    assert "\n" not in str(caught.value)
    assert list(relora_layers(model)) == [] and base.weight.requires_grad
    assert set(find_targets(model, "all-linear")) == {"inner"}


@pytest.mark.parametrize(("architecture", "changes"), [("gpt2", {}), ("llama", {"tie_word_embeddings": True})])
@pytest.mark.parametrize("target", ["output-head", "input-embedding"])
def test_tied_vocabulary_cannot_be_a_target(architecture: str, changes: dict[str, Any], target: str) -> None:
    head, embedded = NAMES[architecture]
    named, other = (head, embedded) if target == "output-head" else (embedded, head)
    with pytest.raises(ConfigError, match=f"{named!r}: shares its weight with {other!r} and cannot be merged into"):
        find_targets(build(architecture, **changes), ["all-linear", target])


@pytest.mark.parametrize("target", ["output-head", "input-embedding"])
def test_a_model_that_tells_of_neither(target: str) -> None:
    with pytest.raises(ConfigError, match=rf"relora\.targets='{target}': the model tells of none .*; name the layer by its path"):
        find_targets(nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4)), [target])


def test_rank_larger_than_an_embedding_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 8))
    with pytest.raises(ConfigError, match=r"relora\.rank=5: larger than layer '0' of \(4, 8\); use at most 4"):
        wrap(model, rank=5, alpha=4.0, targets=["all-linear", "0"])
