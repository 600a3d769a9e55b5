"""``relora-ds prepare``: documents become tokens on disk."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from relora_ds.errors import EXIT_DONE, refuse_rest
from relora_ds.paths import path_argument, text_argument


def add_command(parent: Any) -> None:
    """Adds the command to the parser of ``relora-ds``."""
    prepare = parent.add_parser("prepare", help="text, jsonl, parquet or a hub data set -> token folder")
    prepare.add_argument(
        "source", metavar="SOURCE", type=text_argument, help="a file, a folder, a glob, or the name of a hub data set"
    )
    prepare.add_argument(
        "out", metavar="OUT", type=path_argument, help="the token folder to write; run again to go on after an interruption"
    )
    prepare.add_argument(
        "--tokenizer", type=text_argument, help="a tokenizer.json, a folder or a hub name; left out: a byte-level BPE is trained"
    )
    prepare.add_argument("--vocab-size", type=int, default=8192, help="of the BPE that is trained (default: %(default)s)")
    prepare.add_argument("--text-column", default="text", help="default: %(default)s")
    prepare.add_argument("--config-name", help="of a hub data set, e.g. en for C4")
    prepare.add_argument("--split", default="train", help="of a hub data set (default: %(default)s)")
    prepare.add_argument("--holdout", type=float, default=0.01, help="share of the documents held out (default: %(default)s)")
    prepare.add_argument("--max-documents", type=int, help="stop after so many")
    prepare.add_argument("--seed", type=int, default=0, help="of the choice of held-out documents (default: %(default)s)")
    prepare.set_defaults(run=run_prepare)


def run_prepare(options: argparse.Namespace, rest: Sequence[str]) -> int:
    refuse_rest(rest)
    from relora_ds.data.prepare import prepare, tell_left_out

    index = prepare(
        options.source, options.out, tokenizer=options.tokenizer, vocab_size=options.vocab_size, text_column=options.text_column,
        config_name=options.config_name, split=options.split, holdout=options.holdout, max_documents=options.max_documents,
        seed=options.seed,
    )  # fmt: skip
    for split, content in index["splits"].items():
        print(f"{options.out}/{content['file']}: {content['tokens']:,} tokens of {content['documents']:,} documents ({split})")
    if left_out := tell_left_out(index):
        print(left_out)
    return EXIT_DONE
