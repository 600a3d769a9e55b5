"""Which parameters are the vocabulary, and the optimizer groups that they get."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from relora_ds.errors import ConfigError
from relora_ds.method import lora
from relora_ds.zero.vocabulary import VOCABULARY_GROUP, Words, apart, words_of

SIZES = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama(tied: bool = False) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))


def test_embedding_and_head_of_which_the_embedding_has_rows_of_zeros() -> None:
    model = llama()
    words = words_of(model)
    assert [id(p) for p in words.params] == [id(model.model.embed_tokens.weight), id(model.lm_head.weight)]
    ids = torch.tensor([[1, 2, 1]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert words.sparse is model.model.embed_tokens.weight
    assert words.sparse.grad.ne(0).any(1).nonzero().flatten().tolist() == [1, 2]
    assert model.lm_head.weight.grad.ne(0).any(1).all()


def test_a_tied_weight_is_one_and_has_a_gradient_for_every_token() -> None:
    model = llama(tied=True)
    assert words_of(model) == Words((model.lm_head.weight,), None)


def test_what_is_not_trained_is_left_out() -> None:
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    lora.wrap(model, rank=2, alpha=4.0, targets=["lm_head", "q_proj"])
    assert words_of(model) == Words()
    with pytest.raises(ConfigError, match="get_input_embeddings"):
        words_of(nn.Linear(2, 2))


def test_the_groups_come_last_and_keep_their_settings() -> None:
    model = llama()
    words = words_of(model)
    groups = [
        {"params": [words.params[0], model.model.norm.weight], "weight_decay": 0.5},
        {"params": [words.params[1]], "lr": 0.1, "name": "head"},
    ]
    rest, first, second = apart(groups, words.params)
    assert [rest["weight_decay"], first["weight_decay"], second["lr"]] == [0.5, 0.5, 0.1]
    assert [id(p) for group in (rest, first, second) for p in group["params"]] == [
        id(model.model.norm.weight), id(words.params[0]), id(words.params[1]),
    ]  # fmt: skip
    assert first["name"] == second["name"] == VOCABULARY_GROUP
    assert words.among([words.params[1]]) == Words((words.params[1],), None)
    with pytest.raises(ConfigError, match="nothing but the vocabulary is trained"):
        apart([{"params": list(words.params)}], words.params)
