"""What profiled updates cost, by part and by operator, as tables."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.autograd import DeviceType

from relora_ds.comm import counter
from relora_ds.supervision import parts
from relora_ds.supervision.parts import Span, Timeline
from relora_ds.units import human_bytes

NUM_OPERATORS = 10
SENT_IN = {
    counter.GRADIENT: parts.REDUCTION, counter.PARAMETERS: parts.ALL_GATHER, counter.NORM: parts.STEP,
    counter.LOSS: parts.LOSS_ALL_REDUCE, counter.RESTART: parts.RESTART, counter.VERIFY: parts.RESTART,
}  # fmt: skip
"""In which part the collectives of a purpose are."""
FROM_US = 1e-6


@dataclass
class Operator:
    """What one operator took, without those that it calls. ``bytes``: what calls allocated beyond what they freed."""

    calls: int = 0
    host_s: float = 0.0
    device_s: float = 0.0
    bytes: int = 0


def _sums() -> defaultdict[str, float]:
    return defaultdict(float)


@dataclass
class Costs:
    """What some updates took together.

    Attributes:
        updates, phases: their numbers, and the phases that they were in.
        seconds, without: of each update with the profiler, and of others without.
        host_s, device_s: by part; on the device: of the kernels and copies that were launched in it.
        sent_bytes: by part, as ring algorithms send.
        operators: by name.
        peak_bytes: the most that tensors held on the device so far; None on a CPU.
    """

    updates: list[int] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    without: list[float] = field(default_factory=list)
    host_s: defaultdict[str, float] = field(default_factory=_sums)
    device_s: defaultdict[str, float] = field(default_factory=_sums)
    sent_bytes: defaultdict[str, float] = field(default_factory=_sums)
    operators: defaultdict[str, Operator] = field(default_factory=lambda: defaultdict(Operator))
    peak_bytes: int | None = None

    def add(self, update: int, phase: str, seconds: float, events: Sequence[Any], sent: dict[str, float]) -> None:
        """Adds one update.

        Args:
            update, phase, seconds: its number, its phase, how long it took.
            events: of it, torch's ``FunctionEvent``.
            sent: wire bytes by purpose.
        """
        self.updates.append(update)
        self.phases += [phase] * (phase not in self.phases)
        self.seconds.append(seconds)
        timeline = Timeline(_spans(events))
        for name, duration_us in timeline.durations().items():
            self.host_s[name] += duration_us * FROM_US
        for event in events:
            if not event.is_user_annotation and not event.is_async:  # names have spans on a device, too, which are no work
                self._add_event(event, timeline)
        for purpose, wire_bytes in sent.items():
            self.sent_bytes[SENT_IN.get(purpose, parts.REST)] += wire_bytes

    def _add_event(self, event: Any, timeline: Timeline) -> None:
        """Adds an operator with the kernels that it launched, or a kernel: one that no operator launched stays in the rest."""
        if event.device_type != DeviceType.CPU:
            self.device_s[parts.REST] += event.time_range.elapsed_us() * FROM_US
            return
        device_s = sum(kernel.duration for kernel in event.kernels) * FROM_US
        if device_s:
            self.device_s[parts.REST] -= device_s
            self.device_s[timeline.at(event.time_range.start) or parts.REST] += device_s
        operator = self.operators[event.name]
        operator.calls += 1
        operator.host_s += event.self_cpu_time_total * FROM_US
        operator.device_s += device_s
        operator.bytes += max(0, event.self_cpu_memory_usage + event.self_device_memory_usage)

    def by_part(self) -> list[list[str]]:
        """A table of the parts of an update, in the mean. Shares are of the device's work where there is a device."""
        shared = self.device_s or self.host_s
        rows = [self._row("part", "share", "seconds", "device", "sent")]
        for name in ("update", *(name for name in parts.PARTS if name in self.host_s)):
            part, host_s, device_s, sent = (
                sum(column.values()) if name == "update" else column.get(name, 0.0)
                for column in (shared, self.host_s, self.device_s, self.sent_bytes)
            )
            share = f"{part / sum(shared.values()):.1%}"
            rows.append(self._row(name, share, self._seconds(host_s), self._seconds(device_s), self._bytes(sent)))
        return rows

    def by_operator(self) -> list[list[str]]:
        """A table of an update's most expensive operators, on the device or, where there is none, on the CPU."""
        rows = [self._row("operator", "calls", "self CPU", "self device", "allocated")]
        order = sorted(self.operators.items(), key=lambda item: (item[1].device_s, item[1].host_s), reverse=True)
        for name, operator in order[:NUM_OPERATORS]:
            calls, allocated = f"{operator.calls / len(self.updates):.0f}", self._bytes(operator.bytes)
            rows.append(self._row(name, calls, self._seconds(operator.host_s), self._seconds(operator.device_s), allocated))
        return rows

    def remarks(self) -> list[str]:
        """What the tables do not say."""
        without = f"{_median(self.without)} without" if self.without else "none was left to be timed without"
        lines = [f"an update took {_median(self.seconds)} with the profiler, {without}"]
        if self.peak_bytes is not None:
            lines.append(f"tensors held at most {human_bytes(self.peak_bytes)} on the device so far")
        return lines

    def _row(self, *cells: str) -> list[str]:
        """The fourth column is the device's."""
        return [cell for number, cell in enumerate(cells) if number != 3 or self.device_s]

    def _seconds(self, total: float) -> str:
        return f"{total / len(self.updates):.4f}"

    def _bytes(self, total: float) -> str:
        return human_bytes(total / len(self.updates))


def _median(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.4f} s (median of {len(seconds)})"


def _spans(events: Sequence[Any]) -> list[Span]:
    """The parts among the events of an update, in microseconds of the host."""
    return [
        Span(event.time_range.start, event.time_range.end, event.name.removeprefix(parts.PREFIX))
        for event in events
        if event.name.startswith(parts.PREFIX) and event.device_type == DeviceType.CPU
    ]
