"""One story that every combination of versions in the range must live through. Named to pytest by each.py, under each of them.

PYTHONPATH=FOLDER_OF_OTHER_VERSIONS:$PWD .venv/bin/python -m pytest tests/versions/story.py
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import transformers

from relora_ds.errors import EXIT_DONE
from relora_ds.models.export import export_model, load_merged
from tests.distributed.conftest import content  # noqa: F401 — a fixture: 18 updates, restarts after 8, 12 and 16
from tests.distributed.pool import run
from tests.distributed.test_equivalence import RESETS, plain_relora, poison_one_rank, zero_relora
from tests.distributed.test_training import at, read_log, train_here
from tests.versions.load_export import LOGITS, logits


def test_zero_equals_a_plain_loop() -> None:
    """Stage 2, three micro-batches, two restarts: what a version does to gradients shows here, whether it fails or not."""
    plain = plain_relora(RESETS["default"])
    for result in run(2, zero_relora, RESETS["default"], 2, 3):
        assert result["restarts"] == 2
        assert result["losses"] == pytest.approx(plain["losses"], rel=1e-5), "only the order of sums differs"


def test_a_non_finite_loss_skips_the_update_on_all_ranks() -> None:
    for result in run(2, poison_one_rank, "fp32"):
        assert result["unchanged"] and not result["applied"] and result["again"]


def test_trains_stops_resumes_and_goes_on_with_another_number_of_ranks(content: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    """Stopped in the middle of the LoRA phase, resumed on two ranks, killed, gone on with one: the losses of the undisturbed run."""
    print(f"DeepSpeed {deepspeed.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
    whole, disturbed = at(content, tmp_path / "whole"), at(content, tmp_path / "disturbed")
    assert run(2, train_here, whole) == [EXIT_DONE] * 2
    run(2, train_here, disturbed, None, 7)  # stopped after update 7, as by a signal
    run(2, train_here, disturbed, 13)  # killed after update 13: the newest checkpoint is that of 12
    assert run(1, train_here, disturbed) == [EXIT_DONE]
    first, second = (read_log(tmp_path / name / "metrics.jsonl") for name in ("whole", "disturbed"))
    losses = [[record["loss"] for record in log if "loss" in record] for log in (first, second)]
    assert len(losses[0]) == 18 and all(map(math.isfinite, losses[0]))
    assert losses[1][:12] == losses[0][:12], "to the last digit on as many ranks"
    assert losses[1] == pytest.approx(losses[0], rel=1e-5), "only the order of sums differs on another number"
    restarts = [read_log(tmp_path / name / "restarts.jsonl") for name in ("whole", "disturbed")]
    assert [record["update"] for record in restarts[0]] == [record["update"] for record in restarts[1]] == [8, 12, 16]
    exported = tmp_path / "exported"
    export_model(tmp_path / "whole", exported)
    torch.save(logits(load_merged(tmp_path / "whole", dtype=torch.float32)), exported / LOGITS)
