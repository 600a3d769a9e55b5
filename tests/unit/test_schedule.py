"""Learning-rate curves against values computed by hand."""

from __future__ import annotations

import math

import pytest

from relora_ds.schedule import Interval, ScheduleName, decay_factor, lr_factor, rewarmup_factor, warmup_factor

NAMES: tuple[ScheduleName, ...] = ("jagged", "cosine", "linear", "constant")


def test_warmup_climbs_from_zero_to_one() -> None:
    assert [warmup_factor(step, 4) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_no_warmup_is_one_from_the_start() -> None:
    assert [warmup_factor(step, 0) for step in range(3)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", ["jagged", "cosine"])
@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 1.0), (20, 1.0), (45, 0.1 + 0.45 * (1 + math.sqrt(0.5))), (70, 0.55), (120, 0.1), (500, 0.1)],
)
def test_cosine_from_the_end_of_the_warmup_to_the_floor(name: ScheduleName, step: int, expected: float) -> None:
    assert decay_factor(name, step, total=120, warmup=20, min_lr_ratio=0.1) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(0, 1.0), (20, 1.0), (45, 0.775), (70, 0.55), (120, 0.1), (500, 0.1)])
def test_linear_from_the_end_of_the_warmup_to_the_floor(step: int, expected: float) -> None:
    assert decay_factor("linear", step, total=120, warmup=20, min_lr_ratio=0.1) == pytest.approx(expected)


@pytest.mark.parametrize("step", [0, 20, 70, 120])
def test_constant_does_not_decay(step: int) -> None:
    assert decay_factor("constant", step, total=120, warmup=20, min_lr_ratio=0.1) == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_updates_count_from_one_and_the_first_has_rate_zero(name: ScheduleName) -> None:
    factors = [lr_factor(name, update, total=100, warmup=4, min_lr_ratio=0.1) for update in (1, 2, 3, 5)]
    assert factors == [0.0, 0.25, 0.5, 1.0]


def test_update_reads_the_curve_one_step_before_its_number() -> None:
    assert lr_factor("cosine", 51, total=100, warmup=0, min_lr_ratio=0.2) == pytest.approx(0.6)
    assert lr_factor("linear", 26, total=100, warmup=0, min_lr_ratio=0.0) == pytest.approx(0.75)


def test_second_phase_warms_up_anew_on_the_same_decay() -> None:
    def factor(update: int) -> float:
        return lr_factor("linear", update, total=110, warmup=10, min_lr_ratio=0.1, phase_start=50)

    assert factor(51) == 0.0
    assert factor(56) == pytest.approx(0.5 * (0.1 + 0.9 * 0.55))  # half of the ramp, 45% of the decay
    assert factor(61) == pytest.approx(0.1 + 0.9 * 0.5)  # the ramp has ended: what one phase alone would have
    assert factor(61) == pytest.approx(lr_factor("linear", 61, total=110, warmup=10, min_lr_ratio=0.1))


def test_an_interval_recurs() -> None:
    assert [update for update in range(35) if Interval(10).follows(update)] == [10, 20, 30]
    assert [update for update in range(4) if Interval(1).follows(update)] == [1, 2, 3]
    assert [Interval(10).newest(update) for update in (0, 9, 10, 19, 20)] == [0, 0, 10, 10, 20]
    assert [Interval(10).count(updates) for updates in (0, 1, 10, 11, 35, 40)] == [0, 0, 0, 1, 3, 3], "one after the last is none"
    assert Interval(0).count(100) == 0 and Interval(8, 1.5).count(21) == 2


def test_a_growing_interval() -> None:
    """8, then 12, 18, 27, 40.5 -> 40 updates: each 1.5 times the one before, rounded only where it is laid down."""
    ends = [8, 20, 38, 65, 105]
    assert [update for update in range(120) if Interval(8, 1.5).follows(update)] == ends
    assert [Interval(8, 1.5).newest(update) for update in (7, 8, 19, 20, 104, 119)] == [0, 8, 8, 20, 65, 105]
    teeth = {update: rewarmup_factor(update, Interval(8, 1.5), restart_warmup=4) for update in range(1, 60)}
    assert [update for update, factor in teeth.items() if factor == 0.0] == [9, 21, 39]


def test_nothing_recurs_when_every_is_zero() -> None:
    assert not any(Interval(0).follows(update) for update in range(50))
    assert all(rewarmup_factor(update, Interval(0), 4) == 1.0 for update in range(1, 50))


def test_teeth_begin_right_after_a_reset() -> None:
    teeth = {update: rewarmup_factor(update, Interval(10), restart_warmup=4) for update in range(1, 31)}
    assert all(teeth[update] == 1.0 for update in range(1, 11))  # none before the first
    for reset in (10, 20):
        assert [teeth[reset + i] for i in range(1, 7)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
        assert teeth[reset + 10] == 1.0  # the update before the next


def test_no_teeth_without_restart_warmup() -> None:
    assert all(rewarmup_factor(update, Interval(10), 0) == 1.0 for update in range(1, 31))


def test_jagged_curve_comes_back_to_the_cosine_after_each_tooth() -> None:
    def rate(update: int) -> float:
        smooth = lr_factor("jagged", update, total=40, warmup=0, min_lr_ratio=0.0)
        return smooth * rewarmup_factor(update, Interval(20), restart_warmup=2)

    at_half = 0.5
    assert rate(20) == pytest.approx(0.5 * (1 + math.cos(math.pi * 19 / 40)))
    assert rate(21) == 0.0
    assert rate(22) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * 21 / 40)))
    assert rate(23) == pytest.approx(0.5 * (1 + math.cos(math.pi * 22 / 40)))
    assert rate(23) < at_half < rate(20)
