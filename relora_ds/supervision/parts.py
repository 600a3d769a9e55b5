"""The named parts of an update, as a profiler sees them, and how the time of an update falls to them."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import record_function

DATA, FORWARD, BACKWARD, REDUCTION = "data", "forward", "backward", "gradient reduction"
STEP, ALL_GATHER, RESTART, LOSS_ALL_REDUCE, REST = (
    "optimizer step",
    "all-gather of parameters",
    "restart",
    "loss all-reduce",
    "rest",
)
PARTS = (DATA, FORWARD, BACKWARD, REDUCTION, STEP, ALL_GATHER, RESTART, LOSS_ALL_REDUCE, REST)
"""Each without the parts inside it: the gradients are reduced while the backward pass goes on. REST is the update itself."""
PREFIX = "relora_ds: "
"""Before the name of each part in a trace."""

_NOTHING = nullcontext()


def part(name: str) -> AbstractContextManager[Any]:
    """Names what is done inside for a profiler; costs a microsecond where none runs."""
    return record_function(PREFIX + name) if torch.autograd._profiler_enabled() else _NOTHING


def serving(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, all of whose work is the part ``name``."""

    @functools.wraps(function)
    def named(*args: Any, **kwargs: Any) -> Any:
        with part(name):
            return function(*args, **kwargs)

    return named


@dataclass(frozen=True)
class Span:
    """A part from ``start`` to ``end``, in any unit."""

    start: float
    end: float
    name: str


class Timeline:
    """An update, every moment of which is of one part: the innermost one.

    Args:
        spans: of all parts; any two lie apart, or one in the other.
    """

    def __init__(self, spans: Iterable[Span]) -> None:
        self.pieces: list[Span] = []
        around: list[Span] = []
        for span in sorted(spans, key=lambda span: (span.start, -span.end)):
            self._leave(around, span.start)
            if around:
                self._add(around[-1], span.start)
            self._now = span.start
            around.append(span)
        self._leave(around, float("inf"))

    def _leave(self, around: list[Span], until: float) -> None:
        """Ends the open spans that are over at ``until``."""
        while around and around[-1].end <= until:
            span = around.pop()
            self._add(span, span.end)

    def _add(self, span: Span, end: float) -> None:
        if end > self._now:
            self.pieces.append(Span(self._now, end, span.name))
            self._now = end

    def durations(self) -> dict[str, float]:
        """By part, without those inside it."""
        sums: dict[str, float] = {}
        for piece in self.pieces:
            sums[piece.name] = sums.get(piece.name, 0.0) + piece.end - piece.start
        return sums

    def at(self, time: float) -> str | None:
        """The part of a moment; None outside of all."""
        index = bisect_right(self.pieces, time, key=lambda piece: piece.start) - 1
        return self.pieces[index].name if index >= 0 and time < self.pieces[index].end else None
