"""The rule on restarts: intervals of a fifth of the run or more, at most three, the last as long as the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from relora_ds.config import load
from relora_ds.planning import restarts
from relora_ds.schedule import Interval


@pytest.mark.parametrize(
    ("updates", "lora_updates", "every", "count"),
    [
        (750, 600, 150, 3),  # the runs of which the rule was made
        (1000, 1000, 250, 3),  # no warm start: not more than three
        (1000, 601, 201, 2),  # the last interval is short by two updates, not a restart too many
        (1000, 450, 225, 1),
        (1000, 400, 200, 1),
        (1000, 399, None, 0),
        (7, 5, 2, 2),
    ],
)
def test_the_phase_is_split_into_equal_parts(updates: int, lora_updates: int, every: int | None, count: int) -> None:
    assert restarts.interval(updates, lora_updates) == every
    if every is not None:
        assert Interval(every).count(lora_updates) == count
        assert every >= updates / 5
        assert 0 <= every * (count + 1) - lora_updates <= count, "the last interval is as long as the others"


def test_short_intervals_get_the_one_that_paid() -> None:
    (said,) = restarts.hints(50, 4, 64, updates=750, lora_updates=600)
    assert said.startswith("relora.restart_every=50 is 7% of the run") and "relora.restart_every=150 " in said
    assert not restarts.hints(150, 4, 64, updates=750, lora_updates=600), "a fifth"
    assert not restarts.hints(149, 4, 64, updates=750, lora_updates=149), "comes too late to be a restart"
    (said,) = restarts.hints(50, 4, 64, updates=750, lora_updates=250)
    assert "too short for one, without a shorter relora.warm_start" in said, "no interval of a fifth is left"


def test_at_a_large_rank_restarts_are_to_be_compared() -> None:
    (said,) = restarts.hints(150, 16, 96, updates=750, lora_updates=600)
    assert said.startswith("relora.rank=16 is 17% of the narrowest layer's 96") and "method=lora" in said
    assert not restarts.hints(150, 15, 96, updates=750, lora_updates=600)


@pytest.mark.parametrize("recipe", sorted(Path(__file__).parents[3].glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_of_this_project_follow_it(recipe: Path) -> None:
    config = load(recipe)
    every, updates = config.relora.restart_every, config.total_updates
    assert every is not None
    lora_updates = updates - config.full_updates
    assert not restarts.hints(every, 1, 8, updates=updates, lora_updates=lora_updates)
