"""A sweep's tables, of folders made by hand."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from relora_ds.sweeps import pictures
from relora_ds.sweeps.events import Events
from relora_ds.sweeps.pictures import Evaluations
from relora_ds.sweeps.sweep_file import Sweep
from relora_ds.sweeps.table import mean_and_spread, write
from tests.unit.reports.run_folders import begun, write_starts
from tests.unit.sweeps.conftest import make_done, make_run


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_mean_and_sample_standard_deviation() -> None:
    assert mean_and_spread([1.0, math.nan, 3.0]) == (2.0, math.sqrt(2))
    mean, spread = mean_and_spread([4.0])
    assert mean == 4.0 and math.isnan(spread)
    assert all(map(math.isnan, mean_and_spread([])))


def test_the_tables_of_a_sweep(sweep: Sweep) -> None:
    lora, relora, lora_2, relora_2 = sweep.runs
    make_done(lora, 20.0)
    make_done(lora_2, 21.0)
    make_done(relora, 18.25)
    make_run(relora_2, update=5, losses=[3.0, None], perplexity=1000.0)
    Events(sweep.folder).add(relora_2.name, "diverged", code=1, error="relora-ds: error: not | finite")
    page, table = write(sweep)
    assert table[0] == [
        "arm", "runs done", "validation perplexity", "trainable parameters", "tokens", "seconds in updates", "sent per update",
        "sent in all",
    ]  # fmt: skip
    assert table[1] == ["lora", "2", "20.50 ± 0.71", "640", "2,560", "25.6", "1.01 kB", "20.2 kB"]
    assert table[2][:3] == ["relora", "1 of 2", "18.25"], "one seed has no spread, and what diverged does not count"
    first, second = rows(sweep.folder / "sweep.csv")
    assert (first["arm"], first["n"], first["runs"]) == ("lora", "2", "2")
    assert float(first["perplexity_sd"]) == pytest.approx(math.sqrt(0.5))
    assert (second["perplexity_mean"], second["perplexity_sd"]) == ("18.25", "")
    runs = rows(sweep.folder / "runs.csv")
    assert [(run["arm"], run["seed"], run["state"], run["update"]) for run in runs] == [
        ("lora", "1", "done", "20"), ("relora", "1", "done", "20"), ("lora", "2", "done", "20"), ("relora", "2", "diverged", "2"),
    ]  # fmt: skip
    assert runs[3]["error"] == "relora-ds: error: not | finite" and runs[3]["updates"] == "20"
    text = page.read_text()
    assert r"| relora/seed-2 | diverged | 5 | relora-ds: error: not \| finite |" in text
    assert [name for name in ("arms", "arms_by_update") if f"![](plots/{name}.png)" in text] == ["arms", "arms_by_update"]
    assert (sweep.folder / "plots" / "arms.png").is_file() and (sweep.folder / "plots" / "arms_by_update.png").is_file()
    report = (sweep.folder / "report.md").read_text()
    assert report.startswith(f"# Sweep {sweep.folder.name}\n") and "lora/seed-1" in report
    html = (sweep.folder / "report.html").read_text()
    assert "<td>20.50 ± 0.71</td>" in html and "relora-ds: error: not | finite" in html and ">lora: 20.50</text>" in html


def test_a_done_run_without_a_perplexity_is_told(sweep: Sweep) -> None:
    """Its last evaluation was no number, or its files are damaged: the mean of the others alone would look like that of all."""
    for run in sweep.runs:
        make_done(run, 20.0)
    lora, relora_2 = sweep.runs[0], sweep.runs[3]
    lora.folder.metrics.write_text(lora.folder.metrics.read_text().replace('_perplexity": 20.0', '_perplexity": null'))
    relora_2.folder.metrics.write_text("x\n" + relora_2.folder.metrics.read_text())
    page, table = write(sweep)
    assert [row[1:3] for row in table[1:]] == [["2", "20.00 (1 of 2)"], ["2", "20.00 (1 of 2)"]]
    assert [row["judged"] for row in rows(sweep.folder / "sweep.csv")] == ["1", "1"]
    assert "| relora/seed-2 | done | 20 | RUN_DIR=" in page.read_text() and "line 1 of metrics.jsonl" in page.read_text()
    assert "line 1 of metrics.jsonl" in rows(sweep.folder / "runs.csv")[3]["error"]


def test_the_curve_of_an_arm_is_that_of_its_runs_that_are_done(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is under way has fewer evaluations, and would cut the mean short; while none is done, it is all there is."""
    lora, relora, lora_2, _ = sweep.runs
    make_done(lora, 20.0)
    make_run(lora_2, update=5, losses=[3.0] * 5, perplexity=40.0)
    make_run(relora, update=5, losses=[3.0] * 5, perplexity=30.0)
    drawn: list[dict[str, list[Evaluations]]] = []
    draw = pictures.on_the_way
    monkeypatch.setattr(pictures, "on_the_way", lambda evaluated: (drawn.append(evaluated), draw(evaluated))[1])
    write(sweep)
    assert drawn == [{"lora": [{20: 20.0}], "relora": [{5: 30.0}]}]


def test_peak_memory_is_that_of_the_phase_that_needs_most(sweep: Sweep) -> None:
    for run, peaks in zip(sweep.runs, [{"full": 1e9, "lora": 8e8}, {"full": 1e9}, {"lora": 2e9}, {}], strict=True):
        make_done(run, 20.0)
        write_starts(run.folder.path, begun(resident_peak_bytes=peaks))
    _, table = write(sweep)
    assert [row[-1] for row in table] == ["peak memory", "1.5 GB ± 707 MB", "1 GB"]


def test_what_nobody_recorded_has_no_column(sweep: Sweep) -> None:
    _, table = write(sweep)
    assert table == [["arm", "runs done"], ["lora", "0 of 2"], ["relora", "0 of 2"]]
    assert not (sweep.folder / "report.md").exists()
    make_done(sweep.runs[0], 20.0)
    sweep.runs[0].folder.traffic.unlink()
    _, table = write(sweep)
    assert "trainable parameters" not in table[0]
