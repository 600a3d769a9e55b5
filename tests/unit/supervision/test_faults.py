"""faults.jsonl: written by a process on its way out, read by whoever starts the job again."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from relora_ds.supervision import faults

FAULT = {"attempt": "12.0", "rank": 3, "host": "node2", "update": 17}


def test_what_is_recorded_is_read(tmp_path: Path) -> None:
    faults.record(tmp_path, kind="hang", detail="two\nlines", **FAULT)  # type: ignore[arg-type]
    (fault,) = faults.read(tmp_path)
    assert datetime.fromisoformat(fault.pop("time")).tzinfo is not None
    assert fault == {**FAULT, "kind": "hang", "detail": "two lines"}


def test_faults_of_one_attempt_in_their_order(tmp_path: Path) -> None:
    for attempt, rank in (("12.0", 0), ("12.1", 2), ("12.1", 1)):
        faults.record(tmp_path, kind="error", detail="x", **{**FAULT, "attempt": attempt, "rank": rank})  # type: ignore[arg-type]
    assert [fault["rank"] for fault in faults.read(tmp_path, "12.1")] == [2, 1]
    assert [fault["rank"] for fault in faults.read(tmp_path)] == [0, 2, 1]
    assert faults.read(tmp_path, "13.0") == []


def test_a_folder_that_cannot_be_written_raises_nothing(tmp_path: Path) -> None:
    faults.record(tmp_path / "none", kind="error", detail="x", **FAULT)  # type: ignore[arg-type]
    assert faults.read(tmp_path / "none") == []
    (tmp_path / "faults.jsonl").mkdir()
    faults.record(tmp_path, kind="error", detail="x", **FAULT)  # type: ignore[arg-type]


def test_lines_that_were_cut_off_are_left_out(tmp_path: Path) -> None:
    faults.record(tmp_path, kind="error", detail="x", **FAULT)  # type: ignore[arg-type]
    with (tmp_path / "faults.jsonl").open("a") as file:
        file.write('{"time": "20\n[1]\n')
    faults.record(tmp_path, kind="error", detail="y", **FAULT)  # type: ignore[arg-type]
    assert [fault["detail"] for fault in faults.read(tmp_path)] == ["x", "y"]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("connection closed\nC++ trace"), "RuntimeError: connection closed"),
        (ValueError(), "ValueError"),
        (ValueError("\n"), "ValueError"),
        (  # what was lost is said at the end
            RuntimeError(
                "NCCL error in: x.cpp:3356, unhandled system error\nncclSystemError: …\nLast error:\nConnection refused"
            ),
            "RuntimeError: NCCL error in: x.cpp:3356, unhandled system error ncclSystemError: … Last error: Connection refused",
        ),
    ],
)
def test_an_exception_in_one_line(error: Exception, text: str) -> None:
    assert faults.describe(error) == text
