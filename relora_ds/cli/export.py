"""``relora-ds export``: merged weights, or an adapter."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from relora_ds.cli.options import CHECKPOINT_HELP, add_trust, new_command
from relora_ds.errors import EXIT_DONE, refuse_rest
from relora_ds.launch import libraries
from relora_ds.paths import path_argument


def add_command(parent: Any) -> None:
    """Adds the command to the parser of ``relora-ds``."""
    export = new_command(
        parent, "export", run_export, "Write the trained model as a Hugging Face folder.",
        about="""\
The factors are merged into the weights, so AutoModelForCausalLM and
AutoTokenizer load the folder as they load any other. Checkpoints of your own
scripts (engine.save_checkpoint) are exported in the same way.""",
        examples=["relora-ds export runs/demo exported", "relora-ds export runs/demo adapter --adapter"],
    )  # fmt: skip
    export.add_argument("place", metavar="RUN_DIR|CHECKPOINT", type=path_argument, help=CHECKPOINT_HELP)
    export.add_argument("out", metavar="OUT", type=path_argument, help="The folder to write.")
    export.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="The dtype of the weights. Default: the one of the training."
    )
    export.add_argument(
        "--adapter", action="store_true",
        help="Write a PEFT adapter of the current factors instead, and the model that it adapts in OUT/base.",
    )  # fmt: skip
    add_trust(export)


def run_export(options: argparse.Namespace, rest: Sequence[str]) -> int:
    refuse_rest(rest, options.known())
    libraries.quiet_libraries()
    from relora_ds.ds_config.fit import DTYPES
    from relora_ds.models.export import export_adapter, export_model

    write = export_adapter if options.adapter else export_model
    dtype = DTYPES[options.dtype] if options.dtype else None
    print(f"wrote {write(options.place, options.out, dtype=dtype, trust=options.trust)}")
    return EXIT_DONE
