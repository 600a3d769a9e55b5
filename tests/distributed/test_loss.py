"""A loss by chunks through the trainer: the same training; and what a run says where it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from relora_ds.errors import EXIT_DONE, ConfigError
from relora_ds.models import cross_entropy
from relora_ds.training.trainer import Trainer
from tests.conftest import VOCAB_SIZE
from tests.distributed.common import WITH_VOCABULARY
from tests.distributed.pool import run
from tests.distributed.test_training import at, read_log, train_here


@pytest.fixture
def content(settings: dict[str, Any]) -> dict[str, Any]:
    """A change of phase after update 3, restarts after 6 and 9, of 9 updates."""
    settings["relora"] |= {"warm_start": 3, "restart_every": 3, "restart_warmup": 1}
    settings["train"] = {"updates": 9, "global_batch": 8, "micro_batch": 2, "eval_every": 4, "checkpoint_every": 2}
    settings["wandb"] = {"mode": "disabled"}
    return settings


def train_in_chunks(content: dict[str, Any], kill_after: int | None = None) -> tuple[int | str, list[str]]:
    """Of five tokens. Returns the exit code or why the run was refused, and what was said before it began."""
    said: list[str] = []
    kept, cross_entropy.CHUNK = cross_entropy.CHUNK, 5 * VOCAB_SIZE
    say, Trainer._say = Trainer._say, lambda self, text: said.append(text)  # type: ignore[method-assign]
    try:
        return train_here(content, kill_after), said
    except ConfigError as error:
        return str(error), said
    finally:
        cross_entropy.CHUNK, Trainer._say = kept, say  # type: ignore[method-assign]


@pytest.mark.parametrize("targets", ["all-linear", WITH_VOCABULARY], ids=["plain head", "head with factors"])
def test_the_losses_of_torchs(content: dict[str, Any], tmp_path: Path, targets: str | list[str]) -> None:
    """Through a change of phase, restarts, and a resume in the full-rank phase."""
    content["relora"]["targets"] = targets
    losses = {}
    for loss in ("torch", "chunked"):
        settings = at(content, tmp_path / loss)
        settings["model"]["loss"] = loss
        assert [code for code, _ in run(2, train_in_chunks, settings, 2)] == [-1, -1]
        assert [code for code, _ in run(2, train_in_chunks, settings)] == [EXIT_DONE, EXIT_DONE]
        records = read_log(tmp_path / loss / "metrics.jsonl")
        losses[loss] = [record.get("loss", record.get("eval_loss")) for record in records]
    assert len(losses["torch"]) == 9 + 4
    assert losses["chunked"] == pytest.approx(losses["torch"], rel=1e-6)
    assert losses["chunked"] != losses["torch"], "they round otherwise"


def test_a_model_that_caps_its_logits(content: dict[str, Any], tmp_path: Path) -> None:
    content["model"]["config"]["model_type"] = "gemma2"
    content["method"] = "full"
    why = "gemma2 does more with its logits than hand them to the usual loss"
    by_name, by_default = at(content, tmp_path / "chunked"), at(content, tmp_path / "auto", updates=3, eval_every=None)
    by_name["model"]["loss"] = "chunked"
    ((code, _),) = run(1, train_in_chunks, by_name)
    assert code == f"model.loss='chunked': {why}; use torch"
    ((code, said),) = run(1, train_in_chunks, by_default)
    assert code == EXIT_DONE and f"model.loss: auto keeps all logits of a micro batch in memory, since {why}" in said
