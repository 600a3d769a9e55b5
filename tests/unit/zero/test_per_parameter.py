"""What is done once for all parameters finds what DeepSpeed finds one by one, and is not left out where it is needed."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from relora_ds.zero import per_parameter


def overflows(groups: dict[int, Any]) -> list[bool]:
    zero = SimpleNamespace(
        averaged_gradients=groups,
        bit16_groups=[[]] * len(groups),
        device="cpu",
        has_overflow_partitioned_grads_serial=None,
        _has_inf_or_nan=DeepSpeedZeroOptimizer._has_inf_or_nan,
    )
    theirs: Tensor = DeepSpeedZeroOptimizer.has_overflow_partitioned_grads_serial(zero)
    per_parameter.look_for_overflow_once(zero)
    ours: Tensor = zero.has_overflow_partitioned_grads_serial()
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    return [bool(theirs), bool(ours)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, math.inf, -math.inf, math.nan])
def test_one_value_that_is_not_finite_is_found(value: float, dtype: torch.dtype) -> None:
    largest = torch.full((2, 3), torch.finfo(dtype).max, dtype=dtype)
    one = torch.zeros(5, 2, dtype=dtype)
    one[3, 1] = value
    expected = not math.isfinite(value)
    assert overflows({0: [-largest, largest], 1: [torch.zeros(0, dtype=dtype), one, None]}) == [expected] * 2


def test_gradients_of_several_dtypes_are_looked_at() -> None:
    small = torch.ones(3, dtype=torch.bfloat16)
    assert overflows({0: [small, torch.full((2,), 1e38)]}) == [False, False]
    assert overflows({0: [small, torch.tensor([math.nan])]}) == [True, True]


def test_a_rank_without_gradients_has_no_overflow() -> None:
    assert overflows({0: [], 1: [torch.zeros(0)]}) == [False, False]


def test_weights_are_placed_again_only_after_they_were_moved() -> None:
    flat, params = torch.arange(6.0), [nn.Parameter(torch.empty(0)) for _ in range(2)]
    placed = []

    def place(group: int) -> None:
        placed.append(group)
        for param, part in zip(params, zero.bit16_groups_flat[0].split(3), strict=True):
            param.data = part

    zero = SimpleNamespace(bit16_groups_flat=[flat], bit16_groups=[params], _update_model_bit16_weights=place)
    per_parameter.leave_weights_in_place(zero)
    for _ in range(3):
        zero._update_model_bit16_weights(0)
    assert placed == [0]
    params[1].data = torch.empty(0)  # as DeepSpeed does when it moves states off the device, also where the flat weights stay
    zero._update_model_bit16_weights(0)
    assert placed == [0, 0] and params[1].tolist() == [3, 4, 5]
    zero.bit16_groups_flat[0] = flat + 1
    zero._update_model_bit16_weights(0)
    assert placed == [0, 0, 0] and params[0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("can_call_back", [True, False])
def test_hooks_are_counted_where_autograd_calls_nothing_at_the_end(can_call_back: bool) -> None:
    state = SimpleNamespace(queue_post_backward_callback=lambda: can_call_back)
    zero = SimpleNamespace(_backward_hook_state=state, should_refresh_expected_hook_count=lambda: True)
    per_parameter.count_no_hooks(zero)
    assert zero.should_refresh_expected_hook_count() is not can_call_back


def test_what_a_version_does_not_have_is_not_given_to_it() -> None:
    zero = DeepSpeedZeroOptimizer.__new__(DeepSpeedZeroOptimizer)  # without a state of hooks, as in 0.17
    per_parameter.do_once(zero)
    assert set(vars(zero)) == {
        "has_overflow_partitioned_grads_serial",
        "_update_model_bit16_weights",
        "report_ipg_memory_usage",
    }, "all that is there but the count of hooks"
    other = SimpleNamespace()
    per_parameter.do_once(other)
    assert not vars(other)
