"""Bytes and operations, by hand; tests/distributed/test_plan.py compares the bytes with what engines send."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from relora_ds.bandwidth.formulas import TIMES_EVERY, Bytes, restart_bytes, update_bytes, update_flops
from relora_ds.supervision import stragglers

WIRE = {"gradient_width": 2, "parameter_width": 2}


def test_to_the_owners_alone() -> None:
    sent = update_bytes(1000, world_size=4, stage=2, accumulation=3, way="owner", **WIRE)
    assert sent.gradient == sent.parameters == 1500
    assert sent.norm == pytest.approx(2 * 0.75 * 13)
    assert sent.loss == pytest.approx(2 * 0.75 * (32 + 8 * 4 / 20))
    assert sent.total == sent.gradient + sent.parameters + sent.norm + sent.loss


@pytest.mark.parametrize(("stage", "accumulation", "times"), [(2, 1, 1.5), (2, 3, 3.5), (1, 3, 1.5)])
def test_deepspeeds_defaults(stage: int, accumulation: int, times: float) -> None:
    """The multiples of the floor that benchmarks/traffic.md measured: 1.503, 3.511, 1.504 at two ranks."""
    theirs = update_bytes(10**6, world_size=2, stage=stage, accumulation=accumulation, way="all-reduce", **WIRE)
    floor = update_bytes(10**6, world_size=2, stage=stage, accumulation=accumulation, way="owner", **WIRE)
    assert theirs.gradient + theirs.parameters == times * (floor.gradient + floor.parameters)


def test_ddp_gathers_nothing() -> None:
    sent = update_bytes(1000, world_size=2, gradient_width=4, parameter_width=4, stage=2, accumulation=8, way="ddp")
    assert (sent.gradient, sent.parameters, sent.norm) == (4000, 0, 0)


def test_one_rank_sends_nothing() -> None:
    assert update_bytes(1000, world_size=1, stage=2, accumulation=2, way="all-reduce", **WIRE) == Bytes(0, 0, 0, 0)
    assert restart_bytes(1000, num_tensors=4, choices=1, world_size=1, gathered_bytes=10**6) == 0


def test_a_restart_sends_counts_and_masters() -> None:
    """The figures of the test model of tests/distributed/test_restart_bytes.py, whose restarts were counted: 39,424 entries in 28."""
    of_model = {"lora_numel": 39_424, "num_tensors": 28}
    for choices, world_size, counted in [(1, 2, 93_208), (2, 2, 107_544), (1, 4, 139_812), (2, 4, 161_316)]:
        assert restart_bytes(**of_model, choices=choices, world_size=world_size) == pytest.approx(counted, rel=2e-3)
    plain = restart_bytes(**of_model, choices=1, world_size=4)
    assert restart_bytes(**of_model, choices=1, world_size=4, gathered_bytes=1e6) == plain + 0.75e6


def test_times_travel_as_often_as_they_are_exchanged() -> None:
    assert TIMES_EVERY == stragglers.RANK_TIMES_EVERY


def test_operations_are_those_of_the_products() -> None:
    """A frozen matrix with trained factors, behind a trained one, as PyTorch's own counter sees it."""
    before = torch.randn(6, 8, requires_grad=True)
    frozen, lora_a, lora_b = torch.randn(10, 6), torch.randn(2, 6, requires_grad=True), torch.randn(10, 2, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        x = torch.randn(5, 8, requires_grad=True) @ before.t()
        (x @ frozen.t() + (x @ lora_a.t()) @ lora_b.t()).sum().backward()
    assert counter.get_total_flops() == update_flops(5, trained=48 + 12 + 20, frozen=60)
