"""The environment of a process that no launcher started."""

from __future__ import annotations

import pytest

from tests.unit.launch.launchers import PLACE


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables that this module sets are unset, and put back afterwards."""
    for name in (*PLACE, "GLOO_SOCKET_IFNAME", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it, whether it was set or not
        monkeypatch.delenv(name)
