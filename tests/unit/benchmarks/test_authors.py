"""The layer of a checkout takes the place of a model's own, or the checkout is refused by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from benchmarks import authors
from relora_ds.errors import ConfigError
from tests.unit.benchmarks.checkouts import checkout


def wrap(folder: Path) -> nn.Module:
    return authors.wrap(nn.Sequential(nn.Linear(6, 4)), folder, targets=["0"], rank=2, alpha=8)


@pytest.mark.parametrize("more", ["keep_original_weights", "keep_original=False", "quantize=None"])
def test_wraps_under_each_name_that_an_argument_has_had(more: str, tmp_path: Path) -> None:
    model = wrap(checkout(tmp_path, more=more))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"wrapped_model.0.lora_A.weight", "wrapped_model.0.lora_B.weight"}


def test_what_is_not_needed_may_be_missing(tmp_path: Path) -> None:
    before = set(sys.modules)
    imports = "import bitsandbytes as bnb, bitsandbytes.functional as bnbF\nfrom loguru import logger"
    assert wrap(checkout(tmp_path, imports=imports)) is not None
    assert not {name for name in set(sys.modules) - before if isinstance(sys.modules[name], authors.MagicMock)}


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ({"name": "Other"}, "has no class ReLoRaModel"),
        ({"imports": "import not_there"}, "cannot be imported: No module named 'not_there'"),
        ({"more": "shape"}, r"cannot be called: missing a required.* argument: 'shape'"),
    ],
    ids=["another class", "another package", "another argument"],
)
def test_another_checkout_is_refused(how: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        wrap(checkout(tmp_path, **how))


def test_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--authors=.*has no peft_pretraining/relora.py; give a checkout of"):
        wrap(tmp_path)
