"""What hangs on the loop."""

from __future__ import annotations

import inspect
from typing import Any

from relora_ds.callbacks.callback import Callback


def test_a_callback_that_overrides_nothing_serves_all(make_run: Any) -> None:
    run, _ = make_run()
    run.callbacks = [Callback()]
    for name, method in inspect.getmembers(Callback, inspect.isfunction):
        assert getattr(run.callbacks[0], name)(*[run] * (len(inspect.signature(method).parameters) - 1)) is None


def test_messages_and_beats_go_to_all_in_their_order(make_run: Any) -> None:
    heard: list[str] = []

    class Hears(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def message(self, text: str) -> None:
            heard.append(f"{self.name}: {text}")

        def beat(self, where: str, allow_s: float) -> None:
            heard.append(f"{self.name} beats {where} {allow_s}")

    run, lines = make_run()
    run.callbacks += [Hears("one"), Hears("two")]
    run.tell("hello")
    run.beat("an update", 3.0)
    assert lines == ["hello"]
    assert heard == ["one: hello", "two: hello", "one beats an update 3.0", "two beats an update 3.0"]
