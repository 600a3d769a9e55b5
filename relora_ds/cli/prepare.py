"""``relora-ds prepare``: documents become tokens on disk."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from relora_ds.cli.options import new_command
from relora_ds.errors import EXIT_DONE, refuse_rest
from relora_ds.paths import path_argument, text_argument


def add_command(parent: Any) -> None:
    """Adds the command to the parser of ``relora-ds``."""
    prepare = new_command(
        parent, "prepare", run_prepare, "Turn documents into a token folder, the data of a recipe.",
        about="""\
Documents are .txt, .json, .jsonl (also .gz or .zst) or .parquet files, or a data
set of the Hugging Face hub. Interrupted, the same command resumes.
A share of the documents is held out for validation.""",
        examples=[
            "relora-ds prepare allenai/c4 data/c4 --config-name en --tokenizer t5-base",
            "relora-ds prepare 'corpus/**/*.jsonl.gz' data/mine --tokenizer my_model/tokenizer.json",
        ],
    )  # fmt: skip
    prepare.add_argument(
        "source", metavar="SOURCE", type=text_argument, help="A file, a folder, a glob pattern, or the name of a hub data set."
    )
    prepare.add_argument("out", metavar="OUT", type=path_argument, help="The token folder to write (data.path of a recipe).")
    prepare.add_argument(
        "--tokenizer", metavar="NAME", type=text_argument,
        help="A tokenizer.json, a folder with one, or a name on the hub. Default: a byte-level BPE is trained on the documents.",
    )  # fmt: skip
    prepare.add_argument(
        "--vocab-size", metavar="N", type=int, default=8192,
        help="Vocabulary of the BPE, where one is trained. Default: %(default)s.",
    )  # fmt: skip
    prepare.add_argument(
        "--text-column", metavar="NAME", default="text", help="The column that holds the text. Default: %(default)s."
    )
    prepare.add_argument("--config-name", metavar="NAME", help="The configuration of a hub data set, e.g. en for C4.")
    prepare.add_argument("--split", metavar="NAME", default="train", help="The split of a hub data set. Default: %(default)s.")
    prepare.add_argument(
        "--holdout", metavar="SHARE", type=float, default=0.01,
        help="Share of the documents that is held out for validation; 0 for none. Default: %(default)s.",
    )  # fmt: skip
    prepare.add_argument("--max-documents", metavar="N", type=int, help="Read only the first N documents. Default: all.")
    prepare.add_argument(
        "--seed", metavar="N", type=int, default=0,
        help="Seed of the choice of documents that are held out. Default: %(default)s.",
    )  # fmt: skip


def run_prepare(options: argparse.Namespace, rest: Sequence[str]) -> int:
    refuse_rest(rest, options.known())
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
