"""``relora-ds eval``: the perplexity of a run or a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relora_ds.cli.options import add_trust
from relora_ds.errors import EXIT_DONE, ConfigError, refuse_below, refuse_rest
from relora_ds.launch import libraries
from relora_ds.paths import path_argument


def add_command(parent: Any) -> None:
    """Adds the command to the parser of ``relora-ds``."""
    evaluation = parent.add_parser("eval", help="validation perplexity of a run or a checkpoint")
    evaluation.add_argument("place", metavar="RUN_DIR|CHECKPOINT", type=path_argument)
    evaluation.add_argument("--data", type=path_argument, help="another token folder than the run's")
    evaluation.add_argument("--max-tokens", type=int, help="evaluate on so many validation tokens (default: the run's setting)")
    evaluation.add_argument("--batch-size", type=int, help="sequences of one forward pass (default: the run's micro batch)")
    add_trust(evaluation)
    evaluation.set_defaults(run=run_eval)


def run_eval(options: argparse.Namespace, rest: Sequence[str]) -> int:
    refuse_rest(rest)
    refuse_below("--max-tokens", options.max_tokens, 1)
    refuse_below("--batch-size", options.batch_size, 1)
    libraries.quiet_libraries()
    import torch

    from relora_ds.checkpoint.reader import locate
    from relora_ds.data.token_dataset import TokenDataset
    from relora_ds.models.export import load_merged
    from relora_ds.training.evaluate import evaluate

    libraries.guard_bf16()
    folder, checkpoint = locate(options.place)
    settings = folder.read_config()
    tokens = options.data or Path(settings.data.path)
    if not tokens.is_dir() and options.data is None:
        raise ConfigError("--data", None, f"the run's tokens are not in {tokens} any more", "name the folder where they are")
    data = TokenDataset(tokens, "validation", settings.data.sequence_length, shuffle=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_merged(checkpoint, device=device, attention=settings.model.attention, trust=options.trust)
    result = evaluate(
        model, data, batch_size=options.batch_size or settings.train.micro_batch, device=device,
        max_tokens=options.max_tokens or settings.train.eval_tokens,
    )  # fmt: skip
    print(f"{checkpoint}: loss {result.loss:.6f}, perplexity {result.perplexity:.4f} over {result.tokens:,} validation tokens")
    return EXIT_DONE
