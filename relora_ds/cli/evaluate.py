"""``relora-ds eval``: the perplexity of a run or a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relora_ds.cli.options import CHECKPOINT_HELP, add_trust, new_command
from relora_ds.errors import EXIT_DONE, ConfigError, refuse_below, refuse_rest
from relora_ds.launch import libraries
from relora_ds.paths import path_argument


def add_command(parent: Any) -> None:
    """Adds the command to the parser of ``relora-ds``."""
    evaluation = new_command(
        parent, "eval", run_eval, "Compute the validation loss and perplexity of a run or a checkpoint.",
        about="It runs in one process, on a GPU if there is one.",
        examples=["relora-ds eval runs/demo", "relora-ds eval runs/demo/checkpoints/update_0000800 --max-tokens 20000"],
    )  # fmt: skip
    evaluation.add_argument("place", metavar="RUN_DIR|CHECKPOINT", type=path_argument, help=CHECKPOINT_HELP)
    evaluation.add_argument(
        "--data", metavar="FOLDER", type=path_argument,
        help="The token folder whose validation tokens are used. Default: the run's own (data.path).",
    )  # fmt: skip
    evaluation.add_argument(
        "--max-tokens", metavar="N", type=int,
        help="Evaluate on so many validation tokens. Default: the run's train.eval_tokens.",
    )  # fmt: skip
    evaluation.add_argument(
        "--batch-size", metavar="N", type=int,
        help="Sequences of one forward pass. Default: the run's train.micro_batch.",
    )  # fmt: skip
    add_trust(evaluation)


def run_eval(options: argparse.Namespace, rest: Sequence[str]) -> int:
    refuse_rest(rest, options.known())
    refuse_below("--max-tokens", options.max_tokens, 1)
    refuse_below("--batch-size", options.batch_size, 1)
    libraries.quiet_libraries()
    import torch

    from relora_ds.checkpoint.reader import locate
    from relora_ds.data import tokenizer
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
    ours, theirs = tokenizer.find(str(tokens)), tokenizer.find(str(folder.model))
    if ours is not None and theirs is not None and (problem := tokenizer.difference(ours, theirs)):
        way_out = f"prepare the data with --tokenizer {folder.model}"
        raise ConfigError("--data", str(tokens), f"its tokenizer is not the run's: {problem}", way_out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_merged(checkpoint, device=device, attention=settings.model.attention, trust=options.trust)
    if data.index.encoder_size > (rows := model.config.get_text_config().vocab_size):
        problem = f"its tokenizer has {data.index.encoder_size} entries, the model's vocabulary {rows}"
        raise ConfigError("--data", str(tokens), problem, "prepare the data with the model's tokenizer")
    result = evaluate(
        model, data, batch_size=options.batch_size or settings.train.micro_batch, device=device,
        max_tokens=options.max_tokens or settings.train.eval_tokens,
    )  # fmt: skip
    print(f"{checkpoint}: loss {result.loss:.6f}, perplexity {result.perplexity:.4f} over {result.tokens:,} validation tokens")
    return EXIT_DONE
