"""Batches that are read ahead, in real runs: a damaged token file ends a run where it always did, and no thread is left behind."""

from __future__ import annotations

import copy
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from relora_ds.callbacks.callback import Callback, RunState
from relora_ds.config import parse
from relora_ds.data.token_dataset import TokenDataset, permute
from relora_ds.errors import EXIT_DONE, EXIT_STOPPED, ConfigError
from relora_ds.launch import places
from relora_ds.supervision import faults
from relora_ds.training.loop import train
from relora_ds.training.preflight import check
from tests.distributed.pool import run
from tests.distributed.test_training import read_log, train_here


@pytest.fixture
def content(settings: dict[str, Any]) -> dict[str, Any]:
    """Eight updates of four micro batches in all; factors from the fifth on."""
    content = copy.deepcopy(settings)
    content["relora"] = {"rank": 4, "alpha": 8, "warm_start": 4, "restart_every": 2, "restart_warmup": 1}
    content["train"] = {"updates": 8, "global_batch": 8, "micro_batch": 2, "eval_every": 3, "checkpoint_every": 4}
    content["wandb"] = {"mode": "disabled"}
    return content


def threads_left(content: dict[str, Any], kill_after: int | None, stop_after: int | None) -> tuple[int, list[str]]:
    """How a run ended, and the names of the threads that are there since then."""
    before = set(threading.enumerate())
    code = train_here(content, kill_after, stop_after)
    return code, [thread.name for thread in threading.enumerate() if thread not in before and thread.name == "batches"]


@pytest.mark.parametrize(
    ("kill_after", "stop_after", "code"),
    [(None, None, EXIT_DONE), (None, 2, EXIT_STOPPED), (6, None, -1)],
    ids=["to its end", "stopped", "by an error"],
)
def test_no_thread_outlives_its_run(content: dict[str, Any], kill_after: int | None, stop_after: int | None, code: int) -> None:
    assert run(2, threads_left, content, kill_after, stop_after) == [(code, [])] * 2


class Damage(Callback):
    """Once the run has begun, fills a sample of the training tokens with an id that no token has."""

    def __init__(self, sample: int) -> None:
        self.sample = sample

    def begin(self, run: RunState) -> None:
        data = run.config.data
        dataset = TokenDataset(Path(data.path), "train", data.sequence_length)
        epoch, position = divmod(self.sample, len(dataset))
        (place,) = permute(np.array([position]), len(dataset), run.config.run.seed, epoch)
        file = dataset.index.folder / dataset.index.splits["train"].file
        tokens = np.memmap(file, dtype=dataset.index.dtype, mode="r+").reshape(-1)
        tokens[place * data.sequence_length : (place + 1) * data.sequence_length] = 65_535
        tokens.flush()


def error_of_a_run(content: dict[str, Any], sample: int) -> str:
    place = places.discover()
    assert place is not None
    checked = check(parse(content), Path("recipe.yaml"), place.world_size)
    try:
        train(checked, place, torch.device("cpu"), callbacks=[Damage(sample)])
    except ConfigError as error:
        return str(error)
    return ""


def test_a_damaged_sample_ends_the_run_in_its_own_update(content: dict[str, Any], tmp_path: Path) -> None:
    """The third micro batch of the sixth update: the two updates before it were read ahead of, and are trained on."""
    tokens = tmp_path / "tokens"
    shutil.copytree(content["data"]["path"], tokens)
    content["data"]["path"] = str(tokens)
    (told,) = run(1, error_of_a_run, content, 5 * 8 + 2 * 2)
    assert "it holds the id 65535" in told and told.startswith(f"data.path={str(tokens)!r}: a token file is damaged")
    updates = [record["update"] for record in read_log(tmp_path / "run" / "metrics.jsonl") if "loss" in record]
    assert updates == [1, 2, 3, 4, 5]
    assert faults.read(tmp_path / "run") == [], "it is the user's to mend"
