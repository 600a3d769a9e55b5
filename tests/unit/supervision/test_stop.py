"""What asks a run to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from relora_ds.supervision.stop import StopSignal, signals

USUAL = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP}


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Afterwards they are what they were."""
    before = {number: signal.getsignal(number) for number in USUAL | {signal.SIGUSR1}}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", sorted(USUAL))
def test_a_signal_is_remembered(number: signal.Signals) -> None:
    """Also that of a terminal that is closed."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stop = StopSignal()
    assert not stop.requested
    os.kill(os.getpid(), number)
    assert stop.requested


def test_nohup_is_heeded() -> None:
    """But where the recipe names the signal itself."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert signals("USR1") == {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
    assert signals("HUP") == {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    stop = StopSignal()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.requested
