"""What DeepSpeed's ZeRO optimizer does for every parameter although once would do: the same results in fewer calls.

Factors are many and small, two for each wrapped layer: what the host spends on each of them is a large part of an update. Each
function here replaces a method of one optimizer, and leaves an optimizer of another version, which has no such method, as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor


def do_once(zero: Any) -> None:
    """Has a fresh optimizer of ZeRO stage 1 or 2 do all of them; leaves any other as it is."""
    if type(zero) is DeepSpeedZeroOptimizer:
        look_for_overflow_once(zero)
        leave_weights_in_place(zero)
        count_no_hooks(zero)
        report_no_memory(zero)


def look_for_overflow_once(zero: Any) -> None:
    """Whether a gradient is not finite, by the largest absolute value of each, all at once: DeepSpeed starts over a dozen kernels for
    each gradient."""
    if not hasattr(zero, "has_overflow_partitioned_grads_serial"):
        return

    def has_overflow() -> Tensor:
        groups = (zero.averaged_gradients[group] for group in range(len(zero.bit16_groups)))
        grads = [grad for group in groups for grad in group if grad is not None and grad.numel()]
        if not grads:
            return torch.zeros(1, dtype=torch.bool, device=zero.device)
        largest = torch.stack(torch._foreach_norm(grads, float("inf")))  # NaN where there is one
        return largest.isfinite().all().logical_not().view(1)

    zero.has_overflow_partitioned_grads_serial = has_overflow


def leave_weights_in_place(zero: Any) -> None:
    """Parameters look into the flat weights from the start: DeepSpeed points each there after every update, for nothing."""
    update = getattr(zero, "_update_model_bit16_weights", None)
    if update is None:
        return
    placed: dict[int, list[int]] = {}

    def addresses(group: int) -> list[int]:
        return [tensor.data_ptr() for tensor in (zero.bit16_groups_flat[group], *zero.bit16_groups[group])]

    def update_moved(group: int) -> None:
        if placed.get(group) != addresses(group):  # at first, or since states were moved off the device
            update(group)
            placed[group] = addresses(group)

    zero._update_model_bit16_weights = update_moved


def count_no_hooks(zero: Any) -> None:
    """At the first gradient of each backward pass DeepSpeed counts those that will come, a call of autograd for each parameter.

    It needs the count only where autograd cannot be asked to call at the end of the pass.
    """
    queue = getattr(getattr(zero, "_backward_hook_state", None), "queue_post_backward_callback", None)
    refresh = getattr(zero, "should_refresh_expected_hook_count", None)
    if queue is not None and refresh is not None:
        zero.should_refresh_expected_hook_count = lambda: not queue() and refresh()


def report_no_memory(zero: Any) -> None:
    """DeepSpeed words a report for each gradient, which it never prints."""
    zero.report_ipg_memory_usage = lambda *args, **others: None
