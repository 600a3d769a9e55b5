"""transformers does not look for packed sequences; what a model gives is the same to the bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM, masking_utils, modeling_flash_attention_utils

from relora_ds.models.packing import LOOKS, none_packed
from tests.distributed import common

SIZES = {"vocab_size": common.VOCAB, "hidden_size": 20, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2}


def with_a_window() -> nn.Module:
    """Tokens see the four before them: a mask is needed."""
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4))


@pytest.mark.parametrize("build", [common.tiny_llama, common.tiny_gpt2, common.tiny_neox, with_a_window])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_same_to_the_bit(build: Callable[[], nn.Module], attention: str) -> None:
    model, ids = build().eval(), common.batch(0)
    model.set_attn_implementation(attention)
    looking = model(input_ids=ids, labels=ids)
    with none_packed():
        not_looking = model(input_ids=ids, labels=ids)
    assert torch.equal(looking.logits, not_looking.logits) and torch.equal(looking.loss, not_looking.loss)


def test_what_is_put_back() -> None:
    before = [getattr(module, name) for module, name in LOOKS]

    @none_packed()
    def fail() -> None:
        assert masking_utils.find_packed_sequence_indices(torch.tensor([[0, 1, 0, 1]])) is None
        assert not modeling_flash_attention_utils._is_packed_sequence(torch.tensor([[0, 1, 0, 1]]), 1)
        with none_packed():
            pass
        assert masking_utils.find_packed_sequence_indices(torch.tensor([[0, 1, 0, 1]])) is None
        raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fail()
        assert [getattr(module, name) for module, name in LOOKS] == before
    assert modeling_flash_attention_utils._is_packed_sequence(torch.tensor([[0, 1, 0, 1]]), 1)
