"""What can get no factors, over architectures, and the line that says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from relora_ds.config import Model
from relora_ds.method.full_rank import full_rank_line, full_rank_share
from relora_ds.method.targets import find_targets
from relora_ds.models import build as models
from tests.conftest import TINY_LLAMA, VOCAB_SIZE

MOE = TINY_LLAMA | {"num_key_value_heads": 4}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4}
MAMBA = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2}
EXPERTS = ["model.layers.*.mlp.experts.gate_up_proj", "model.layers.*.mlp.experts.down_proj"]
MIXTRAL = MOE | {"model_type": "mixtral", "num_local_experts": 4}


def build(config: dict[str, Any]) -> nn.Module:
    return models.build_meta(models.hf_config(Model(config=config), VOCAB_SIZE))


@pytest.mark.parametrize("config", [TINY_LLAMA, GPT2, TINY_LLAMA | {"model_type": "gpt_neox"}], ids=lambda c: c["model_type"])
def test_models_of_linear_layers_have_nothing_to_say(config: dict[str, Any]) -> None:
    model = build(config)
    assert full_rank_share(model) == {} and full_rank_line(model) is None


@pytest.mark.parametrize(
    "config",
    [
        MIXTRAL,
        MOE | {"model_type": "qwen2_moe", "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
        MOE | {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 32},
        MOE | {"model_type": "gpt_oss", "num_local_experts": 4, "head_dim": 8},
    ],
    ids=lambda c: c["model_type"],
)
def test_experts_in_one_parameter(config: dict[str, Any]) -> None:
    """Shares against a count by name; the targets do not matter."""
    model = build(config)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3)
    routers = sum(p.numel() for name, p in model.named_parameters() if name.endswith(("gate.weight", "router.weight")))
    biases = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name and p.dim() == 2)
    kinds = full_rank_share(model)
    assert list(kinds) == ["3-D parameters", "matrices outside linear layers"]
    assert kinds["3-D parameters"].share == pytest.approx(experts / total, rel=1e-12)
    assert kinds["3-D parameters"].names == EXPERTS
    if config["model_type"] != "qwen2_moe":  # whose shared expert's gate is a linear layer
        assert kinds["matrices outside linear layers"].share == pytest.approx((routers + biases) / total, rel=1e-12)
    assert not set(find_targets(model, "all-linear")) & {
        name.rpartition(".")[0] for name, p in model.named_parameters() if p.dim() == 3
    }


def test_the_line() -> None:
    said = full_rank_line(build(MIXTRAL))
    assert said is not None and "\n" not in said
    share = sum(kind.share for kind in full_rank_share(build(MIXTRAL)).values())
    assert share > 0.5
    assert said.startswith(
        f"{share:.0%} of the parameters can get no factors and stay full-rank: 3-D parameters ({', '.join(EXPERTS)})"
    )


def test_what_is_little_is_not_said() -> None:
    """Mamba's A and convolutions: a tenth of the smallest model, nothing of a real one."""
    model = build(MAMBA)
    assert set(full_rank_share(model)) == {"matrices outside linear layers", "convolutions"}
    assert full_rank_share(model)["convolutions"].names == ["backbone.layers.*.mixer.conv1d.weight"]
    assert full_rank_line(model) is None


class Odd(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(x)


class Mixed(nn.Module):
    """One of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.plain, self.odd, self.image = nn.Linear(4, 5), Odd(4, 10), nn.Conv2d(2, 3, 2)
        self.matrix, self.box = nn.Parameter(torch.zeros(4, 4)), nn.ParameterList([torch.zeros(n, 2, 3) for n in (2, 3, 4, 5, 6)])
        self.again = self.box
        self.vector, self.held = nn.Parameter(torch.zeros(100)), nn.Parameter(torch.zeros(50, 50), requires_grad=False)


def test_kinds_and_shares() -> None:
    model = Mixed()
    total = sum(p.numel() for p in model.parameters())
    found = {name: (round(kind.share * total, 6), kind.names) for name, kind in full_rank_share(model).items()}
    assert found == {
        "3-D parameters": (120, ["box.*"]),
        "weights of Odd, which is no plain linear layer": (40, ["odd.weight"]),
        "convolutions": (24, ["image.weight"]),
        "matrices outside linear layers": (16, ["matrix"]),
    }  # neither vectors nor frozen weights, tables or linear layers; what is registered twice once
    assert full_rank_line(model) is None  # 200 of 2878
    del model.held
    said = full_rank_line(model)
    assert said is not None  # 200 of 378
    assert said.startswith("53% of the parameters can get no factors") and "convolutions (image.weight)" in said


def test_long_lists_of_names_are_cut() -> None:
    model = nn.ParameterDict({name: torch.zeros(2, 2, 2) for name in "abcde"})
    assert (
        full_rank_line(model)
        == "100% of the parameters can get no factors and stay full-rank: 3-D parameters (a, b, c and 2 more)"
    )
