"""The rules of docs/design.md that a program can check."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from relora_ds.cli.main import build_parser

PACKAGE = Path(__file__).resolve().parents[2] / "relora_ds"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def test_no_file_above_500_lines() -> None:
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "tests").rglob("*.py"), *(PACKAGE.parent / "benchmarks").rglob("*.py")]
    assert len(files) > 300
    assert [path for path in files if len(path.read_text(encoding="utf-8").splitlines()) > 500] == []


def test_the_design_names_every_file_in_its_room() -> None:
    text = (PACKAGE.parent / "docs" / "design.md").read_text(encoding="utf-8")
    said = {
        room: re.sub(r"\s+", " ", files)
        for room, files in re.findall(r"^- \*\*(\w+)\*\* (.*?)(?=^- \*\*|\n\n)", text, re.MULTILINE | re.DOTALL)
    }
    for module in MODULES:
        room, _, file = module.rpartition("/")
        if room and file != "__init__.py":
            assert f"`{file}`" in said[room], f"docs/design.md, {room}: {file}"


def test_rooms_are_small() -> None:
    files = Counter(module.rpartition("/")[0] for module in MODULES if not module.endswith("__init__.py"))
    assert files.pop("") <= 10, "loose files"
    (commands,) = (action.choices for action in build_parser()._actions if isinstance(action.choices, dict))
    assert files.pop("cli") <= len(commands) + 2, "a file a command, besides main.py and options.py"
    assert max(files.values()) <= 12 and all(room.count("/") == 0 for room in files), files


@pytest.mark.parametrize(
    ("pattern", "homes"),
    [
        (
            r"\bos\.environ\b|\bgetenv\b",
            ["environment.py", "launch/launcher.py", "launch/libraries.py", "launch/process_group.py"],
        ),
        (
            r"deepspeed\.runtime\.zero|_hp_mapping|single_partition_of_fp32_groups|bit16_groups|dp_process_group",
            # launch/libraries.py imports Muon, to save time
            [
                "launch/libraries.py",
                *(f"zero/{name}.py" for name in ("gradient_reduction", "parts", "per_parameter", "state", "versions")),
            ],
        ),
        (r"\.follows\(", ["optimizer/wrapper.py"]),
    ],
    ids=["the environment", "the inside of ZeRO", "the trigger of a restart"],
)
def test_one_place_alone(pattern: str, homes: list[str]) -> None:
    users = [module for module in MODULES if re.search(pattern, (PACKAGE / module).read_text(encoding="utf-8"))]
    assert users == homes


@pytest.mark.parametrize(
    "module",
    [
        "schedule.py",
        "method/pruning.py",
        "method/reinit.py",
        "method/exact.py",
        "method/lora.py",
        "method/frozen_weights.py",
        "config.py",
        "run/manifest.py",
        "slurm/script.py",
        "bandwidth/formulas.py",
        "method/full_rank.py",
        "method/linear.py",
        "models/cross_entropy.py",
        "spectra/spectrum.py",
    ],
)
def test_pure_modules_know_of_no_ranks(module: str) -> None:
    assert not re.search(r"torch\.distributed|deepspeed\b(?!\.json|:)", _code(PACKAGE / module))


def _code(path: Path) -> str:
    """A module's import lines."""
    return "\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if re.match(r"\s*(from|import) ", line))
