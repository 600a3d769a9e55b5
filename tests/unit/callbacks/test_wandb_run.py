"""wandb, by a stand-in: what it is told, and that nothing that it does ends a run."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from relora_ds.callbacks.callback import RunState
from relora_ds.callbacks.wandb_run import WandbRun


class Wandb:
    """Its service holds the id of a run that failed until it is ended."""

    def __init__(self, key: str | None = "k", fails: tuple[str, ...] = ()) -> None:
        self.key, self.fails = key, fails
        self.calls: list[str] = []
        self.options: dict[str, Any] = {}
        self.logged: list[tuple[dict[str, Any], int]] = []

    def login(self, key: str | None = None, *, verify: bool = True, prompt: bool = True) -> bool:
        assert not verify and not prompt, "neither the network nor the user is asked"
        return self.key is not None

    def Settings(self, **_: object) -> None:
        return None

    def init(self, *, mode: str, **options: object) -> Wandb:
        self.calls.append(mode)
        self.options = options
        if mode in self.fails:
            raise RuntimeError("context deadline exceeded\nwhile retrying")
        if "online" in self.calls[:-1] and "teardown" not in self.calls:
            raise RuntimeError("run ID is in use")
        return self

    def teardown(self) -> None:
        self.calls.append("teardown")

    def log(self, values: dict[str, Any], step: int) -> None:
        if "log" in self.fails:
            raise BrokenPipeError("the service is gone")
        self.logged.append((values, step))

    def finish(self, exit_code: int) -> None:
        self.calls.append(f"finish {exit_code}")
        if "finish" in self.fails:
            raise OSError("no space left on device")


class OlderWandb(Wandb):
    """Before 0.31."""

    @property
    def api(self) -> SimpleNamespace:
        return SimpleNamespace(api_key=self.key)

    def login(self, key: str | None = None) -> bool:  # type: ignore[override]
        raise AssertionError("it would ask the user")


@pytest.fixture
def start(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Begins a run over a stand-in; gives the callback, the run and the lines to the user."""

    def begin(stand_in: Wandb, wandb: dict[str, Any] | None = None, **environment: str) -> tuple[WandbRun, RunState, list[str]]:
        monkeypatch.setitem(sys.modules, "wandb", stand_in)
        run, lines = make_run(wandb=wandb or {})
        callback = WandbRun(environment, run.tell)
        callback.begin(run)
        return callback, run, lines

    return begin


@pytest.mark.parametrize(
    ("key", "mode", "variable", "calls"),
    [
        ("k", "auto", "", ["online"]),
        (None, "auto", "", ["offline"]),
        ("k", "auto", "offline", ["offline"]),
        ("k", "auto", "dryrun", ["offline"]),
        ("k", "auto", "disabled", []),
        ("k", "online", "offline", ["online"]),
        ("k", "disabled", "online", []),
    ],
)
def test_the_recipe_decides_then_the_variable_then_the_key(
    start: Any, key: str | None, mode: str, variable: str, calls: list[str]
) -> None:
    for stand_in in (Wandb(key), OlderWandb(key)):
        start(stand_in, {"mode": mode}, WANDB_MODE=variable)
        assert stand_in.calls == calls


def test_what_is_secret_stays_here(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", stand_in := Wandb())
    run, _ = make_run(deepspeed={"comet": {"enabled": True, "api_key": "abc"}})
    WandbRun({}, run.tell).begin(run)
    assert stand_in.options["config"]["deepspeed"] == {"comet": {"enabled": True, "api_key": "***"}}
    assert stand_in.options["config"]["relora"] == run.config.model_dump(mode="json")["relora"]


def test_project_and_name(start: Any, tmp_path: Path) -> None:
    stand_in = Wandb()
    start(stand_in)
    assert (stand_in.options["project"], stand_in.options["name"]) == ("relora_ds", tmp_path.name)
    start(stand_in, None, WANDB_PROJECT="p", WANDB_NAME="n")
    assert (stand_in.options["project"], stand_in.options["name"]) == ("p", "n")
    start(stand_in, {"project": "mine", "name": "own"}, WANDB_PROJECT="p", WANDB_NAME="n")
    assert (stand_in.options["project"], stand_in.options["name"]) == ("mine", "own")


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_a_server_that_is_not_reached_ends_no_run(start: Any, mode: str, tmp_path: Path) -> None:
    stand_in = Wandb(fails=("online",))
    callback, run, lines = start(stand_in, {"mode": mode})
    assert stand_in.calls == ["online", "teardown", "offline"]
    assert stand_in.options["id"] == (tmp_path / "wandb_id").read_text()
    assert lines == [f"wandb goes on offline (context deadline exceeded); later: wandb sync {tmp_path}/wandb/offline-run-*"]
    callback.update(run, {"update": 3, "loss": 1.0, "grad_norm": math.nan})
    callback.evaluation(run, {"update": 3, "eval_loss": 2.0})
    callback.end(0)
    assert stand_in.logged == [({"train/loss": 1.0}, 3), ({"eval/eval_loss": 2.0}, 3)], "without what is not finite"
    assert stand_in.calls[-1] == "finish 0"


@pytest.mark.parametrize(
    ("fails", "told"),
    [
        (("online", "offline"), "wandb does not start (context deadline exceeded): the run goes on without"),
        (("log",), "wandb takes no more figures (the service is gone): the run goes on without"),
        (("finish",), "wandb did not end well (no space left on device): the run goes on without"),
    ],
)
def test_whatever_wandb_does_is_told_once(start: Any, fails: tuple[str, ...], told: str) -> None:
    callback, run, lines = start(Wandb(fails=fails), {"mode": "online"})
    for step in (1, 2):
        callback.update(run, {"update": step, "loss": 1.0})
    callback.end(0)
    assert lines[-1] == told and lines.count(told) == 1
