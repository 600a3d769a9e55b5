"""Runs that start from other tools' weights, and factors that go to them, through the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import relora_ds
from relora_ds.checkpoint import reader as checkpoints
from relora_ds.config import parse
from relora_ds.errors import ConfigError
from relora_ds.models.export import export_adapter, load_merged
from relora_ds.run.folder import RunFolder
from relora_ds.training import phases
from relora_ds.training.preflight import check
from tests.conftest import TINY_LLAMA
from tests.distributed import common
from tests.distributed.pool import run
from tests.distributed.test_training import at, train_here

CPU = torch.device("cpu")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(1))
    return model.eval()(input_ids=ids).logits


def first_model(settings: dict[str, Any]) -> nn.Module:
    checked = check(parse(settings), Path("recipe.yaml"), 1)
    return phases.initial_model(checked, CPU, checked.config.phase_of(1))


@pytest.mark.parametrize("warm_start", [0, 2])
def test_a_run_starts_from_a_peft_adapter(settings: dict[str, Any], tmp_path: Path, warm_start: int) -> None:
    """The adapter merged into the base that it names, in either phase."""
    base = load_fresh(settings)
    base.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"]),
    )
    for name, param in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(param, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    settings["model"] = {"path": str(tmp_path / "adapter")}
    settings["relora"]["warm_start"] = warm_start
    torch.testing.assert_close(logits(first_model(settings)), logits(adapted), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(adapted), logits(base), atol=1e-2)


def load_fresh(settings: dict[str, Any]) -> Any:
    return first_model({**settings, "method": "full"})


def full_rank_deepspeed(folder: str) -> None:
    """A plain DeepSpeed run, without this project's training: some updates and a checkpoint."""
    model = common.tiny_llama(**{key: value for key, value in TINY_LLAMA.items() if key != "model_type"}, vocab_size=300)
    engine, *_ = relora_ds.initialize(model=model, config=common.deepspeed_config())
    for index in range(3):
        common.train_update(engine, index)
    engine.save_checkpoint(folder)
    engine.module.save_pretrained(f"{folder}_hf")
    common.end(engine)


def test_a_run_starts_from_a_plain_deepspeed_checkpoint(settings: dict[str, Any], tmp_path: Path) -> None:
    run(2, full_rank_deepspeed, str(tmp_path / "plain"))
    settings["model"]["weights"] = str(tmp_path / "plain")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "plain_hf")
    assert torch.equal(logits(first_model(settings)), logits(expected))
    settings["model"]["path"] = str(tmp_path / "plain_hf")
    del settings["model"]["config"]
    with pytest.raises(ConfigError, match=r"model\.weights=.*leave out this or model\.path"):
        parse(settings)


@pytest.mark.parametrize(
    "relora",
    [
        {},
        {
            "frozen": {"dtype": "int8", "group_size": 16, "master": "sharded"},
            "trainable_scaling": True,
            "targets": common.WITH_VOCABULARY,
        },
    ],
)
def test_current_factors_as_a_peft_adapter(settings: dict[str, Any], tmp_path: Path, relora: dict[str, Any]) -> None:
    """PEFT's model over the exported base computes what the run's does; from any checkpoint."""
    settings["relora"] |= relora
    settings["train"] |= {"checkpoint_every": 12, "updates": 18}
    settings["wandb"] = {"mode": "disabled"}
    run(2, train_here, at(settings, tmp_path / "run"))
    for number, place in enumerate((tmp_path / "run", checkpoints.find_all(RunFolder(tmp_path / "run"))[0])):
        out = export_adapter(place, tmp_path / f"out{number}")
        base = AutoModelForCausalLM.from_pretrained(out / "base")
        before = logits(base)
        adapted = PeftModel.from_pretrained(base, out)
        torch.testing.assert_close(logits(adapted), logits(load_merged(place)), rtol=0, atol=1e-5)
        assert not torch.allclose(logits(adapted), before, atol=1e-4), "the factors matter"
    with pytest.raises(ConfigError, match="is not empty"):
        export_adapter(tmp_path / "run", tmp_path / "out0")
