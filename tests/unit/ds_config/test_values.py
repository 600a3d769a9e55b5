"""DeepSpeed's JSON as DeepSpeed reads it: spellings, the word "auto", and what DeepSpeed itself would refuse."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from relora_ds.ds_config.values import KEYS, normalise, precision, without_effect
from relora_ds.errors import ConfigError

ZERO_2 = {"zero_optimization": {"stage": 2}}


def refusal(content: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        normalise(content)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, "fp32"),
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"bf16": {"enabled": "true"}}, "bf16"),
        ({"bf16": {"enabled": "True"}}, "bf16"),
        ({"bf16": {"enabled": 1}}, "bf16"),
        ({"bf16": {"enabled": "on"}}, "bf16"),
        ({"bf16": {"enabled": "false"}}, "fp32"),
        ({"bf16": {"enabled": 0}}, "fp32"),
        ({"bf16": {}}, "fp32"),
        ({"bfloat16": {"enabled": True}}, "bf16"),
        ({"bfloat16": {"enabled": "no"}}, "fp32"),
        ({"fp16": {"enabled": "1"}}, "fp16"),
        ({"fp16": {"enabled": "f"}}, "fp32"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": "auto"}}, "bf16"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "yes"}}, "fp16"),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": True}}, "fp16"),
    ],
    ids=json.dumps,
)
def test_the_precision_in_every_spelling(section: dict[str, Any], expected: str) -> None:
    content = normalise({**ZERO_2, **section})
    assert precision(content) == expected
    assert all(content.get(name, {}).get("enabled", False) is (name == expected) for name in ("bf16", "fp16")), "real booleans"


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ({"bf16": {"enabled": "auto"}}, "deepspeed.bf16.enabled='auto': says nothing here"),
        ({"bfloat16": {"enabled": "auto"}}, "deepspeed.bf16.enabled='auto': says nothing here"),
        ({"fp16": {"enabled": "auto"}}, "deepspeed.fp16.enabled='auto': says nothing here"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, "deepspeed.bf16.enabled='auto': says nothing here"),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": "auto"}}, "deepspeed.fp16.enabled='auto': says nothing here"),
        ({"bf16": {"enabled": "Auto"}}, "deepspeed.bf16.enabled='Auto': Input should be a valid boolean"),
        ({"bf16": {"enabled": "maybe"}}, "deepspeed.bf16.enabled='maybe': Input should be a valid boolean"),
        ({"bf16": {"enabled": 2}}, "deepspeed.bf16.enabled=2: Input should be a valid boolean"),
        ({"bf16": {"enabled": None}}, "deepspeed.bf16.enabled=None: Input should be a valid boolean"),
        ({"bf16": True}, "deepspeed.bf16=True: is not a section"),
        ({"bf16": {"enable": True}}, "deepspeed.bf16.enable=True: DeepSpeed has no such setting; did you mean 'enabled'?"),
        ({"bf16": {"enabled": True}, "bfloat16": {"enabled": False}}, "deepspeed.bfloat16={'enabled': False}: is the old name"),
        ({"bf16": {"enabled": "yes"}, "fp16": {"enabled": "yes"}}, "deepspeed.bf16.enabled=True: bf16 and fp16 are both"),
    ],
    ids=str,
)
def test_a_precision_that_nothing_decides_is_refused(section: dict[str, Any], line: str) -> None:
    assert refusal({**ZERO_2, **section}).startswith(line)


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"train_batch_size": "auto"}, "train_batch_size"),
        ({"gradient_accumulation_steps": "auto"}, "gradient_accumulation_steps"),
        ({"gradient_clipping": "auto"}, "gradient_clipping"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "optimizer.params.lr"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, "auto"]}}}, "optimizer.params.betas.1"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}}, "scheduler.params.warmup_num_steps"),
        ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": 2, "overlap_comm": "auto"}}, "zero_optimization.overlap_comm"),
        ({"zero_optimization": {"stage": 2, "allgather_bucket_size": "auto"}}, "zero_optimization.allgather_bucket_size"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "auto"}}},
            "zero_optimization.offload_optimizer.device",
        ),
        ({"fp16": {"enabled": True, "loss_scale": "auto"}}, "fp16.loss_scale"),
        ({"data_types": {"grad_accum_dtype": "auto"}}, "data_types.grad_accum_dtype"),
        ({"communication_data_type": "auto"}, "communication_data_type"),
        ({"steps_per_print": "auto"}, "steps_per_print"),
        ({"activation_checkpointing": {"number_checkpoints": "auto"}}, "activation_checkpointing.number_checkpoints"),
        ({"my": {"own": ["x", {"deep": "auto"}]}}, "my.own.1.deep"),
    ],
    ids=str,
)
def test_auto_is_refused_by_its_key_at_any_depth(content: dict[str, Any], key: str) -> None:
    assert refusal({**ZERO_2, **content}).startswith(f"deepspeed.{key}='auto': ")


def test_auto_where_it_is_deepspeeds_default() -> None:
    """Its own words, and the sizes of buffers that the Trainer makes of a model's width."""
    zero = {"stage": 2, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto", "overlap_comm": True}
    zero["stage3_param_persistence_threshold"] = "auto"
    content = normalise({"zero_optimization": zero, "data_types": {"keep_in_fp32_modules": "auto"}})
    assert content["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert "auto" not in json.dumps(content)


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({"cpu_offload": True}, {"offload_optimizer": {"device": "cpu"}}),
        ({"cpu_offload": "true"}, {"offload_optimizer": {"device": "cpu"}}),
        ({"cpu_offload": False}, {}),
        (
            {"cpu_offload": True, "cpu_offload_use_pin_memory": False},
            {"offload_optimizer": {"device": "cpu", "pin_memory": False}},
        ),
        ({"cpu_offload": 0, "cpu_offload_use_pin_memory": True}, {}),
        ({"cpu_offload_param": True}, {"offload_param": {"device": "cpu"}}),
        ({"round_robin_gradients": "yes"}, {"round_robin_gradients": True}),
        ({"compute_grad_norm": "off"}, {"compute_grad_norm": False}),
        ({"reduce_scatter": "false"}, {"reduce_scatter": False}),
        ({"reduce_bucket_size": 5e7}, {"reduce_bucket_size": 50_000_000}),
        (
            {"offload_optimizer": {"device": "cpu", "pin_memory": "no"}},
            {"offload_optimizer": {"device": "cpu", "pin_memory": False}},
        ),
        ({"offload_optimizer": None}, {"offload_optimizer": None}),
    ],
    ids=str,
)
def test_zero_in_present_names_and_real_types(zero: dict[str, Any], expected: dict[str, Any]) -> None:
    content = normalise({"zero_optimization": {"stage": 2, **zero}})
    assert content["zero_optimization"] == {"stage": 2, **expected}
    assert json.loads(json.dumps(content)) == content
    assert normalise(content) == content


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        *((text, "fp32") for text in ("fp32", "float32", "float", "torch.float32")),
        *((text, "bf16") for text in ("bf16", "bfloat16", "torch.bfloat16")),
        *((text, "fp16") for text in ("fp16", "float16", "half", "torch.float16")),
    ],
)
@pytest.mark.parametrize("key", ["grad_accum_dtype", "param_dtype", "buffer_dtype"])
def test_dtypes_by_their_short_names(key: str, spelling: str, name: str) -> None:
    assert normalise({**ZERO_2, "data_types": {key: spelling}})["data_types"] == {key: name}


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "deepspeed.zero_optimization.overlap_com=True: DeepSpeed has"),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload_params": True}},
            "deepspeed.zero_optimization.cpu_offload_params=True: ",
        ),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload": True, "offload_optimizer": {"device": "none"}}},
            "deepspeed.zero_optimization.cpu_offload=True: is the old name of offload_optimizer",
        ),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload": "perhaps"}},
            "deepspeed.zero_optimization.cpu_offload='perhaps': is neither true nor false",
        ),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload_use_pin_memory": True}},
            "deepspeed.zero_optimization.cpu_offload_use_pin_memory=True: ",
        ),
        ({"zero_optimization": {"stage": 7}}, "deepspeed.zero_optimization.stage=7: "),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}},
            "deepspeed.zero_optimization.offload_optimizer.devise='cpu': DeepSpeed has no such setting",
        ),
        ({"data_types": {"grad_accum_dtype": "fp23"}}, "deepspeed.data_types.grad_accum_dtype='fp23': is no dtype"),
        ({"communication_data_type": "float32"}, "deepspeed.communication_data_type='float32': "),
        ({"amp": {"enabled": True}}, "deepspeed.amp={'enabled': True}: "),
        ({"sparse_gradients": True}, "deepspeed.sparse_gradients=True: "),
        ({"checkpoint": {"tag_validation": "never"}}, "deepspeed.checkpoint={'tag_validation': 'never'}: "),
        ({"compile": {"nothing": 1}}, "deepspeed.compile.nothing=1: DeepSpeed has no such setting"),
        ({"gradient_allreduce_op": "max"}, "deepspeed.gradient_allreduce_op='max': "),
    ],
    ids=str,
)
def test_what_deepspeed_refuses_is_refused_by_key(content: dict[str, Any], line: str) -> None:
    assert refusal({**ZERO_2, **content}).startswith(line)


def test_a_hint_names_the_nearest_setting() -> None:
    assert refusal({"zero_optimization": {"stage": 2, "overlap_com": True}}).endswith("did you mean 'overlap_comm'?")


def test_settings_that_stages_1_and_2_do_not_look_at() -> None:
    idle = {"zero_quantized_gradients": True, "zero_hpz_partition_size": 4, "stage3_max_live_parameters": 10}
    idle |= {"prefetch_bucket_size": 5, "allgather_partitions": False}
    defaults = {"allgather_bucket_size": 7, "stage3_max_reuse_distance": 1e9, "zero_quantized_weights": False}
    content = normalise({"zero_optimization": {"stage": 2, "overlap_comm": True, **idle, **defaults}})
    assert without_effect(content) == [f"zero_optimization.{key}" for key in idle], "defaults need no word"
    assert without_effect(normalise(ZERO_2)) == []
    assert without_effect(normalise({**ZERO_2, "_comment": "mine", "zero3.init": True})) == ["_comment", "zero3.init"]


@pytest.mark.parametrize(
    "key", ["bf_16", "BF16", "bfloat_16", "fp_16", "FP16", "zero_optimisation", "gradient_cliping", "data_type"]
)
def test_a_misspelt_section_is_not_passed_over(key: str) -> None:
    assert "DeepSpeed has no such setting; did you mean " in refusal({**ZERO_2, key: {"enabled": True}})


def test_every_key_that_deepspeed_looks_up_is_known() -> None:
    class Asked(dict):
        """Notes the keys that are looked up in it."""

        names: ClassVar[set[str]] = set()

        def get(self, key: str, default: Any = None) -> Any:
            self.names.add(key)
            return super().get(key, default)

        def __contains__(self, key: object) -> bool:
            self.names.add(str(key))
            return super().__contains__(key)

    content = Asked(train_micro_batch_size_per_gpu=1, **ZERO_2)
    DeepSpeedConfig(content)
    removed = {"compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting", "nebula"}
    removed |= {"progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients"}
    assert {"bf16", "zero_optimization", "checkpoint"} <= Asked.names
    assert Asked.names - KEYS <= removed, "what DeepSpeed has no more, it refuses"
