"""What a recipe makes of DeepSpeed's JSON, what it refuses in it, and what is asked of the device and of the engine."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from deepspeed.accelerator import get_accelerator

import relora_ds
from relora_ds import config
from relora_ds.ds_config import fit as ds_config
from relora_ds.errors import ConfigError
from relora_ds.planning.plan import Machine, Planner
from relora_ds.training.preflight import Checked, check
from tests.unit.engine.test_initialize import ZERO_2, model
from tests.unit.test_config import judge

TRAINER: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": "auto", "contiguous_gradients": True},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}
"""As the Hugging Face Trainer's users have it, for which it fills in its own arguments."""


def judged(recipe: Path, deepspeed: dict[str, Any], ranks: int = 1, **on: bool) -> Checked:
    settings = yaml.safe_load(recipe.read_text())
    settings["deepspeed"] = deepspeed
    recipe.write_text(yaml.safe_dump(settings))
    return check(config.load(recipe), recipe, ranks, **on)


def refused(recipe: Path, deepspeed: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        judged(recipe, deepspeed)
    return str(caught.value)


def test_a_file_of_the_trainer_says_no_precision(recipe: Path) -> None:
    line = refused(recipe, TRAINER)
    assert line.startswith("deepspeed.bf16.enabled='auto': says nothing here")
    assert line.endswith("write true or false")


def test_a_file_of_the_trainer_gets_the_recipes_values(recipe: Path) -> None:
    fitted = judged(recipe, {**TRAINER, "bf16": {"enabled": True}}, ranks=2).deepspeed
    assert fitted["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert fitted["fp16"]["enabled"] is False
    assert (fitted["train_batch_size"], fitted["train_micro_batch_size_per_gpu"]) == (8, 2)
    assert (fitted["gradient_accumulation_steps"], fitted["gradient_clipping"]) == (2, 1.0)
    assert fitted["zero_optimization"] == {"stage": 2, "overlap_comm": True, "contiguous_gradients": True}
    assert "auto" not in json.dumps(fitted)


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_a_section_that_the_recipe_decides_is_refused_with_and_without_auto(recipe: Path, section: str) -> None:
    line = refused(recipe, {**TRAINER, section: {"type": "AdamW", "params": {"lr": "auto"}}})
    assert line.startswith(f"deepspeed.{section}='AdamW': the recipe's optimizer section decides this")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"managed_gradient_accumulation": False}, "deepspeed.managed_gradient_accumulation=False: every micro batch would"),
        ({"managed_gradient_accumulation": 0}, "deepspeed.managed_gradient_accumulation=0: every micro batch would"),
        ({"managed_gradient_accumulation": "false"}, "deepspeed.managed_gradient_accumulation='false': every micro batch"),
        ({"gradient_allreduce_op": "SUM"}, "deepspeed.gradient_allreduce_op='sum': an update is the mean"),
        ({"data_types": {"buffer_dtype": "bfloat16"}}, "deepspeed.data_types.buffer_dtype='bf16': it would cast the stores"),
        ({"data_types": {"buffer_dtype": "float"}}, "deepspeed.data_types.buffer_dtype='fp32': it would cast the stores"),
        ({"data_types": {"grad_accum_dtype": "int8"}}, "deepspeed.data_types.grad_accum_dtype='int8': gradients come in bf16"),
        ({"data_types": {"grad_accum_dtype": "half"}}, "deepspeed.data_types.grad_accum_dtype='fp16': gradients come in bf16"),
        ({"data_types": {"param_dtype": "half"}}, "deepspeed.data_types.param_dtype='fp16': the sections bf16 and fp16 say bf16"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "deepspeed.torch_autocast.enabled=True: frozen weights"),
        ({"torch_autocast": {"enabled": "false"}}, "deepspeed.torch_autocast.enabled='false': frozen weights"),
        ({"amp": {"enabled": True}}, "deepspeed.amp={'enabled': True}: "),
        ({"prescale_gradients": True}, "deepspeed.prescale_gradients=True: DeepSpeed divides after the sum"),
        ({"gradient_predivide_factor": 2.0}, "deepspeed.gradient_predivide_factor=2.0: DeepSpeed divides after the sum"),
        ({"bf16": {"enabled": True, "check_grad_overflow": "no"}}, "deepspeed.bf16.check_grad_overflow=False: non-finite"),
        ({"data_efficiency": {"enabled": True}}, "deepspeed.data_efficiency.enabled=True: the recipe's data section"),
        ({"sequence_parallel_size": "2"}, "deepspeed.sequence_parallel_size='2': "),
        *(
            (
                {"data_types": {"grad_accum_dtype": spelling}, "zero_optimization": {"stage": stage}},
                "deepspeed.data_types.grad_accum_dtype='fp32': with bf16 and stage 1 DeepSpeed takes another optimizer",
            )
            for spelling, stage in (("fp32", 1), ("float32", 1), ("float", 1), ("torch.float32", 1))
        ),
        *(
            ({"zero_optimization": {"stage": 2, **zero}}, line)
            for zero, line in (
                ({"cpu_offload_param": True}, "deepspeed.zero_optimization.offload_param={'device': 'cpu'}: needs ZeRO-3"),
                ({"round_robin_gradients": "true"}, "deepspeed.zero_optimization.round_robin_gradients=True: "),
                ({"compute_grad_norm": "false"}, "deepspeed.zero_optimization.compute_grad_norm=False: "),
                ({"load_from_fp32_weights": 0}, "deepspeed.zero_optimization.load_from_fp32_weights=False: "),
                ({"legacy_stage1": True}, "deepspeed.zero_optimization.legacy_stage1=True: "),
            )
        ),
    ],
    ids=str,
)
def test_refused_by_key_whatever_the_spelling(recipe: Path, changes: dict[str, Any], line: str) -> None:
    bf16 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    judged(recipe, bf16)
    assert refused(recipe, {**bf16, **changes}).startswith(line)


@pytest.mark.parametrize(
    "changes",
    [
        {"data_types": {"grad_accum_dtype": "float32"}},
        {"data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 1, "cpu_offload": True}},
        {"data_types": {"grad_accum_dtype": "bfloat16", "param_dtype": "bf16"}, "zero_optimization": {"stage": 1}},
        {"managed_gradient_accumulation": True, "torch_autocast": {"enabled": False}, "gradient_allreduce_op": "mean"},
        {"prescale_gradients": True, "zero_optimization": {"stage": 2, "reduce_scatter": False}},
        {"fp16": {"enabled": False, "auto_cast": True}},
    ],
    ids=str,
)
def test_what_is_served_passes(recipe: Path, changes: dict[str, Any]) -> None:
    judged(recipe, {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}, **changes})


def test_offload_in_its_old_spelling_is_seen(recipe: Path) -> None:
    fitted = judge(recipe, "deepspeed.zero_optimization.cpu_offload=true").deepspeed
    assert fitted["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert fitted["zero_force_ds_cpu_optimizer"] is False


def test_settings_without_effect_are_named_in_one_line_and_left_out(recipe: Path) -> None:
    checked = judge(recipe, "deepspeed.zero_optimization={stage: 2, zero_quantized_weights: true, stage3_max_live_parameters: 7}")
    for name in ("zero_optimization.zero_quantized_weights", "zero_optimization.stage3_max_live_parameters"):
        assert name in checked.remarks[0]
    assert len(checked.remarks) == 1 and "\n" not in checked.remarks[0]
    assert checked.deepspeed["zero_optimization"] == {"stage": 2}
    assert judge(recipe, "deepspeed.zero_optimization={stage: 2}").remarks == ()
    checked = judge(recipe, "deepspeed={zero_optimization: {stage: 2}, my.own: 3}")
    assert checked.remarks[0].endswith("my.own") and "my.own" not in checked.deepspeed


def test_plan_sees_what_training_sees(recipe: Path) -> None:
    """One reading for both: spellings, sums in another dtype, and "auto"."""
    machine = Machine(gpus=2, gpus_per_node=2, link=1e9, memory=1e9, flops=1e12, on_cuda=False)

    def planner(*overrides: str) -> Planner:
        return Planner(config.load(recipe, overrides), recipe, machine, 300)

    assert planner("deepspeed.bfloat16={enabled: 'true'}").precision == "bf16"
    assert planner("deepspeed.data_types={grad_accum_dtype: float}").precision == "fp32", "the same dtype, so no sums apart"
    assert (
        planner("deepspeed.zero_optimization={stage: 2, overlap_comm: 'off', reduce_bucket_size: auto}").engine().overlap is False
    )
    for overrides, key in (
        (["deepspeed.bf16={enabled: auto}"], "deepspeed.bf16.enabled='auto'"),
        (["deepspeed.zero_optimization.cpu_offload=true"], "deepspeed.zero_optimization.offload_optimizer.device='cpu'"),
        (["deepspeed.bf16={enabled: true}", "deepspeed.data_types={grad_accum_dtype: float}"], "deepspeed.data_types.grad_accum"),
    ):
        with pytest.raises(ConfigError) as caught:
            planner(*overrides)
        assert str(caught.value).startswith(key)


def test_a_file_may_have_comments_as_deepspeed_allows(tmp_path: Path) -> None:
    file = tmp_path / "commented.json"
    file.write_text('{ // here\n"a": "no // comment, no # one \\" /* either */", # there\n/* and\nhere */ "b": {"c": 2}}\n')
    assert ds_config.read(file) == {"a": 'no // comment, no # one " /* either */', "b": {"c": 2}}
    file.write_text("{ /* two\nlines */\n oops }")
    with pytest.raises(ConfigError, match="is not valid JSON: .*line 3"):
        ds_config.read(file)


# The device


def test_a_precision_that_the_device_does_not_have(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this machine runs the ranks; a login node judges nothing for the machines that it submits to."""
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: None)  # what DeepSpeed says of CPUs without
    fp16 = {"fp16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    line = refused(recipe, fp16)
    assert line == "deepspeed.fp16.enabled=True: DeepSpeed does not run fp16 on this machine's CPU; use bf16 or fp32"
    assert ds_config.precision(judged(recipe, fp16, on_cuda=True).deepspeed) == "fp16"
    assert ds_config.precision(judged(recipe, fp16, on_cuda=False).deepspeed) == "fp16"
    with pytest.raises(ConfigError, match=r"deepspeed\.fp16\.enabled=True: DeepSpeed does not run fp16"):
        relora_ds.initialize(model=model(), config={**ZERO_2, **fp16}, relora={"rank": 2, "restart_warmup": 0})
    monkeypatch.setattr(get_accelerator(), "is_bf16_supported", lambda: False)
    line = refused(recipe, {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}})
    assert line == "deepspeed.bf16.enabled=True: DeepSpeed does not run bf16 on this machine's CPU; use fp32"


def test_a_precision_that_the_device_has(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    assert ds_config.precision(judge(recipe, "deepspeed.fp16={enabled: true}").deepspeed) == "fp16"


# The engine, and scripts


def engine(*, bf16: bool = False, fp16: bool = False) -> Any:
    return SimpleNamespace(bfloat16_enabled=lambda: bf16, fp16_enabled=lambda: fp16)


def test_the_engine_says_what_its_precision_is() -> None:
    assert [ds_config.precision_of(one) for one in (engine(), engine(bf16=True), engine(fp16=True))] == ["fp32", "bf16", "fp16"]
    ds_config.refuse_other_precision(engine(bf16=True), "bf16")
    with pytest.raises(ConfigError, match=r"deepspeed\.bf16\.enabled='bf16': DeepSpeed made an engine in fp32 of it"):
        ds_config.refuse_other_precision(engine(), "bf16")
    with pytest.raises(ConfigError, match=r"DeepSpeed made an engine in fp16 of it"):
        ds_config.refuse_other_precision(engine(fp16=True), "fp32")


@pytest.mark.parametrize("relora", [{"rank": 2, "restart_warmup": 0}, None])
@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"bf16": {"enabled": "auto"}}, "deepspeed.bf16.enabled='auto'"),
        ({"train_batch_size": "auto"}, "deepspeed.train_batch_size='auto'"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "deepspeed.optimizer.params.lr='auto'"),
    ],
)
def test_a_script_is_told_of_auto_before_deepspeed_sees_it(relora: Any, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        relora_ds.initialize(model=model(), config={**ZERO_2, **changes}, relora=relora)
    assert str(caught.value).startswith(key)


def test_deepspeeds_timers_are_off_unless_they_are_asked_for(recipe: Path) -> None:
    """They wait for the device in every micro batch."""
    zero = {"zero_optimization": {"stage": 2}}
    assert judged(recipe, zero).deepspeed["timers"] == {"throughput": {"enabled": False}}
    asked = {"timers": {"throughput": {"enabled": True}}}
    assert judged(recipe, {**zero, **asked}).deepspeed["timers"] == asked["timers"]
