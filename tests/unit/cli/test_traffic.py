"""``relora-ds traffic``: what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from relora_ds.cli import main as cli


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nproc", "1"], "--nproc=1: one process sends nothing; use at least 2"),
        (["--arms", "recipe,zero3"], "--arms='zero3': no such way to train; did you mean 'zero2'?"),
        (["--link", "fast"], "--link='fast': is no amount of data"),
        (["--updates", "0"], "--updates=0: must be at least 1"),
        (["--nprocs", "2"], "--nprocs=None: unknown option; did you mean '--nproc'?"),
        (["train.global_batch=7", "--nproc", "2"], "train.global_batch=7: is not a multiple"),
    ],
)
def test_bad_input(recipe: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["traffic", str(recipe), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
