"""The report as a whole: the files it writes, what stands in them, and the folders it refuses."""

from __future__ import annotations

import math
import os
import re
from html import unescape
from pathlib import Path

import matplotlib.image
import pytest

from relora_ds.errors import ConfigError
from relora_ds.reports.report import report
from tests.unit.reports.run_folders import begun, falling, pages, relora_records, restart, words, write_run, write_starts


def cells(text: str, first: str) -> list[str]:
    """The cells of the table row that starts with ``first``."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in row.strip("|").split(" | ")]


def assert_pictures(folder: Path) -> None:
    for name in ("loss", "learning_rate", "perplexity"):
        path = folder / "plots" / f"{name}.png"
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[0] > 300 and pixels.shape[1] > 800
        assert pixels.std() > 0, f"{name} is blank"


def test_report_on_one_run(run_dir: Path) -> None:
    path = report([run_dir])
    assert path == run_dir / "report.md"
    text = path.read_text(encoding="utf-8")
    # Final loss: 4 - 1.755, the mean over updates 151..200. Speed, perplexities and tokens as written above.
    row = ["relora", "relora", "200", "2,000", "2", "2.2450", "3.0000", "200.00", "200.00", "340.00", "100", "1"]
    assert cells(text, "relora") == row
    # Restart 1 at 100: updates 91..100, then 101..110; 51..100, then 101..150, and so to the next restart.
    near, wide = ["3.0450", "2.9450", "-0.1000"], ["3.2450", "2.7450", "-0.5000"]
    assert cells(text, "100")[:9] == ["100", "1", *near, *wide, "2.7450"]
    # Restart 2 at 150: 141..150, then 151..160; 101..150, then 151..200, the last.
    near, wide = ["2.5450", "2.4450", "-0.1000"], ["2.7450", "2.2450", "-0.5000"]
    assert cells(text, "150") == ["150", "2", *near, *wide, "2.2450"]
    assert "| 2 | 0.9900 | 0.3500 | 1.0e-06 | 0.50 | 2,048 |" in text
    assert (
        "relora: ReLoRA, updates 200, 2,000 tokens, 2 restart(s). Validation perplexity: 380.00 after update 20, then 200.00"
        in text
    )
    assert text.count("the loss rose at no restart (0 of 2)") == 2
    for name in ("loss", "learning_rate", "perplexity"):
        assert f"(plots/{name}.png)" in text
    assert_pictures(run_dir)


def test_report_on_two_overlaid_runs(run_dir: Path, tmp_path: Path) -> None:
    full = write_run(tmp_path / "full", falling(80), method="full")
    path = report([run_dir, full], tmp_path / "both")
    text = path.read_text(encoding="utf-8")
    assert path == tmp_path / "both" / "report.md"
    assert cells(text, "full") == ["full", "full", "80", "800", "0", "944.5000", "–", "–", "–", "–", "100", "0"]
    assert "## Restarts of relora" in text and "The run made no restart." in text
    assert_pictures(tmp_path / "both")
    assert not (run_dir / "report.md").exists()


def test_several_runs_go_to_a_report_folder_by_default(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = write_run(tmp_path / "other", falling(3))
    monkeypatch.chdir(tmp_path)
    assert report([run_dir, other]) == Path("report/report.md")
    assert (tmp_path / "report/report.md").is_file()
    assert report([other, other]) == other / "report.md", "the same folder twice is one run"


def test_both_forms_say_the_same(run_dir: Path) -> None:
    """Every section, and every sentence, but where the recipe is copied or named."""
    text, html = pages(run_dir)
    page = plain(unescape(re.sub(r"<[^>]+>", "", html)))
    titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert len(titles) >= 14 and [title for title in titles if title not in page] == []
    sentences = [block for block in text.split("\n\n") if block[0].isupper() and not block.startswith("It is in `")]
    assert len(sentences) >= 14 and [block for block in sentences if plain(block) not in page] == []


def plain(text: str) -> str:
    """Without marks and line ends."""
    return " ".join(re.sub(r"[*`]", "", text).split())


def test_a_report_written_anew_takes_the_place_of_the_old(run_dir: Path) -> None:
    report([run_dir])
    (run_dir / "restarts.jsonl").unlink()
    assert "The run made no restart." in report([run_dir]).read_text(encoding="utf-8")
    assert "The run made no restart." in (run_dir / "report.html").read_text(encoding="utf-8")


def test_run_name_with_special_characters(tmp_path: Path) -> None:
    text = words(write_run(tmp_path / "a|b $x$", falling(3)))
    assert "| a\\|b $x$ | relora | 3 |" in text


def test_names_and_commands_that_utf_8_cannot_hold(run_dir: Path) -> None:
    other = run_dir.rename(os.fsdecode(os.fsencode(run_dir) + b"\xff"))
    write_starts(other, begun(command="relora-ds train \ud800.yaml"))
    path = report([other])
    for name in ("report.md", "report.html"):
        text = (path.parent / name).read_text(encoding="utf-8")
        assert "Report on relora?" in text and "relora-ds train ?.yaml" in text


def test_a_report_tells_no_secret(run_dir: Path) -> None:
    """It may be sent to others."""
    (run_dir / "config.yaml").write_text("method: relora\nrun: {}\ndeepspeed:\n  comet: {enabled: true, api_key: sesame}\n")
    write_starts(run_dir, begun(command="relora-ds train a.yaml deepspeed.comet.api_key=sesame"))
    for text in pages(run_dir):
        assert "sesame" not in text and "api_key=***" in text
    assert "sesame" in (run_dir / "config.yaml").read_text()


def test_the_command_that_trains_again_finds_deepspeeds_file(tmp_path: Path) -> None:
    """The recipe names a file that lay beside it; the run's own is there."""
    folder = write_run(tmp_path / "a run", falling(3), settings="method: full\ndeepspeed: mine.json\n")
    (folder / "deepspeed.json").write_text("{}")
    config, deepspeed = (f"'{text}'" for text in (folder / "config.yaml", f"deepspeed={folder / 'deepspeed.json'}"))
    assert f"`relora-ds train {config} --nproc 1 run.dir=runs/again {deepspeed}`" in words(folder)


@pytest.mark.parametrize(("schedule", "climbs"), [("jagged", True), ("cosine", False)])
def test_only_a_jagged_schedule_is_said_to_climb_again(tmp_path: Path, schedule: str, climbs: bool) -> None:
    settings = f"method: relora\noptimizer: {{schedule: {schedule}}}\n"
    text = words(write_run(tmp_path / "run", relora_records(), [restart(1, 100)], settings=settings))
    assert [note in text for note in ("the last column is the fairer one", "climbs from 0 again")] == [climbs] * 2
    assert "the last 50 before the next restart, or the newest ones, where that comes sooner than 100" in " ".join(text.split())


def test_what_cannot_be_written_is_one_line_and_leaves_the_old_report(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "report.md").write_text("old")
    (run_dir / "report.html").mkdir()
    with pytest.raises(ConfigError, match=r"^--out=.*relora': .*/report.html cannot be written: Is a directory; name another"):
        report([run_dir])
    assert (run_dir / "report.md").read_text() == "old"


def test_large_range_of_perplexities_and_an_infinite_one(tmp_path: Path) -> None:
    values = [math.inf, 50000.0, 40.0]
    evals = [{"update": n, "eval_loss": 1.0, "eval_perplexity": value, "phase": "full"} for n, value in enumerate(values, 1)]
    folder = write_run(tmp_path / "wide", falling(3) + evals)
    text = report([folder]).read_text(encoding="utf-8")
    assert cells(text, "wide")[7:9] == ["40.00", "40.00"]
    assert_pictures(folder)


def test_run_without_restarts_and_config(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "bare", falling(3))
    (folder / "config.yaml").unlink()
    (folder / "restarts.jsonl").unlink()
    assert cells(words(folder), "bare")[:3] == ["bare", "–", "3"]


def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no metrics\.jsonl"):
        report([tmp_path / "missing"])
    evaluation = {"update": 0, "eval_loss": 1.0, "eval_perplexity": 2.7, "phase": "full"}
    with pytest.raises(ConfigError, match="holds no update"):
        report([write_run(tmp_path / "empty", [evaluation])])
    with pytest.raises(ConfigError, match="no run folder"):
        report([])
