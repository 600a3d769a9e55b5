"""What becomes of the loss around restarts under each kind of reset: the demo recipe, one run per kind, side by side.

    python benchmarks/restart_kinds.py runs/restart_kinds [--seeds 1 2] [key.sub=value …]

Writes a table (Markdown) to the standard output; the runs resume where they were interrupted.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from relora_ds.report import read_run, restart_table

KINDS = {
    "full, bias correction restarted": ["kind=full", "restart_bias_correction=true"],
    "magnitude 0.99, joint mask, bias correction restarted": ["kind=magnitude", "mask=joint", "restart_bias_correction=true"],
    "magnitude 0.99, joint mask, bias correction running on": ["kind=magnitude", "mask=joint", "restart_bias_correction=false"],
    "magnitude 0.99, independent masks, bias correction restarted": [
        "kind=magnitude",
        "mask=independent",
        "restart_bias_correction=true",
    ],
    "magnitude 0.99, independent masks, bias correction running on (the paper)": [
        "kind=magnitude",
        "mask=independent",
        "restart_bias_correction=false",
    ],
    "none": ["kind=none", "restart_bias_correction=false"],
}
RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "demo.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    options = parser.parse_args()
    rows = []
    for seed in options.seeds:
        for number, (name, settings) in enumerate(KINDS.items()):
            folder = options.out / f"kind{number}_seed{seed}"
            command = [sys.executable, "-m", "relora_ds.cli", "train", str(RECIPE), "--nproc", "2"]
            command += [f"run.dir={folder}", f"run.seed={seed}", "wandb.mode=disabled", *options.overrides]
            command += [f"relora.reset.{setting}" for setting in settings]
            subprocess.run(command, check=True)
            run = read_run(folder)
            changes = [f"{row.loss_before:.3f} → {row.loss_after:.3f}" for row in restart_table(run.updates, run.restarts)]
            rows.append(f"| {name} | {seed} | {run.evals[-1]['eval_perplexity']:.2f} | {' | '.join(changes)} |")
            print(rows[-1], file=sys.stderr)
    print("| reset | seed | held-out perplexity | loss around restart 1, 2, 3 … |\n|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
