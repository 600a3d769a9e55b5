"""The command on a run of two LoRA updates, within this process: what it writes, and where."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from relora_ds.cli.main import build_parser, main
from relora_ds.spectra.changes import changes_of
from relora_ds.spectra.spectrum import EXACT_SIDE
from relora_ds.spectra.weights import RunWeights

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_tables_values_and_pictures_are_in_the_runs_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spectrum", str(place / "run")]) == 0
    out, told = capsys.readouterr()
    assert out == f"wrote {place / 'run' / 'spectrum.md'} and {place / 'run' / 'spectrum.html'}\n"
    assert told == "[relora-ds] run: singular values of 14 layers, from update 0 to 2\n"
    page = (place / "run" / "spectrum.md").read_text()
    assert "| run | relora | 0 | 2 | 0 |" in page and "| q_proj | run | 2 | 4 | 4.0 |" in page
    assert "| model.layers.1.mlp.down_proj | 32 × 48 | 4 | 4.0 |" in page
    assert [path.name for path in sorted((place / "run" / "plots").iterdir())] == sorted(f"spectrum_{kind}.png" for kind in KINDS)
    html = (place / "run" / "spectrum.html").read_text()
    assert html.count("<svg") == html.count("<figure") == 2 * len(KINDS) and "<td>32 × 48</td>" in html
    values = rows(place / "run" / "spectrum.csv")
    assert len(values) == 14 * 32 and list(values[0]) == ["run", "from", "to", "layer", "index", "value"]
    assert (values[0]["from"], values[0]["to"], values[0]["index"]) == ("0", "2", "1")


def test_a_sketch_says_what_it_may_err_by(good: Path) -> None:
    """Of a change of rank 4 it finds everything, with 20 values for 32."""
    run = RunWeights(good / "run")
    exact, sketched = (changes_of(run, "run", before=None, now=None, exact_side=side).newest.layers for side in (32, 8))
    for one, other in zip(exact, sketched, strict=True):
        assert (len(one.spectrum.values), len(other.spectrum.values)) == (32, 20)
        assert other.spectrum.values.tolist() == pytest.approx(one.spectrum.values[:20].tolist(), abs=1e-6)
        assert one.spectrum.error == 0.0 < other.spectrum.error < 1e-6


def test_the_help_names_the_side_up_to_which_all_values_are_computed() -> None:
    command = next(action for action in build_parser()._actions if action.dest == "command").choices["spectrum"]
    (option,) = (action for action in command._actions if action.dest == "exact_side")
    assert option.help.endswith(f"Default: {EXACT_SIDE}.")
