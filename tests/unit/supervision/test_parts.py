"""The named parts of an update."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from relora_ds.supervision import parts
from relora_ds.supervision.parts import Span, Timeline


def test_every_moment_is_of_the_innermost_part() -> None:
    spans = [
        Span(4, 6, "reduction"),
        Span(0, 10, "update"),
        Span(3, 8, "backward"),
        Span(1, 3, "forward"),
        Span(7, 8, "reduction"),
    ]
    timeline = Timeline(spans)
    assert timeline.durations() == {"update": 3, "forward": 2, "backward": 2, "reduction": 3}
    assert [timeline.at(time) for time in (-1, 0, 1, 3, 5, 6.5, 7, 9, 10)] == [
        None, "update", "forward", "backward", "reduction", "backward", "reduction", "update", None,
    ]  # fmt: skip


def test_a_timeline_with_gaps_and_one_without_anything() -> None:
    timeline = Timeline([Span(5, 7, "two"), Span(1, 2, "one"), Span(7, 7, "nothing")])
    assert timeline.durations() == {"one": 1, "two": 2}
    assert [timeline.at(time) for time in (1, 3, 6)] == ["one", None, "two"]
    assert Timeline([]).durations() == {} and Timeline([]).at(0) is None


def test_a_profiler_sees_the_names_and_without_one_there_are_none() -> None:
    assert parts.part(parts.DATA) is parts.part(parts.STEP), "nothing is made where nobody looks"
    double = parts.serving(parts.FORWARD, lambda value: 2 * value)
    with profile(activities=[ProfilerActivity.CPU]) as profiler, parts.part(parts.DATA):
        assert double(torch.ones(1)).item() == 2
    names = [event.name for event in profiler.events() if event.name.startswith(parts.PREFIX)]
    assert names == ["relora_ds: data", "relora_ds: forward"]
    assert double(3) == 6
