"""``relora-ds export``: merged weights, or an adapter."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from relora_ds.cli.options import add_trust
from relora_ds.errors import EXIT_DONE, refuse_rest
from relora_ds.launch import libraries
from relora_ds.paths import path_argument


def add_command(parent: Any) -> None:
    """Adds the command to the parser of ``relora-ds``."""
    export = parent.add_parser("export", help="merged weights as a Hugging Face folder")
    export.add_argument("place", metavar="RUN_DIR|CHECKPOINT", type=path_argument)
    export.add_argument("out", metavar="OUT", type=path_argument)
    export.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: the one it was trained in")
    export.add_argument("--adapter", action="store_true", help="as a PEFT adapter of the current factors, its base beside it")
    add_trust(export)
    export.set_defaults(run=run_export)


def run_export(options: argparse.Namespace, rest: Sequence[str]) -> int:
    refuse_rest(rest)
    libraries.quiet_libraries()
    from relora_ds.ds_config.fit import DTYPES
    from relora_ds.models.export import export_adapter, export_model

    write = export_adapter if options.adapter else export_model
    dtype = DTYPES[options.dtype] if options.dtype else None
    print(f"wrote {write(options.place, options.out, dtype=dtype, trust=options.trust)}")
    return EXIT_DONE
