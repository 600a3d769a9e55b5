"""The ways to restart by the dtype of the engines, and the table of what they take."""

from __future__ import annotations

import pytest

from benchmarks import restart


def test_what_is_the_default_store_is_no_way_of_its_own() -> None:
    assert restart.modes("fp32") == restart.MODES
    names = list(restart.modes("bf16"))
    assert names[:2] == ["bf16", "int8 store"] and "bf16 store, sharded master" in names
    assert len(names) == len(restart.MODES) - 1 and not any("fp32" in name for name in names)


def test_restarts_are_told_in_updates() -> None:
    parts = [{"merge": 0.1, "reset": 0.2, "verify": 0.3}, {"merge": 0.3, "reset": 0.2, "verify": 0.3}]
    heading, row = restart.rows({"fp32": {"update_s": [2.0, 2.0], "restart_s": [1.0, 3.0], "parts": parts}})
    assert heading[3:] == ["in updates", "merge", "reset", "verify"]
    assert row == ["fp32", "2.000", "1.000, 2.000, 3.000", "1.00", "0.200", "0.200", "0.300"]


def test_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        restart.parse(["--rounds", "0"])
    assert "0: must be at least 1" in capsys.readouterr().err
