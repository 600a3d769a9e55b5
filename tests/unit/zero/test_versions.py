"""What DeepSpeed's versions lack is given to them, or refused by its key; the newest one is left as it is."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.zero import stage_1_and_2

from relora_ds.ds_config import values as ds_values
from relora_ds.errors import ConfigError
from relora_ds.zero import versions as zero_versions


class Zero:
    """Stands for the optimizer of some version: two partitions of one flat group, made as DeepSpeed 0.18 makes them."""

    def __init__(self, **of_version: Any) -> None:
        self.flat = torch.cat([torch.ones(6, requires_grad=True)])
        self.bit16_groups_flat = [self.flat]
        self.parallel_partitioned_bit16_groups = [list(self.flat.split(3))]
        self.dtype = torch.float32
        self.averaged_gradients: dict[int, Any] = {}
        self.calls: list[Any] = []
        vars(self).update(of_version)

    def step(self, closure: None = None) -> None:
        self.calls.append("step")

    def check_overflow(self, partition_gradients: bool = True) -> None:
        self.calls.append(partition_gradients)

    def independent_gradient_partition_epilogue(self) -> None:
        self.calls.append(dict(self.averaged_gradients))


@pytest.fixture(autouse=True)
def stage_1_or_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_1_and_2, "DeepSpeedZeroOptimizer", Zero)


def mended(zero: Any, **of_engine: Any) -> Any:
    """An engine around ``zero``, after mending."""
    engine = SimpleNamespace(optimizer=zero, gradient_accumulation_steps=lambda: 4, **of_engine)
    zero_versions.mend(engine)
    return engine


def test_partitions_may_be_written_to_with_gradients_on() -> None:
    zero = Zero()
    with pytest.raises(RuntimeError, match="view"):
        zero.parallel_partitioned_bit16_groups[0][0].mul_(1)
    mended(zero)
    with torch.enable_grad():
        zero.parallel_partitioned_bit16_groups[0][1].fill_(5)
        zero.bit16_groups_flat[0][:1].fill_(7)
    assert zero.flat.tolist() == [7, 1, 1, 5, 5, 5], "the same memory, which the module's parameters look into"


def test_a_loss_is_divided_once() -> None:
    """Where DeepSpeed divides the gradient of each tensor that the model returns."""
    told = []

    def backward(loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> torch.Tensor:
        engine._scale_wrt_gas = scale_wrt_gas
        told.append((loss.item(), scale_wrt_gas))
        return loss

    engine = mended(Zero(), backward=backward, _scale_wrt_gas=True)
    assert engine.backward(torch.tensor(8.0)).item() == 2
    assert engine.backward(torch.tensor(8.0), scale_wrt_gas=False).item() == 8
    assert told == [(2, False), (8, False)]
    assert engine._scale_wrt_gas, "a backward() of the user's own is divided as before"


def test_a_sum_that_is_begun_is_gone_on_with() -> None:
    zero = Zero(all_grad_tensors={0: ["of the first micro batch"], 1: None})
    mended(zero)
    zero.independent_gradient_partition_epilogue()
    assert zero.calls == [{0: ["of the first micro batch"]}], "only where one is begun"


@pytest.mark.parametrize(
    ("dtype", "of_version", "calls"),
    [
        (torch.float32, {}, [True, "step"]),
        (torch.bfloat16, {}, [True, "step"]),
        (torch.float16, {}, ["step"]),  # it looks by itself
        (torch.bfloat16, {"check_grad_overflow": True}, ["step"]),
    ],
)
def test_updates_with_a_non_finite_gradient_are_looked_for(dtype: torch.dtype, of_version: dict, calls: list[Any]) -> None:
    zero = Zero(dtype=dtype, **of_version)
    mended(zero)
    zero.step()
    assert zero.calls == calls
    zero.calls.clear()
    zero.check_overflow(partition_gradients=False)
    assert zero.calls == [True], "all ranks are asked under stage 1, too"


def test_fp32_is_looked_at_where_deepspeed_can_and_does_not() -> None:
    looks = {}
    for dtype in (torch.float32, torch.bfloat16):
        zero = Zero(dtype=dtype, check_grad_overflow=False)
        mended(zero)
        looks[dtype] = zero.check_grad_overflow
    assert looks == {torch.float32: True, torch.bfloat16: False}, "of bf16 the configuration says whether"


def test_the_newest_and_other_optimizers_are_left_alone() -> None:
    zero, other = Zero(compute_grad_norm=True), SimpleNamespace()
    mended(zero)
    mended(other)
    assert not {"step", "check_overflow", "independent_gradient_partition_epilogue"} & set(vars(zero))
    assert vars(other) == {}


@pytest.mark.parametrize(
    ("version", "is_told"),
    [("0.16.9", 0), ("0.17.0", 0), ("0.19.8", 0), ("0.19.99+abc", 0), ("0.16.8", 1), ("0.20.0", 1), ("1.0", 1), ("odd", 1)],
)
def test_a_version_outside_the_range_is_told(monkeypatch: pytest.MonkeyPatch, version: str, is_told: int) -> None:
    monkeypatch.setattr(deepspeed, "__version__", version)
    told = zero_versions.untried()
    assert bool(told) == is_told
    if told:
        assert version in told and "0.16.9, 0.17.6, 0.18.9, 0.19.8" in told and "\n" not in told


def test_sections_are_typed_where_deepspeed_has_no_classes_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.precision_config", None)
    readers = zero_versions.section_readers()
    monkeypatch.setattr(ds_values, "_SECTIONS", readers)
    assert readers["bf16"]({}).enabled is False and readers["fp16"]({"fp16": {"enabled": "true"}}).initial_scale_power == 16
    assert ds_values.precision({"bf16": {"enabled": "false"}}) == "fp32"
    with pytest.raises(ConfigError, match=r"^deepspeed\.fp16\.initial_scale=3: DeepSpeed has no such setting"):
        ds_values._typed("fp16", {"initial_scale": 3}, readers["fp16"])
