"""Which layers targets name, which they pass over (frozen ones, and those that factors cannot stand for), and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from relora_ds.config import Model
from relora_ds.errors import ConfigError
from relora_ds.method.lora import param_groups, relora_layers, wrap
from relora_ds.method.targets import find_targets, obstacle
from relora_ds.models import build as models
from tests.conftest import TINY_LLAMA, VOCAB_SIZE
from tests.unit.method.test_lora import ALPHA, ARCHITECTURES, LAYERS, LINEARS, RANK, build

FROZEN = "model.layers.0.self_attn.q_proj"


def frozen_llama(*names: str, **changes: Any) -> nn.Module:
    model = build("llama", **changes)
    for name in names or (FROZEN,):
        model.get_submodule(name).requires_grad_(False)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_linear_is_all_but_the_head(architecture: str) -> None:
    model = wrap(build(architecture), rank=RANK, alpha=ALPHA)
    expected = {f"{LAYERS[architecture]}.{i}.{name}" for i in range(2) for name in LINEARS[architecture]}
    assert {name for name, _ in relora_layers(model)} == expected
    left = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    assert len(left) == 1
    assert model.get_submodule(left.pop()) is model.get_output_embeddings()


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj", {"0.self_attn.q_proj", "1.self_attn.q_proj"}),
        (["q_proj", "down_proj"], {f"{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")}),
        (["mlp"], {f"{i}.mlp.{name}_proj" for i in range(2) for name in ("gate", "up", "down")}),
        (["layers.1.self_attn.k_proj"], {"1.self_attn.k_proj"}),
        (["layers.0.mlp", "gate_proj"], {"0.mlp.gate_proj", "0.mlp.up_proj", "0.mlp.down_proj", "1.mlp.gate_proj"}),
    ],
    ids=str,
)
def test_targets_by_dotted_parts_of_the_name(targets: str | list[str], expected: set[str]) -> None:
    chosen = find_targets(build("llama"), targets)
    assert set(chosen) == {f"model.layers.{name}" for name in expected}


@pytest.mark.parametrize(
    ("targets", "hint"),
    [
        (["q_pro"], "did you mean 'q_proj'?"),
        (["q_proj", "proj"], "did you mean"),
        (["embeds_token"], "did you mean 'embed_tokens'?"),
        (["all-linear", "all-linears"], "did you mean 'all-linear'?"),
        (["norm"], ""),
    ],
    ids=str,
)
def test_target_that_matches_no_layer(targets: list[str], hint: str) -> None:
    with pytest.raises(ConfigError, match="matches no linear layer or embedding of the model") as caught:
        find_targets(build("llama"), targets)
    assert str(caught.value).startswith(f"relora.targets={targets[-1]!r}: ")
    assert hint in str(caught.value)


def test_an_empty_list_of_targets_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"relora\.targets=\[\]: names no layer"):
        find_targets(nn.Sequential(nn.Linear(4, 4)), [])


def test_head_can_be_named() -> None:
    assert set(find_targets(build("llama"), ["lm_head"])) == {"lm_head"}


def test_model_without_linear_layers() -> None:
    with pytest.raises(ConfigError, match="no linear layer"):
        find_targets(nn.Sequential(nn.Embedding(4, 4)), "all-linear")


def test_rank_larger_than_a_layer_is_refused_and_changes_nothing() -> None:
    model = build("llama")
    with pytest.raises(
        ConfigError, match=r"relora\.rank=33: larger than layer 'model.layers.0.self_attn.q_proj'.*use at most 32"
    ):
        wrap(model, rank=33, alpha=ALPHA)
    assert list(relora_layers(model)) == []
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_narrowest_layer_says_what_rank_there_can_be() -> None:
    """Qwen2-MoE has a gate with one output among its linear layers, for which no rank is worth its while."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 1))
    way_out = r"larger than layer '1' of \(1, 6\); use at most 1, or name only wider layers in relora\.targets"
    with pytest.raises(ConfigError, match=way_out):
        wrap(model, rank=7, alpha=ALPHA)


def test_a_forward_pass_that_was_put_in_the_place_of_a_layers_own_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6))
    model[0].forward = lambda x: 2 * nn.Linear.forward(model[0], x)  # as libraries that offload weights do
    with pytest.raises(ConfigError, match="relora.targets='0': is a Linear whose forward pass was put in the place of its own"):
        find_targets(model, ["0"])
    assert list(find_targets(model, "all-linear")) == ["1"]


@pytest.mark.parametrize("targets", ["all-linear", ["first"], ["second"]], ids=str)
def test_two_modules_with_one_weight_are_refused(targets: str | list[str]) -> None:
    model = nn.ModuleDict({"first": nn.Linear(6, 6), "second": nn.Linear(6, 6), "third": nn.Linear(6, 6)})
    model["second"].weight = model["first"].weight
    with pytest.raises(ConfigError, match=r"relora\.targets='(first|second)': shares its weight with '(first|second)'"):
        wrap(model, rank=2, alpha=4.0, targets=targets)
    assert list(relora_layers(model)) == []
    assert set(find_targets(model, ["third"])) == {"third"}


def test_tied_head_cannot_be_a_target() -> None:
    with pytest.raises(ConfigError, match="'lm_head': shares its weight with 'transformer.wte'"):
        find_targets(build("gpt2"), ["lm_head"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_linear_passes_over_frozen_layers(architecture: str) -> None:
    """Conv1D as well."""
    model, every = build(architecture), set(find_targets(build(architecture), "all-linear"))
    name = next(name for name in every if name.startswith(f"{LAYERS[architecture]}.1."))
    weight = model.get_submodule(name).weight.requires_grad_(False)
    wrap(model, rank=2, alpha=4.0)
    assert {layer for layer, _ in relora_layers(model)} == every - {name}
    assert model.get_submodule(name).weight is weight and not weight.requires_grad
    assert weight not in {p for group in param_groups(model) for p in group["params"]}


@pytest.mark.parametrize("targets", ["q_proj", ["self_attn.q_proj"], ["q_proj", "all-linear"]], ids=str)
def test_parts_of_paths_pass_over_frozen_layers(targets: str | list[str]) -> None:
    chosen = find_targets(frozen_llama(), targets)
    assert FROZEN not in chosen and FROZEN.replace("0", "1") in chosen


@pytest.mark.parametrize(
    ("target", "frozen", "problem"),
    [
        (FROZEN, [FROZEN], f"layer '{FROZEN}' is frozen"),
        ("layers.0.self_attn.q_proj", [FROZEN], f"layer '{FROZEN}' is frozen"),
        (
            "layers.0.self_attn",
            ["model.layers.0"],
            r"all its layers \('model\.layers\.0\.self_attn\.q_proj', \.\.\.\) are frozen",
        ),
        ("all-linear", ["model"], r"all its layers \(.*\) are frozen"),
        ("output-head", ["lm_head"], "layer 'lm_head' is frozen"),
        ("input-embedding", ["model.embed_tokens"], "layer 'model.embed_tokens' is frozen"),
        ("embed_tokens", ["model.embed_tokens"], "layer 'model.embed_tokens' is frozen"),
    ],
)
@pytest.mark.parametrize("others", [[], ["v_proj"]], ids=["alone", "beside others"])
def test_frozen_layers_that_are_asked_for_are_refused(target: str, frozen: list[str], problem: str, others: list[str]) -> None:
    model = frozen_llama(*frozen)
    others = [] if target == "all-linear" else others
    message = rf"^relora\.targets='{target}': {problem} \(requires_grad=False\).*; call requires_grad_\(True\) on what is to be"
    with pytest.raises(ConfigError, match=message) as caught:
        find_targets(model, [*others, target])
    assert "\n" not in str(caught.value)


def test_a_layer_whose_bias_alone_is_frozen_is_wrapped() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].bias.requires_grad_(False)
    wrap(model, rank=2, alpha=4.0)
    assert [name for name, _ in relora_layers(model)] == ["0", "1"]
    assert not model[0].bias.requires_grad


def test_frozen_layers_that_share_a_weight_are_no_obstacle() -> None:
    model = nn.ModuleDict({"first": nn.Linear(6, 6), "second": nn.Linear(6, 6), "third": nn.Linear(6, 6)})
    model["second"].weight = model["first"].weight
    model["first"].weight.requires_grad_(False)
    assert set(find_targets(model, "all-linear")) == {"third"}


def test_tied_and_frozen_vocabulary_stays_so() -> None:
    model = frozen_llama("lm_head", tie_word_embeddings=True)
    wrap(model, rank=2, alpha=4.0)
    assert not model.get_input_embeddings().weight.requires_grad
    with pytest.raises(ConfigError, match=r"targets='input-embedding': layer 'model.embed_tokens' is frozen"):
        find_targets(frozen_llama("lm_head", tie_word_embeddings=True), "input-embedding")


def test_what_wrapping_takes_out_of_the_gradients_is_not_taken_for_frozen() -> None:
    first, second = frozen_llama(), frozen_llama()
    wrap(first, rank=2, alpha=4.0)
    wrap(second, rank=2, alpha=4.0)
    assert [name for name, _ in relora_layers(first)] == [name for name, _ in relora_layers(second)]
    first.get_submodule(FROZEN).requires_grad_(True)
    assert set(find_targets(first, "all-linear")) == {FROZEN}
    wrap(first, rank=2, alpha=4.0)
    with pytest.raises(ConfigError, match="no linear layer besides its output head"):
        find_targets(first, "all-linear")


# Layers that are no plain linear layers


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class Bits(nn.Linear):
    """As quantising libraries write them: a scale beside the weight."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(num_in, num_out)
        self.register_buffer("step", torch.ones(num_out, 1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.step, self.bias)


class Router(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).topk(1)


class Named(nn.Linear):
    """A name and nothing else."""


class OwnConv1D(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


def computed() -> nn.Linear:
    return parametrize.register_parametrization(nn.Linear(4, 4), "weight", nn.Tanh())


def quantised(dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=dtype), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("layer", "problem"),
    [
        (Scaled(4, 4), "is a Scaled, which does more than multiply by its weight; leave it out"),
        (Bits(4, 4), "is a Bits, which does more than"),
        (Router(4, 4), "is a Router, which does more than"),
        (OwnConv1D(4, 4), "is a OwnConv1D, which does more than"),
        (computed(), "is a ParametrizedLinear whose weight is computed from others; leave it out, or make"),
        (quantised(torch.int8), r"its weight is kept in torch\.int8; load the model without quantisation"),
        (quantised(torch.uint8), r"its weight is kept in torch\.uint8; "),
        (quantised(torch.float8_e4m3fn), r"its weight is kept in torch\.float8_e4m3fn; "),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_that_factors_cannot_stand_for(layer: nn.Linear, problem: str) -> None:
    model = nn.ModuleDict({"odd": layer, "plain": nn.Linear(4, 4)})
    assert set(find_targets(model, "all-linear")) == {"plain"}
    for targets in (["odd"], ["plain", "odd"]):
        with pytest.raises(ConfigError, match=rf"^relora\.targets='odd': {problem}"):
            wrap(model, rank=2, alpha=4.0, targets=targets)
    with pytest.raises(ConfigError, match=rf"^relora\.targets='odd': {problem}"):
        find_targets(nn.ModuleDict({"odd": layer}), "all-linear")
    assert list(relora_layers(model)) == []


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, Named, FalconLinear])
def test_subclasses_that_multiply_alone_are_plain(kind: type[nn.Linear], bias: bool) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with torch.device("meta"):
        layer = kind(8, 4, bias=bias)
    assert obstacle(layer) is None
    assert torch.equal(torch.rand(1), expected), "no random number is drawn"


def test_falcon_gets_factors_and_a_router_that_is_a_linear_layer_does_not() -> None:
    for model_type, passed_over in (("falcon", set()), ("phimoe", {"model.layers.0.mlp.router"})):
        sizes = {key: value for key, value in TINY_LLAMA.items() if key not in ("intermediate_size", "max_position_embeddings")}
        sizes |= {"model_type": model_type, "num_hidden_layers": 1}
        if model_type == "phimoe":
            sizes["num_key_value_heads"] = 4  # by default 8
        model = models.build_meta(models.hf_config(Model(config=sizes), VOCAB_SIZE))
        linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"}
        assert linears - set(find_targets(model, "all-linear")) == passed_over
