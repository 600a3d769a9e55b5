"""Blocks compiled one for all: the same training, the same names, nothing compiled again at a restart."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

from relora_ds.errors import ConfigError
from relora_ds.method import lora
from relora_ds.method.targets import find_targets
from relora_ds.models.compiling import compile_blocks, is_wanted, obstacle
from relora_ds.models.weights import blocks
from relora_ds.training.phases import _compiled
from relora_ds.training.preflight import _check_compile
from tests.distributed.common import tiny_gpt2, tiny_llama, tiny_neox
from tests.unit.test_config import judge


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_neox])
def test_the_blocks_of_a_model(build: type) -> None:
    assert len({type(block) for _, block in blocks(build())}) == 1
    assert len(blocks(build())) == 2
    assert blocks(nn.Linear(2, 2)) == []


def test_auto_is_for_cuda() -> None:
    assert not is_wanted("auto", torch.device("cpu"))
    assert is_wanted(True, torch.device("cpu"))
    assert not is_wanted(False, torch.device("cuda"))


@pytest.mark.parametrize("choice", ["auto", True, False])
def test_a_phases_engine_gets_what_the_recipe_says(recipe: Path, choice: bool | str) -> None:
    checked = judge(recipe, f"model.compile={str(choice).lower()}")
    engine = SimpleNamespace(module=tiny_llama(), device=torch.device("cpu"))
    assert _compiled(engine, checked) is engine
    compiled = [block._compiled_call_impl is not None for _, block in blocks(engine.module)]
    assert compiled == [choice is True] * 2


def test_what_cannot_be_compiled_is_told_before_ranks_start(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing_compiler)
    assert obstacle(torch.device("cpu")) == "there is no C++ compiler"
    with pytest.raises(ConfigError, match=r"^model\.compile=True: there is no C\+\+ compiler; install it, or leave compile out$"):
        judge(recipe, "model.compile=true")
    assert judge(recipe).config.model.compile == "auto", "which compiles nothing on a CPU"
    monkeypatch.setattr("relora_ds.models.compiling.has_triton_package", lambda: False)
    line = "model.compile: auto compiles nothing, since Triton is not installed; updates take longer"
    assert _check_compile("auto", torch.device("cuda")) == line
    assert _check_compile(False, torch.device("cuda")) is None


def missing_compiler() -> str:
    raise InvalidCxxCompiler


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
        lora.wrap_layers(model, find_targets(model, "all-linear"), rank=3, alpha=6.0)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        names = list(model.state_dict())
        if compiles:
            assert compile_blocks(model, backend=counter) == 2
        found.append(train(model, 4))
        assert list(model.state_dict()) == names
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1
