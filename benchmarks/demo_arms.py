"""The demo recipe in several variants, side by side: one table of held-out perplexities and of the loss around restarts.

    python benchmarks/demo_arms.py resets|stores|methods|inits|targets OUT [--seeds 1 2] [key.sub=value …]

Writes a table (Markdown) to the standard output; the runs, in OUT, resume where they were interrupted.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from relora_ds.reports.restarts import restart_table
from relora_ds.reports.run_records import read_run

RESTARTED, RUNNING_ON = "relora.reset.restart_bias_correction=true", "relora.reset.restart_bias_correction=false"
INT8 = ["relora.frozen.dtype=int8", "relora.frozen.master=sharded"]
ARMS: dict[str, dict[str, list[str]]] = {
    "resets": {
        "full, bias correction restarted": ["relora.reset.kind=full", RESTARTED],
        "magnitude 0.99, joint mask, bias correction restarted": ["relora.reset.mask=joint", RESTARTED],
        "magnitude 0.99, joint mask, bias correction running on": ["relora.reset.mask=joint", RUNNING_ON],
        "magnitude 0.99, independent masks, bias correction restarted": ["relora.reset.mask=independent", RESTARTED],
        "magnitude 0.99, independent masks, bias correction running on (the paper)": [
            "relora.reset.mask=independent",
            RUNNING_ON,
        ],
        "none": ["relora.reset.kind=none", RUNNING_ON],
    },
    "stores": {
        "fp32": ["relora.frozen.dtype=fp32"],
        "bf16, master sharded": ["relora.frozen.dtype=bf16", "relora.frozen.master=sharded"],
        "int8, master sharded": INT8,
        "bf16, master none": ["relora.frozen.dtype=bf16"],
        "int8, master none": ["relora.frozen.dtype=int8"],
    },
    "methods": {method: [f"method={method}"] for method in ("full", "control", "lora", "low_rank", "relora")},
    "targets": {
        "all-linear": ["relora.targets=all-linear"],
        "and the head": ["relora.targets=[all-linear, output-head]"],
        "and the embedding": ["relora.targets=[all-linear, input-embedding]"],
        "and both": ["relora.targets=[all-linear, output-head, input-embedding]"],
    },
    "inits": {kind: [*INT8, f"relora.init={kind}"] for kind in ("kaiming", "orthonormal", "residual")},
}
RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "demo.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=ARMS)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    options = parser.parse_args()
    rows = []
    for seed in options.seeds:
        for number, (name, settings) in enumerate(ARMS[options.table].items()):
            folder = options.out / f"{options.table}{number}_seed{seed}"
            command = [sys.executable, "-m", "relora_ds", "train", str(RECIPE), "--nproc", "2"]
            command += [f"run.dir={folder}", f"run.seed={seed}", "wandb.mode=disabled", *settings, *options.overrides]
            subprocess.run(command, check=True)
            run = read_run(folder)
            changes = [f"{row.later.before:.3f} → {row.later.after:.3f}" for row in restart_table(run.updates, run.restarts)]
            rows.append(f"| {name} | {seed} | {run.evals[-1]['eval_perplexity']:.2f} | {' | '.join(changes)} |")
            print(rows[-1], file=sys.stderr)
    print("| variant | seed | held-out perplexity | loss around restart 1, 2, 3 … |\n|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
