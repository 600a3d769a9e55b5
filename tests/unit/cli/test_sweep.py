"""``relora-ds sweep``: options, and what each writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from relora_ds.cli.main import main

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def file(recipe: Path, tmp_path: Path) -> Path:
    path = tmp_path / "sweep.yaml"
    content = {"recipe": str(recipe), "dir": str(tmp_path / "sweep"), "seeds": [1], "arms": {"lora": {"method": "lora"}}}
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_dry_run_writes_nothing(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(file), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["lora/seed-1", "not", "begun", "20", "2,560", "unknown"]
    assert not (tmp_path / "sweep").exists()


def test_the_table_alone_trains_nothing(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(file), "--table"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["lora", "0", "of", "1"]
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["runs.csv", "sweep.csv", "sweep.md"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--jobs", "0"], "--jobs=0: must be at least 1"),
        (["--tabel"], "--tabel=None: unknown option; did you mean '--table'?"),
        (["--table", "--dry-run"], "argument --dry-run: not allowed with argument --table"),
    ],
)
def test_bad_options(file: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code: object = None
    try:
        code = main(["sweep", str(file), *words])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert capsys.readouterr().err.startswith(f"relora-ds: error: {message}")


def test_it_starts_without_torch(file: Path) -> None:
    code = "import sys; from relora_ds.cli.main import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    for option in ("--dry-run", "--table"):
        subprocess.run([sys.executable, "-c", code, "sweep", str(file), option], check=True, cwd=ROOT, capture_output=True)
