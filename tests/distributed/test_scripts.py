"""A training loop of one's own: what it is told of restarts, and the way from its engine and its checkpoint to models."""

from __future__ import annotations

import io
import shutil
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import relora_ds
from relora_ds.checkpoint.reader import locate
from relora_ds.errors import ConfigError
from relora_ds.models.adapters import deepspeed_weights, peft_base
from tests.distributed import common
from tests.distributed.pool import run

RELORA = {"restart_every": 4, "restart_warmup": 2}
KINDS = {"llama": common.tiny_llama, "gpt2": common.tiny_gpt2}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=common.batch(77)).logits


def train_and_give_out(folder: str, kind: str, relora: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Some updates beyond a restart; then every way out of the script, and what rank 0 was told."""
    place, told, rates = Path(folder), io.StringIO(), []
    engine = common.build(KINDS[kind](), {**RELORA, **relora}, dtype=dtype)
    with redirect_stderr(told):
        for index in range(7):
            common.train_update(engine, index)
            rates.append((engine.get_lr(), [group["lr"] for group in engine.optimizer.param_groups]))
    engine.save_checkpoint(place / "script")
    relora_ds.export_model(engine, place / "model", dtype=torch.float32)
    relora_ds.export_adapter(engine, place / "adapter", dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"is an engine.*relora_ds\.export_model\(engine, folder\)"):
        relora_ds.merge_and_unload(engine)
    model, restart = engine.module, engine.optimizer.last_restart
    dist.barrier()  # all that rank 0 wrote is there
    before = common.fixed_loss(engine)
    assert before == common.fixed_loss(engine), "an export leaves the engine as it is"
    relora_ds.release(engine)
    wrapped = logits(model.float())
    assert relora_ds.merge_and_unload(model) is model and not any("lora" in name for name, _ in model.named_parameters())
    return {"wrapped": wrapped, "merged": logits(model), "told": told.getvalue(), "rates": rates, "restart": restart.restart}


@pytest.mark.parametrize(
    ("kind", "relora", "dtype"),
    [
        ("llama", {}, "fp32"),
        ("gpt2", {}, "fp32"),
        ("llama", {"frozen": {"dtype": "int8", "group_size": 16, "master": "sharded"}, "trainable_scaling": True,
                   "targets": common.WITH_VOCABULARY}, "bf16"),
    ],
    ids=["llama", "gpt2", "int8"],
)  # fmt: skip
def test_all_ways_lead_to_the_same_model(tmp_path: Path, kind: str, relora: dict[str, Any], dtype: str) -> None:
    results = run(2, train_and_give_out, str(tmp_path), kind, relora, dtype)
    expected = results[0]["wrapped"]
    relora_ds.export_model(tmp_path / "script", tmp_path / "from_folder", dtype=torch.float32)
    relora_ds.export_model(tmp_path / "script" / "global_step7", tmp_path / "from_tag", dtype=torch.float32)
    relora_ds.export_adapter(tmp_path / "script", tmp_path / "adapter_of_folder", dtype=torch.float32)
    near = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(results[0]["merged"], expected, **near)
    for name in ("model", "from_folder", "from_tag"):
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / name)), expected, **near)
    for name in ("adapter", "adapter_of_folder"):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / name / "base")
        before = logits(base)
        torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path / name)), expected, **near)
        assert not torch.allclose(before, expected, atol=1e-4), "the factors matter"
    with pytest.raises(ConfigError, match=r"OUT=.*is not empty"):
        relora_ds.export_model(tmp_path / "script", tmp_path / "model")


def test_an_adapter_may_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe finds its base from anywhere, PEFT's own loader from inside the folder."""
    expected = run(2, train_and_give_out, str(tmp_path), "llama", {}, "fp32")[0]["wrapped"]
    moved = Path(shutil.move(tmp_path / "adapter", tmp_path / "moved"))
    assert peft_base(moved) == str(moved / "base")
    monkeypatch.chdir(moved)
    torch.testing.assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(".")), expected, rtol=0, atol=1e-5)


def test_a_script_is_told_of_its_restarts(tmp_path: Path) -> None:
    first, second = run(2, train_and_give_out, str(tmp_path), "llama", {}, "fp32")
    (line,) = first["told"].splitlines()
    assert line.startswith("[relora-ds] update 4: restart 1, merged change ") and second["told"] == ""
    assert first["restart"] == second["restart"] == 1
    used, groups = zip(*first["rates"], strict=True)
    assert [lr for lr, *_ in used] == pytest.approx([0.01, 0.01, 0.01, 0.01, 0.0, 0.005, 0.01]), (
        "what get_lr says is what is used"
    )
    assert all(lr == 0.01 for lrs in groups for lr in lrs), "schedulers see their own values"


def test_other_commands_name_the_way_out(tmp_path: Path) -> None:
    run(2, train_and_give_out, str(tmp_path), "llama", {}, "fp32")
    with pytest.raises(ConfigError, match=r"RUN_DIR=.*is a script's checkpoint.*relora-ds export"):
        locate(tmp_path / "script")
    with pytest.raises(ConfigError, match=r"model\.weights=.*in factors.*relora-ds export.*model\.path"):
        deepspeed_weights(tmp_path / "script", common.tiny_llama(), trust=False)


def losses_after_a_load(folder: str, how: dict[str, Any]) -> list[float]:
    """Of a fixed batch, when the checkpoint was written, loaded into a model of other weights, and after a restart there that changes
    nothing."""
    relora = {"restart_every": 2, "restart_warmup": 0, "frozen": {"master": "sharded"}}
    first = common.build(common.tiny_llama(), relora)
    for index in range(3):
        common.train_update(first, index)
    first.save_checkpoint(folder)
    seen = [common.fixed_loss(first)]
    common.end(first)
    second = common.build(common.tiny_llama(seed=5), relora, lr=0.0)
    second.load_checkpoint(folder, **how)
    seen.append(common.fixed_loss(second))
    for index in range(2):
        common.train_update(second, index)
    assert second.optimizer.last_restart is not None
    seen.append(common.fixed_loss(second))
    common.end(second)
    return seen


@pytest.mark.parametrize("how", [{"load_module_only": True}, {"load_optimizer_states": False}], ids=["module", "no states"])
def test_a_load_without_optimizer_states_brings_the_frozen_weights_master(tmp_path: Path, how: dict[str, bool]) -> None:
    """Else the next restart would merge into the weights that were there before, and put these into the module."""
    written, loaded, restarted = run(2, losses_after_a_load, str(tmp_path), how)[0]
    assert loaded == pytest.approx(written, abs=1e-5)
    assert restarted == pytest.approx(written, abs=1e-5)
