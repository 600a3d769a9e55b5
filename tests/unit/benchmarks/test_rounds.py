"""Ways are timed in turns and compared round by round; what was found is told with the machine, the versions and the command."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from benchmarks import rounds
from benchmarks.rounds import Record, Spread, Times, in_turns

ABOUT = {
    "date": "2026-01-02 03:04", "commit": "abc1234", "device": "cpu, a name", "threads": 2, "cuda": None, "python": "3.11.7",
    "torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0", "peft": None, "triton": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("values", "spread"),
    [([3.0], (3, 3, 3, 3, 3)), ([1.0, 2.0], (1, 1.25, 1.5, 1.75, 2)), ([5.0, 1.0, 4.0, 2.0, 3.0], (1, 2, 3, 4, 5))],
)
def test_spread(values: list[float], spread: tuple[float, ...]) -> None:
    assert Spread.of(values) == Spread(*spread)


def test_every_round_does_every_way_once() -> None:
    """A clock that goes on only inside of the ways, and in what is waited for after them."""
    now, events = [0.0], []

    def way(name: str, seconds: float) -> rounds.Callable[[int], str]:
        def work(number: int) -> str:
            events.append((name, number))
            now[0] += seconds * (number + 1)
            return f"{name}{number}"

        return work

    def settle() -> None:
        events.append("settled")
        now[0] += 0.25

    times = in_turns({"a": way("a", 1), "b": way("b", 2)}, 2, warm_up=1, settle=settle, clock=lambda: now[0])
    assert [event for event in events if event != "settled"] == [(name, number) for number in range(3) for name in "ab"]
    assert events[:6] == ["settled", ("a", 0), "settled", "settled", ("b", 0), "settled"]
    assert times.seconds == {"a": [2.25, 3.25], "b": [4.25, 6.25]}, "without the warm-up, and with what was under way"
    assert times.returned == {"a": ["a0", "a1", "a2"], "b": ["b0", "b1", "b2"]}


def test_ways_are_compared_within_each_round() -> None:
    """In every round b takes half as long again, while the machine is ever busier. The ratio of two medians says another thing."""
    times = Times({"a": [1.0, 2.0, 8.0], "b": [1.5, 3.0, 12.0]}, {})
    assert times.as_fast("a", "b") == Spread(1.5, 1.5, 1.5, 1.5, 1.5)
    apart = Times({"a": [1.0, 2.0, 8.0], "b": [1.5, 8.0, 4.0]}, {})
    assert apart.as_fast("a", "b").median == 1.5 != 4.0 / 2.0


def test_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = Times({"a | b": [2.0, 4.0], "c": [1.0, 1.0]}, {"a | b": [7.0, 6.5, 6.0], "c": [7.0, 6.5, 6.0]})
    facts = {"a | b": {"tokens/s": "100"}, "c": {"tokens/s": "300", "MB": "4.0"}}
    record = Record(times, ["a | b"], facts, [[["part", "s"], ["forward", "0.5"]]], ["a note"], "python -m x", ABOUT)
    record.write(argparse.Namespace(json=tmp_path / "found.json", markdown=tmp_path / "found.md"))
    text = (tmp_path / "found.md").read_text()
    assert text in capsys.readouterr().out
    assert text.splitlines() == [
        "    python -m x", "",
        "cpu, a name, threads of a process: 2, Python 3.11.7, torch 2.13.0, deepspeed 0.19.8, transformers 5.23.0; "
        "commit abc1234, 2026-01-02 03:04 UTC.", "",
        r"| way | s: least | quartiles | most | times as fast as a \| b | tokens/s | MB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        r"| a \| b | 2.0000 | 2.5000, 3.0000, 3.5000 | 4.0000 | 1.00 (1.00 to 1.00) | 100 |  |",
        "| c | 1.0000 | 1.0000, 1.0000, 1.0000 | 1.0000 | 3.00 (2.50 to 3.50) | 300 | 4.0 |", "",
        "| part | s |", "| --- | --- |", "| forward | 0.5 |", "",
        "- a note",
    ]  # fmt: skip
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["command"] == "python -m x" and content["machine"] == ABOUT and content["notes"] == ["a note"]
    assert content["ways"]["c"]["seconds"] == [1.0, 1.0] and content["ways"]["c"]["returned"] == [7.0, 6.5, 6.0]
    assert content["ways"]["c"]["as_fast"]["a | b"]["median"] == 3.0 and content["ways"]["a | b"]["most"] == 4.0


def test_machine_names_versions_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = rounds.machine()
    assert about["torch"].startswith(torch.__version__.partition("+")[0]) and about["threads"] == torch.get_num_threads()
    assert about["device"].startswith("cpu, ") and about["cuda"] is None
    assert f"commit {about['commit'] or 'unknown'}" in rounds.told(about)
    monkeypatch.setattr(rounds, "ROOT", tmp_path)
    assert rounds.machine()["commit"] is None, "no repository"


def test_most_bytes_leaves_out_what_was_there() -> None:
    there = torch.ones(1000)
    assert rounds.most_bytes(lambda: there.add_(1)) == 0
    assert rounds.most_bytes(lambda: (there + 1).sum()) == 4004


@pytest.mark.parametrize("text", ["0", "-3", "many"])
def test_numbers_are_positive(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    rounds.add_options(parser, tokens=64)
    assert parser.parse_args(["--warm-up", "1"]) == argparse.Namespace(tokens=64, rounds=5, warm_up=1, json=None, markdown=None)
    with pytest.raises(SystemExit):
        parser.parse_args(["--rounds", text])
    assert "--rounds" in capsys.readouterr().err
