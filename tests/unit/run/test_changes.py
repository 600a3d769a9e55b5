"""What a run may be resumed with."""

from __future__ import annotations

from pathlib import Path

import pytest

from relora_ds import config
from relora_ds.run.changes import UNUSED, differences


def changed(recipe: Path, method: str, override: str) -> list[str]:
    before, now = (config.load(recipe, [f"method={method}", *more]) for more in ([], [override]))
    return [key for key, _, _ in differences(before, now)]


@pytest.mark.parametrize(
    ("override", "methods"),
    [
        ("relora.restart_every=7", ["relora"]),
        ("relora.restart_warmup=1", ["relora"]),
        ("relora.reset.ratio=0.5", ["relora"]),
        ("relora.rewarm=factors", ["relora"]),
        ("relora.warm_start=3", ["lora", "relora"]),
        ("relora.init=orthonormal", ["lora", "relora"]),
        ("relora.frozen.dtype=bf16", ["lora", "relora"]),
        ("relora.dropout=0.2", ["lora", "low_rank", "relora"]),
        ("optimizer.lora_lr=0.5", ["lora", "low_rank", "relora"]),
        ("relora.rank=3", ["control", "lora", "low_rank", "relora"]),
        ("optimizer.lr=0.5", ["full", "control", "lora", "low_rank", "relora"]),
        ("model.compile=false", []),
        ("train.eval_every=3", []),
    ],
)
def test_a_setting_matters_to_the_methods_that_use_it(recipe: Path, override: str, methods: list[str]) -> None:
    key = override.partition("=")[0]
    assert {method: changed(recipe, method, override) for method in UNUSED} == {
        method: [key] if method in methods else [] for method in UNUSED
    }


def test_of_two_methods_all_that_either_uses_matters(recipe: Path) -> None:
    before, now = config.load(recipe, ["method=full"]), config.load(recipe, ["method=relora", "relora.restart_every=7"])
    assert [key for key, _, _ in differences(before, now)] == ["method", "relora.restart_every"]
