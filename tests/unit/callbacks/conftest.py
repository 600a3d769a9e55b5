"""A run as its callbacks see it, without an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from relora_ds.callbacks.callback import Callback, RunState
from relora_ds.config import parse
from relora_ds.launch.places import Place
from relora_ds.run.folder import RunFolder


class Messages(Callback):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def make_run(settings: dict[str, Any], tmp_path: Path) -> Callable[..., tuple[RunState, list[str]]]:
    """A run of one process, its recipe's sections replaced, in ``tmp_path``; and the lines to the user."""

    def make(**sections: Any) -> tuple[RunState, list[str]]:
        place = Place(0, 1, 0, 1, "127.0.0.1", 1, "torchrun")
        run = RunState(parse({**settings, **sections}), RunFolder(tmp_path), place, torch.device("cpu"))
        messages = Messages()
        run.callbacks.append(messages)
        return run, messages.lines

    return make
