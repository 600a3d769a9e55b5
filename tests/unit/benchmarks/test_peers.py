"""Losses of ways that train the same are compared; settings that cannot be are refused before anything is built."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks import peers

KINDS = {"full": "weights", "DDP": "weights", "split": "factors", "merged": "factors"}


def test_largest_difference() -> None:
    """All ways begin alike. Then weights and factors train to other losses, which is no difference."""
    losses = {"full": [7.0, 6.0, 5.0], "DDP": [7.0, 6.0, 5.0], "split": [7.0, 6.5, 6.0], "merged": [7.0, 6.5, 6.25]}
    assert peers.largest_difference(losses, KINDS) == 0.25
    losses["DDP"][0] = 6.0
    assert peers.largest_difference(losses, KINDS) == 1.0
    losses["merged"][2] = math.nan
    assert peers.largest_difference(losses, KINDS) == math.inf
    late = {way: [7.0] * peers.COMPARED + [float(number)] for number, way in enumerate(KINDS)}
    assert peers.largest_difference(late, KINDS) == 0.0, "later updates drift apart"


def test_models_of_others_get_the_same_factors() -> None:
    options = peers.parse(["--hidden", "32", "--layers", "1"])
    factors = {f"model.layers.0.{part}.{name}": torch.randn(4, 86 if name == "down_proj" else 32) for part, name in (
        ("self_attn", "q_proj"), ("self_attn", "k_proj"), ("self_attn", "v_proj"), ("self_attn", "o_proj"),
        ("mlp", "gate_proj"), ("mlp", "up_proj"), ("mlp", "down_proj"),
    )}  # fmt: skip
    model = peers.alike(peers.with_peft(peers.model(options), 4), factors)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    firsts = {name: parameter for name, parameter in trained.items() if "lora_A" in name}
    assert len(firsts) == len(factors) and sum("lora_B" in name for name in trained) == len(factors)
    for name, parameter in firsts.items():
        layer = name.removeprefix("base_model.model.").partition(".lora_A")[0]
        assert torch.equal(parameter, factors[layer])
    assert sum(any(part in name for part in ("embed_tokens", "norm", "lm_head")) for name in trained) == 5
    with pytest.raises(AssertionError, match="without factors: another"):
        peers.alike(peers.with_peft(peers.model(options), 4), {**factors, "another": torch.zeros(4, 32)})


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--nproc", "2", "--tokens", "768"], "must be a multiple of 512"),
        (["--micro-batches", "3"], "must be a multiple of 768"),
        (["--rank", "0"], "must be at least 1"),
        (["--authors", "nowhere"], "has no peft_pretraining/relora.py"),
    ],
)
def test_refused(words: list[str], problem: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as refused:
        peers.parse(words)
    assert refused.value.code == 2 and problem in capsys.readouterr().err
