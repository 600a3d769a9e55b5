"""Each further value of a switch is a way of its own, which differs from the first by it alone."""

from __future__ import annotations

import pytest

from benchmarks import step
from benchmarks.gpu_steps import Case, architecture
from relora_ds.callbacks.costs import Costs


def test_one_switch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "obstacle", lambda device: None)
    found = step.cases(step.parse(["--tokens", "2048", "--length", "256", "--hidden", "64", "--layers", "1"]))
    first = "linear split, compile off, loss torch, accumulation 1, per_parameter once"
    assert list(found) == [first, "linear merged", "compile on", "loss chunked", "accumulation 4", "per_parameter each"]
    base = vars(found[first])
    changed = {name: {key: value for key, value in vars(case).items() if value != base[key]} for name, case in found.items()}
    assert changed == {
        first: {}, "linear merged": {"linear": "merged"}, "compile on": {"compile": True}, "loss chunked": {"loss": "chunked"},
        "accumulation 4": {"accumulation": 4, "micro_batch": 2}, "per_parameter each": {"per_parameter": "each"},
    }  # fmt: skip
    assert base["micro_batch"] == 8 and base["dtype"] == "fp32"


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "obstacle", lambda device: "there is none")
    for words in (["--compile", "off", "on"], ["--compile", "on"]):
        options = step.parse(words)
        assert options.compile == ["off"] and options.notes == ["nothing is compiled: there is none"]
    assert step.parse(["--compile", "off"]).notes == []


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--device", "cuda"], "not what DeepSpeed takes here"),
        (["--tokens", "512"], "must be a multiple of 256 x 4"),
        (["--accumulation", "0"], "must be at least 1"),
        (["--linear", "both"], "invalid choice: 'both'"),
    ],
)
def test_refused(words: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.parse(words)
    assert problem in capsys.readouterr().err


def test_sizes_other_than_the_presets() -> None:
    preset = architecture(Case(model="llama_60m", arm="relora"))
    assert (preset.hidden_size, preset.num_hidden_layers, preset.intermediate_size) == (512, 8, 1376)
    other = architecture(Case(model="llama_60m", arm="relora", hidden=128, layers=2))
    assert (other.hidden_size, other.num_hidden_layers, other.intermediate_size) == (128, 2, 344)
    assert (other.num_attention_heads, other.num_key_value_heads, other.head_dim) == (2, 2, 64)


def test_parts_stand_beside_each_other() -> None:
    one, two = Costs(), Costs()
    one.host_s |= {"forward": 1.0, "rest": 0.5}
    two.host_s |= {"forward": 3.0, "backward": 2.0}
    assert step.by_part({"one": one, "two": two}) == [
        ["part (s, with the profiler)", "one", "two"],
        ["forward", "1.0000", "3.0000"],
        ["backward", "0.0000", "2.0000"],
        ["rest", "0.5000", "0.0000"],
    ]
