"""The one command for a GPU: which parts are done, how long each may take, and what is told of those that did not get the time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import attention, gpu, gpu_checks, restart, step
from benchmarks.gpu_steps import Case, architecture
from tests.unit.benchmarks.test_rounds import ABOUT

PARSERS: dict[str, Callable[[Sequence[str]], Any]] = {
    "benchmarks.attention": attention.parse,
    "benchmarks.step": step.parse,
    "benchmarks.restart": restart.parse,
}


def session(out: Path, tiny: bool = False) -> gpu.Session:
    return gpu.Session(out, {"machine": ABOUT, "command": "the command", **{part: [] for part in gpu.PARTS}}, tiny)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["checks", "steps"]),
        (["--tiny"], ["checks", "attention", "switches", "restart", "steps"]),
        (["--set", "forms"], ["steps"]),
        (["--set", "forms", "--part", "checks", "steps"], ["checks", "steps"]),
        (["--tiny", "--part", "restart"], ["restart"]),
    ],
)
def test_the_parts_that_are_done(words: list[str], parts: list[str]) -> None:
    assert gpu.parse(["--out", "out", *words]).part == parts


def test_a_set_without_the_steps_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(["--out", "out", "--set", "first", "--part", "checks"])
    assert "--set: says which ways of training the steps are" in capsys.readouterr().err


@pytest.mark.parametrize("parts", [gpu.DEFAULT, ["attention", "switches", "restart"]])
def test_a_part_alone_gets_all_the_time_and_parts_together_no_more(parts: list[str]) -> None:
    assert [gpu.share(part, [], 480.0) for part in gpu.PARTS] == [480.0] * len(gpu.PARTS)
    left, taken = 480.0, []
    for number, part in enumerate(parts):
        taken.append(gpu.share(part, parts[number + 1 :], left))
        left -= taken[-1]
    assert left == pytest.approx(0.0) and min(taken) > 2 * gpu.LEAST_S
    assert gpu.share("restart", [], 300.0) == 300.0, "what the others did not use"


@pytest.mark.parametrize("commands", [gpu.COMMANDS, gpu.TINY_COMMANDS], ids=["real", "tiny"])
def test_every_command_is_one(commands: dict[str, list[list[str]]]) -> None:
    assert set(commands) == {"attention", "switches", "restart"}
    for asked in commands.values():
        for module, *words in asked:
            options = PARSERS[module]([*words, "--json", "a", "--markdown", "b"])
            assert (options.json, options.markdown) == (Path("a"), Path("b"))


def test_the_switches_of_models_with_even_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "obstacle", lambda device: None)
    for _, *words in gpu.COMMANDS["switches"]:
        found = step.cases(step.parse(words))
        assert len(found) == 6
        first = next(iter(found.values()))
        config = architecture(first)
        assert first.compile and first.accumulation == 2
        assert (config.vocab_size % 64, config.intermediate_size % 16) == (0, 0)


def test_every_way_of_training_is_a_case() -> None:
    for case in (case for cases in gpu.SETS.values() for case in cases):
        assert Case(**case) and Case(**(case | gpu.TINY)).hidden == 64
    assert set(gpu.TINY_CHECKS) <= set(gpu_checks.names()) <= set(gpu_checks.CHECKS)


def test_a_child_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    started = time.monotonic()
    output, problem = gpu.child(
        ["timeit", "-n", "1", "print('CHECK {}', flush=True); import time; time.sleep(60)"], 2.0, tmp_path / "log"
    )
    assert problem == "not done after 2 s" and time.monotonic() - started < 30
    assert gpu.said(output, "CHECK ") == [{}], "what it said before"


def test_a_child_that_fails(tmp_path: Path) -> None:
    _, problem = gpu.child(["timeit", "1 / 0"], 60.0, tmp_path / "log")
    assert problem and problem.startswith("exit code 1: ") and "ZeroDivisionError" in problem
    assert gpu.child(["timeit", "-n", "1", "-r", "1", "1"], 60.0, tmp_path / "log")[1] is None


def test_checks_that_were_not_reached_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "CHECK " + json.dumps({"check": "products of a merge", "seconds": 1.0, "passed": False, "error": "a bit"})
    monkeypatch.setattr(gpu, "child", lambda words, seconds, log: (said, "not done after 9 s"))
    found = session(tmp_path, tiny=True)
    found.checks(time.monotonic() + 9)
    later = [f"- checks: {name}: not run: the process had ended" for name in gpu.TINY_CHECKS[2:]]
    left = ["- checks: int8 stores: not done after 9 s", *later]
    assert gpu.TINY_CHECKS[:2] == ["products of a merge", "int8 stores"] and later
    text = (tmp_path / "gpu.md").read_text()
    assert text.partition("## Not run, or not to the end\n\n")[2].splitlines() == left
    assert "| products of a merge | FAILED | 1.0 |" in text and "| int8 stores | no answer |" in text


def test_commands_are_kept_with_their_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first writes its record, the second dies before it has."""

    def child(words: Sequence[str], seconds: float, log: Path) -> tuple[str, str | None]:
        if "llama_350m" in words:
            return "", "exit code 1: it broke"
        Path(words[words.index("--json") + 1]).write_text('{"figure": 1}')
        Path(words[words.index("--markdown") + 1]).write_text("a table\n")
        return "", None

    monkeypatch.setattr(gpu, "child", child)
    found = session(tmp_path)
    found.commands("switches", time.monotonic() + 60)
    one, other = json.loads((tmp_path / "gpu.json").read_text())["switches"]
    assert one["found"] == {"figure": 1} and one["text"] == "a table\n" and "error" not in one
    assert other["error"] == "exit code 1: it broke" and "found" not in other
    text = (tmp_path / "gpu.md").read_text()
    assert "## switches\n\na table\n" in text and "exit code 1: it broke" in text and "Not run" not in text


def test_a_command_that_writes_nothing_leaves_no_record_of_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("json", "markdown"):
        (tmp_path / f"restart_0.{kind}").write_text("{}")
    monkeypatch.setattr(gpu, "child", lambda words, seconds, log: ("", None))
    found = session(tmp_path)
    found.commands("restart", time.monotonic() + 60)
    assert [one["error"] for one in found.record["restart"]] == ["wrote nothing"]


def test_nothing_is_begun_without_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "child", lambda *given: pytest.fail("begun"))
    found = session(tmp_path)
    found.commands("attention", time.monotonic() + gpu.LEAST_S - 1)
    found.steps(gpu.SETS["first"][:1], time.monotonic() + gpu.LEAST_S - 1)
    assert (tmp_path / "gpu.md").read_text().splitlines()[-2:] == [
        "- attention: benchmarks.attention --rounds 10: not run: no time left",
        "- steps: model=llama_1b arm=full: not run: no time left",
    ]


def test_a_way_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = {
        "update_s": [2.0, 1.0, 3.0], "mfu_done": 0.5, "mfu_full": None, "peak_gib": 1.5, "tokens_per_s": 1234.5, "trained": 1000,
        "profile": [["kernel", 2.0, 3]],
    }  # fmt: skip
    monkeypatch.setattr(gpu, "child", lambda words, seconds, log: ("RESULT " + json.dumps(result), None))
    found = session(tmp_path)
    found.steps([{"model": "llama_1b", "arm": "full", "profile": True}], time.monotonic() + 60)
    text = (tmp_path / "gpu.md").read_text()
    assert "| model=llama_1b arm=full | 1,234 | 0.500 |  | 1.500 | 1,000 | 1.000, 2.000, 3.000 |" in text
    assert "| `kernel` | 2.0 | 3 |" in text
