"""Tables of what profiled updates cost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

from relora_ds.callbacks.costs import NUM_OPERATORS, Costs
from relora_ds.comm import counter
from relora_ds.supervision import parts


def event(name: str, start: float, end: float, *kernels: float, self_us: float = 0.0, allocated: int = 0, **changes: Any) -> Any:
    """As torch's ``FunctionEvent``; times in microseconds."""
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    fields = {
        "name": name, "time_range": span, "kernels": [SimpleNamespace(duration=duration) for duration in kernels],
        "device_type": DeviceType.CPU, "is_async": False, "is_user_annotation": name.startswith(parts.PREFIX),
        "self_cpu_time_total": self_us, "self_cpu_memory_usage": allocated, "self_device_memory_usage": 0,
    }  # fmt: skip
    return SimpleNamespace(**{**fields, **changes})


def part(name: str, start: float, end: float, *kernels: float, **changes: Any) -> Any:
    return event(parts.PREFIX + name, start, end, *kernels, **changes)


HOST = [
    part(parts.REST, 0, 1000_000),
    part(parts.FORWARD, 0, 300_000),
    event("aten::mm", 100_000, 200_000, self_us=90_000, allocated=2000),
    part(parts.BACKWARD, 300_000, 900_000),
    event("aten::mm", 400_000, 500_000, self_us=60_000, allocated=1000),
    event("aten::add", 500_000, 600_000, self_us=50_000, allocated=-700),
    part(parts.REDUCTION, 700_000, 800_000),
    event("gloo:reduce", 700_000, 2000_000, self_us=1300_000, is_async=True),
]


def test_shares_of_the_parts_and_operators_by_their_own_time() -> None:
    costs = Costs()
    costs.add(3, "full", 1.01, HOST, {counter.GRADIENT: 4000.0, counter.LOSS: 32.0, counter.OTHER: 8.0})
    costs.add(4, "lora", 1.03, HOST, {counter.GRADIENT: 2000.0})
    assert costs.by_part() == [
        ["part", "share", "seconds", "sent"],
        ["update", "100.0%", "1.0000", "3.02 kB"],
        ["forward", "30.0%", "0.3000", "0 B"],
        ["backward", "50.0%", "0.5000", "0 B"],
        ["gradient reduction", "10.0%", "0.1000", "3 kB"],
        ["rest", "10.0%", "0.1000", "4 B"],
    ]
    assert costs.by_operator() == [
        ["operator", "calls", "self CPU", "allocated"],
        ["aten::mm", "2", "0.1500", "3 kB"],
        ["aten::add", "1", "0.0500", "0 B"],
    ]
    assert (costs.updates, costs.phases) == ([3, 4], ["full", "lora"])


def test_the_profilers_own_cost_is_told() -> None:
    costs = Costs(seconds=[1.0, 5.0, 1.2])
    assert costs.remarks() == ["an update took 1.2000 s (median of 3) with the profiler, none was left to be timed without"]
    costs.without += [1.1, 0.9]
    costs.peak_bytes = 3 * 10**9
    assert costs.remarks() == [
        "an update took 1.2000 s (median of 3) with the profiler, 1.0000 s (median of 2) without",
        "tensors held at most 3 GB on the device so far",
    ]


def test_kernels_belong_to_the_part_that_launched_them_whenever_they_run() -> None:
    """As on CUDA: the host is ahead of the device, and torch gives the names spans on the device, too."""
    on_device = {"device_type": DeviceType.CUDA}
    events = [
        part(parts.REST, 0, 100_000),
        part(parts.FORWARD, 0, 10_000, 77_000),
        part(parts.FORWARD, 20_000, 97_000, **on_device),
        event("aten::mm", 1_000, 2_000, 50_000, 10_000, self_us=1_000, self_device_memory_usage=500),
        event("mm_kernel", 20_000, 70_000, **on_device),
        event("split_kernel", 70_000, 80_000, **on_device),
        part(parts.BACKWARD, 10_000, 30_000),
        event("aten::add", 11_000, 12_000, 30_000, self_us=2_000),
        event("add_kernel", 80_000, 110_000, **on_device),
        event("a kernel that no operator launched", 110_000, 120_000, **on_device),
    ]
    costs = Costs()
    costs.add(5, "lora", 0.1, events, {})
    assert costs.by_part() == [
        ["part", "share", "seconds", "device", "sent"],
        ["update", "100.0%", "0.1000", "0.1000", "0 B"],
        ["forward", "60.0%", "0.0100", "0.0600", "0 B"],
        ["backward", "30.0%", "0.0200", "0.0300", "0 B"],
        ["rest", "10.0%", "0.0700", "0.0100", "0 B"],
    ]
    assert costs.by_operator()[1:] == [
        ["aten::mm", "1", "0.0010", "0.0600", "500 B"],
        ["aten::add", "1", "0.0020", "0.0300", "0 B"],
    ]
    assert sum(costs.device_s.values()) == pytest.approx(0.1)


def test_the_most_expensive_operators_alone() -> None:
    costs = Costs()
    costs.add(1, "full", 1.0, [event(f"aten::op{number}", 0, 1, self_us=number) for number in range(30)], {})
    assert [row[0] for row in costs.by_operator()[1:]] == [f"aten::op{number}" for number in range(29, 29 - NUM_OPERATORS, -1)]
