"""The rules of docs/design.md that a program can check."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "relora_ds"
MODULES = sorted(PACKAGE.glob("*.py"))


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_no_module_above_500_lines(module: Path) -> None:
    assert len(module.read_text(encoding="utf-8").splitlines()) <= 500


@pytest.mark.parametrize(
    ("pattern", "home"),
    [
        (r"\bos\.environ\b|\bgetenv\b", "launch.py"),
        (r"deepspeed\.runtime\.zero|_hp_mapping|single_partition_of_fp32_groups|bit16_groups|dp_process_group", "zero*.py"),
        (r"\.follows\(", "optimizer.py"),
    ],
    ids=["the environment", "the inside of ZeRO", "the trigger of a restart"],
)
def test_one_place_alone(pattern: str, home: str) -> None:
    users = {path.name for path in MODULES if re.search(pattern, path.read_text(encoding="utf-8"))}
    assert users - {"schedule.py"} == {path.name for path in PACKAGE.glob(home)}, "schedule.py defines Interval.follows"


@pytest.mark.parametrize(
    "module",
    [
        "schedule.py",
        "pruning.py",
        "rounding.py",
        "reinit.py",
        "exact.py",
        "lora.py",
        "frozen.py",
        "config.py",
        "manifest.py",
        "slurm_script.py",
        "formulas.py",
        "full_rank.py",
        "linear.py",
    ],
)
def test_pure_modules_know_of_no_ranks(module: str) -> None:
    assert not re.search(r"torch\.distributed|deepspeed\b(?!\.json|:)", _code(PACKAGE / module))


def _code(path: Path) -> str:
    """A module's import lines."""
    return "\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if re.match(r"\s*(from|import) ", line))
