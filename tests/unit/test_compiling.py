"""Blocks compiled one for all: the same training, the same names, nothing compiled again at a restart."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from relora_ds import lora
from relora_ds.compiling import blocks, compile_blocks, is_wanted
from tests.distributed.common import tiny_gpt2, tiny_llama, tiny_neox


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_neox])
def test_the_blocks_of_a_model(build: type) -> None:
    assert len({type(block) for block in blocks(build())}) == 1
    assert len(list(blocks(build()))) == 2
    assert list(blocks(nn.Linear(2, 2))) == []


def test_auto_is_for_cuda() -> None:
    assert not is_wanted("auto", torch.device("cpu"))
    assert is_wanted(True, torch.device("cpu"))
    assert not is_wanted(False, torch.device("cuda"))


def train(model: nn.Module, updates: int) -> list[float]:
    """Losses of a few plain updates, with a merge and fresh factors after each."""
    losses = []
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for update in range(updates):
        ids = torch.randint(61, (3, 16), generator=generator)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        for name, layer in lora.relora_layers(model):
            assert layer.weight is not None
            layer.weight.merge(layer.change(layer.lora_A.detach(), layer.lora_B.detach()))
            layer.reset(name, 0, update)
    return losses


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_model_trains_as_before_and_is_compiled_once(checkpointing: bool) -> None:
    """Two blocks, four updates with restarts: one graph forward for both blocks."""
    found = []
    counter = CompileCounterWithBackend("aot_eager")
    for compiles in (False, True):
        model = tiny_llama().train()
        model.config.use_cache = False
        lora.wrap_layers(model, lora.find_targets(model, "all-linear"), rank=3, alpha=6.0)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        names = list(model.state_dict())
        if compiles:
            assert compile_blocks(model, backend=counter) == 2
        found.append(train(model, 4))
        assert list(model.state_dict()) == names
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1
