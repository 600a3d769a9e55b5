"""``relora-ds eval``: what it refuses to measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from relora_ds.cli.main import main
from relora_ds.data.prepare import prepare


@pytest.mark.parametrize("vocab_size", [290, 320])
def test_tokens_of_another_tokenizer_are_refused(place: Path, vocab_size: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of its ids may be a row of the model, and means something else to it."""
    (place / "other.txt").write_text("Quite another text, of other words, than that of the run. " * 50)
    prepare(str(place / "other.txt"), place / "other", vocab_size=vocab_size, holdout=0.5, progress=False)
    assert main(["eval", str(place / "run"), "--data", str(place / "other")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("relora-ds: error: --data=") and "its tokenizer is not the run's" in told and "--tokenizer" in told


def test_ids_that_the_model_has_no_rows_for_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (place / "run" / "model").glob("tokenizer*"):
        file.unlink()
    index = json.loads((place / "tokens" / "index.json").read_text())
    index["tokenizer"]["encoder_size"] += 100
    (place / "tokens" / "index.json").write_text(json.dumps(index))
    assert main(["eval", str(place / "run"), "--data", str(place / "tokens")]) == 2
    assert "its tokenizer has 400 entries, the model's vocabulary 300; prepare" in capsys.readouterr().err
