"""Layers whose weight the module around them multiplies by itself: they stay as they are, and the model trains and evaluates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM

from relora_ds.errors import ConfigError
from relora_ds.method.lora import relora_layers, wrap
from relora_ds.method.owners import multiplies_itself
from relora_ds.method.targets import find_targets


class Mamba(nn.Module):
    """transformers' own, whose mixer multiplies by dt_proj's weight."""

    apart = "model.backbone.layers.0.mixer.dt_proj"

    def __init__(self) -> None:
        super().__init__()
        sizes = {"vocab_size": 11, "hidden_size": 8, "state_size": 4, "num_hidden_layers": 1, "pad_token_id": None}
        self.model = MambaForCausalLM(MambaConfig(**sizes))

    def get_output_embeddings(self) -> nn.Module:
        return self.model.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


class Encoder(nn.Module):
    """torch's own blocks, which have a fast path for evaluations as well."""

    apart = "block.self_attn.out_proj"

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.block(self.embedding(ids))


@pytest.mark.parametrize("kind", [Mamba, Encoder])
def test_such_layers_are_passed_over(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, ids = kind(), torch.arange(6).view(1, 6)
    with torch.no_grad():
        before = model.eval()(ids)
    wrap(model.train(), rank=1, alpha=2.0)
    wrapped = {name for name, _ in relora_layers(model)}
    assert wrapped and kind.apart not in wrapped
    model(ids).sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids), before, rtol=0, atol=1e-5)


def test_naming_one_is_refused() -> None:
    problem = rf"relora\.targets='{Encoder.apart}': the MultiheadAttention that holds it multiplies by its weight itself"
    with pytest.raises(ConfigError, match=problem):
        find_targets(Encoder(), ["linear1", "out_proj"])


def test_what_else_is_read_of_a_weight_is_no_product() -> None:
    """The class of this owner initialises a layer and asks for its dtype; BLOOM takes slices of one, in a branch for checks."""

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer, self.linear, self.router = (nn.Linear(3, 3) for _ in range(4))
            nn.init.zeros_(self.inner.weight)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x.to(self.inner.weight.dtype)) @ self.outer.weight
            x = self.linear(x.to(self.linear.weight.dtype)) + F.linear(x, self.inner.weight[:, :3])
            return F.linear(x, self.router.weight.type(torch.float32))

    owner = Owner()
    assert [name for name, layer in owner.named_children() if multiplies_itself(owner, layer)] == ["outer", "router"]
