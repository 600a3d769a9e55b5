"""Loads a model that relora-ds exported, with transformers alone: ``python tests/versions/load_export.py FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers

LOGITS = "logits.pt"
"""In the exported folder: what the trained model says to the tokens of :func:`logits`."""


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """(1, 12, vocabulary) float32 of a fixed row of tokens."""
    return model.eval()(input_ids=torch.arange(5, 17)[None]).logits.float()


def main(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "the square of 7 is 49"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    found, expected = logits(model), torch.load(folder / LOGITS)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5), (found - expected).abs().max()
    print(f"transformers {transformers.__version__}: the same logits")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
