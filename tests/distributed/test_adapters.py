"""First weights from checkpoints that DeepSpeed itself wrote."""

from __future__ import annotations

import warnings
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from relora_ds.errors import ConfigError
from relora_ds.models import adapters
from tests.distributed import common
from tests.distributed.pool import run

FROZEN = "model.norm.weight"


def train_and_save(
    folder: Path, stage: int, dtype: str, tied: bool, data_types: dict[str, str] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Three updates of a full-rank model of which one parameter is frozen, saved by DeepSpeed; (fp32 masters, module)."""
    model = common.tiny_llama(tie_word_embeddings=tied)
    model.get_parameter(FROZEN).requires_grad_(False)
    config = common.deepspeed_config(stage=stage, dtype=dtype, lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, config=config | ({"data_types": data_types} if data_types else {}))
    for index in range(3):
        common.train_update(engine, index)
    engine.save_checkpoint(str(folder), tag="global_step3")
    module = {name: param.detach().clone() for name, param in engine.module.named_parameters()}
    masters = {}
    if stage > 0 and not data_types:
        named = engine.module.named_parameters()
        masters = {name: safe_get_full_fp32_param(param).clone() for name, param in named if name != FROZEN}
    common.end(engine)
    return masters, module


def read(folder: Path, tied: bool) -> dict[str, Tensor]:
    """What the source gives, by a parameter's first name; plain checkpoints need no trust."""
    model = common.tiny_llama(tie_word_embeddings=tied)
    source = adapters.deepspeed_weights(folder, model, trust=False)
    names: dict[nn.Parameter, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(name)
    return {aliases[0]: source(aliases, param) for param, aliases in names.items()}


@pytest.mark.parametrize(("stage", "dtype", "tied"), [(1, "bf16", False), (2, "bf16", True), (2, "fp32", False)])
def test_zero_gives_its_masters(tmp_path: Path, capfd: pytest.CaptureFixture[str], stage: int, dtype: str, tied: bool) -> None:
    masters, module = run(2, train_and_save, tmp_path, stage, dtype, tied)[0]
    capfd.readouterr()
    for folder in (tmp_path, tmp_path / "global_step3"):
        values = read(folder, tied)
        assert capfd.readouterr() == ("", ""), "DeepSpeed's lines and progress bar must not reach the screen"
        assert values.keys() == module.keys() == {*masters, FROZEN}
        for name, master in masters.items():
            assert values[name].dtype == torch.float32
            assert torch.equal(values[name], master)
            assert torch.equal(values[name].to(module[name].dtype), module[name])
        assert torch.equal(values[FROZEN], module[FROZEN])
    if dtype == "bf16":
        rounded = [name for name, master in masters.items() if torch.equal(master, module[name].float())]
        assert not rounded, "masters that are what bf16 can hold would prove nothing"
        assert module[FROZEN].dtype == torch.bfloat16


def test_no_zero_gives_the_modules_weights(tmp_path: Path) -> None:
    _, module = run(2, train_and_save, tmp_path, 0, "bf16", False)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = read(tmp_path, False)
    assert values.keys() == module.keys()
    assert all(value.dtype == torch.bfloat16 and torch.equal(value, module[name]) for name, value in values.items())


def test_masters_that_deepspeed_cannot_read_are_told(tmp_path: Path) -> None:
    """ZeRO 1 in bf16 with gradients accumulated in fp32 has an optimizer, and a format, of its own."""
    _, module = run(2, train_and_save, tmp_path, 1, "bf16", False, {"grad_accum_dtype": "fp32"})[0]
    with pytest.warns(UserWarning, match="cannot read the fp32 masters"):
        values = read(tmp_path, False)
    assert all(torch.equal(value, module[name]) for name, value in values.items())


def test_a_checkpoint_with_a_rank_missing_is_refused(tmp_path: Path) -> None:
    run(2, train_and_save, tmp_path, 2, "bf16", False)
    (tmp_path / "global_step3" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(ConfigError, match=r"cannot be read: ValueError: Expected 2 of '\*_optim_states.pt'") as raised:
        read(tmp_path, False)
    assert "\n" not in str(raised.value)
