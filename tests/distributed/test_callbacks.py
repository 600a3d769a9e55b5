"""Callbacks of one's own on the training loop, over real ranks."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from relora_ds.callbacks.callback import Callback, RunState
from relora_ds.config import parse
from relora_ds.errors import EXIT_DONE, ConfigError
from relora_ds.launch import places
from relora_ds.optimizer.wrapper import RestartRecord
from relora_ds.run.lock import LOCK_NAME
from relora_ds.supervision import faults
from relora_ds.training.loop import train
from relora_ds.training.preflight import check
from tests.conftest import TINY_LLAMA
from tests.distributed.pool import run


class Listener(Callback):
    """Keeps what it hears, adds up a field over the ranks, and fails where it is told to."""

    def __init__(self, fails_at: int | None) -> None:
        self.heard: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.fails_at = fails_at

    def begin(self, run: RunState) -> None:
        self.heard.append(f"begin {run.phase}")

    def begin_update(self, run: RunState) -> None:
        self.heard.append(f"update {run.update_in_progress}")

    def beat(self, where: str, allow_s: float) -> None:
        self.heard.append(where)

    def update(self, run: RunState, record: dict[str, Any]) -> None:
        if run.done.update == self.fails_at:
            raise RuntimeError("a callback's own error")
        ranks = torch.ones(1)
        dist.all_reduce(ranks)
        self.records.append({**record, "ranks": ranks.item()})

    def restart(self, run: RunState, restart: RestartRecord) -> None:
        self.heard.append(f"restart {restart.restart}")

    def evaluation(self, run: RunState, record: dict[str, Any]) -> None:
        self.heard.append(f"evaluation of {record['update']}")

    def checkpoint(self, run: RunState) -> None:
        self.heard.append(f"checkpoint of {run.done.update}")

    def end(self, exit_code: int) -> None:
        self.heard.append(f"end {exit_code}")


def train_with_a_listener(content: dict[str, Any], fails_at: int | None) -> tuple[int, list[str], list[dict[str, Any]]]:
    place = places.discover()
    assert place is not None
    listener = Listener(fails_at)
    try:
        code = train(
            check(parse(content), Path("recipe.yaml"), place.world_size), place, torch.device("cpu"), callbacks=[listener]
        )
    except RuntimeError as error:
        assert str(error) == "a callback's own error"
        code = -1
    return code, listener.heard, listener.records


@pytest.fixture
def content(settings: dict[str, Any]) -> dict[str, Any]:
    """Six updates of two micro batches a rank; restarts after the fourth and the sixth."""
    content = copy.deepcopy(settings)
    content["relora"] = {"rank": 4, "alpha": 8, "warm_start": 2, "restart_every": 2, "restart_warmup": 1}
    content["train"] = {"updates": 6, "global_batch": 8, "micro_batch": 2, "eval_every": 6, "checkpoint_every": 3}
    content["wandb"] = {"mode": "disabled"}
    return content


def test_what_a_callback_hears(content: dict[str, Any], tmp_path: Path) -> None:
    first, second = run(2, train_with_a_listener, content, None)
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [{key: value for key, value in record.items() if key != "ranks"} for record in first[2]] == [
        record for record in written if "loss" in record
    ], "it stands behind the run's own callbacks"
    assert [record["ranks"] for record in first[2] + second[2]] == [2.0] * 12, "it may run collectives"
    assert first[0] == second[0] == EXIT_DONE
    for _, heard, _ in (first, second):
        told = [text for text in heard if text not in ("a micro batch", "all but the end of a checkpoint", "a checkpoint")]
        told = [text for number, text in enumerate(told) if text != told[number - 1]]  # one batch of the evaluation or several
        assert told == [
            "begin full",
            "update 1", "an update", "update 2", "an update", "a batch of the evaluation", "evaluation of 2",
            "the full-rank phase", "the change of phase",
            "update 3", "an update", "checkpoint of 3", "update 4", "restart 1", "an update", "update 5", "an update",
            "update 6", "restart 2", "an update", "a batch of the evaluation", "evaluation of 6", "checkpoint of 6",
            "end 0",
        ]  # fmt: skip
        assert heard.count("a micro batch") == 12


def test_an_error_in_a_callback_ends_the_run_like_any_other(content: dict[str, Any], tmp_path: Path) -> None:
    for code, heard, records in run(2, train_with_a_listener, content, 5):
        assert (code, heard[-1], len(records)) == (-1, "end 1", 4)
    assert {(fault["kind"], fault["update"]) for fault in faults.read(tmp_path / "run")} == {("error", 5)}


class FailsAtItsEnd(Callback):
    def end(self, exit_code: int) -> None:
        raise OSError("no space left")


def end_badly(content: dict[str, Any], fails_at: int | None) -> tuple[str, list[str], bool]:
    """What a run raised whose first callback fails at its end; what the second one heard; whether the folder stayed locked."""
    place = places.discover()
    assert place is not None
    checked, listener = check(parse(content), Path("recipe.yaml"), place.world_size), Listener(fails_at)
    raised = ""
    try:
        train(checked, place, torch.device("cpu"), callbacks=[FailsAtItsEnd(), listener])
    except Exception as error:
        raised = str(error)
    return raised, listener.heard, Path(content["run"]["dir"], LOCK_NAME).exists()


@pytest.mark.parametrize(
    ("fails_at", "raised", "end"), [(None, "no space left", "end 0"), (2, "a callback's own error", "end 1")]
)
def test_a_callback_that_fails_at_its_end_hides_nothing(
    content: dict[str, Any], fails_at: int | None, raised: str, end: str
) -> None:
    """Those behind it hear of the end, the folder is free, and what ended the run is what it raises."""
    content["train"]["updates"] = 3
    ((told, heard, is_locked),) = run(1, end_badly, content, fails_at)
    assert (told, heard[-1], is_locked) == (raised, end, False)


def refused(content: dict[str, Any]) -> tuple[str, bool]:
    """What a start is refused with for a loss that this model cannot have, and whether it left the folder locked."""
    place = places.discover()
    assert place is not None
    checked = check(parse(content), Path("recipe.yaml"), place.world_size)
    try:
        train(checked, place, torch.device("cpu"))
    except ConfigError as error:
        return str(error), Path(content["run"]["dir"], LOCK_NAME).exists()
    return "", True


def test_a_start_that_is_refused_leaves_the_folder_free(content: dict[str, Any]) -> None:
    """Before this process ends, which is when the lock would be seen to be stale; elsewhere that takes a minute more."""
    content["model"] = {"config": {**TINY_LLAMA, "model_type": "gemma2", "head_dim": 8}, "loss": "chunked"}
    ((told, is_locked),) = run(1, refused, content)
    assert told.startswith("model.loss='chunked': gemma2 does more with its logits") and not is_locked
