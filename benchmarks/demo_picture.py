"""The picture in README.md, from the demo's run: ``python -m benchmarks.demo_picture runs/demo docs/demo.svg``."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from relora_ds.run.folder import RunFolder, read_jsonl

MEAN = 21
"""Updates of the mean that is drawn, as many before as after: one that looks back only would lie above a falling loss."""


def draw(run: RunFolder, out: Path) -> None:
    """Draws training and validation loss, and the factors' learning rate below them, over the updates of a run."""
    records = read_jsonl(run.metrics)
    updates, evals = ([record for record in records if key in record] for key in ("loss", "eval_loss"))
    loss, half = np.array([record["loss"] for record in updates]), MEAN // 2
    lora = [record for record in updates if "lora_lr" in record]
    restarts = [record["update"] for record in read_jsonl(run.restarts)]
    begin, end = lora[0]["update"] - 1, updates[-1]["update"]

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.3))
    above.plot(range(1, end + 1), loss, color="C0", linewidth=0.4, alpha=0.4)
    mean = np.convolve(loss, np.ones(MEAN) / MEAN, mode="valid")
    above.plot(range(1 + half, end + 1 - half), mean, color="C0", label=f"training loss (line: mean of {MEAN} updates)")
    above.plot(*zip(*((e["update"], e["eval_loss"]) for e in evals), strict=True), "o", color="C1", label="validation loss")
    above.set(ylim=(3.2, 5.6), ylabel="nats per token")
    above.legend(framealpha=1, edgecolor="none", loc="center right")
    below.plot(*zip(*((record["update"], record["lora_lr"]) for record in lora), strict=True), color="C2")
    below.set(ylabel="lr of factors", xlabel="update", xlim=(0, end))
    for axis in (above, below):
        axis.axvspan(0, begin, color="0.93")
        for update in restarts:
            axis.axvline(update, color="0.5", linewidth=0.8, linestyle="--")
    above.text(begin / 2, 3.3, "full-rank warm start", ha="center")
    for number, (left, right) in enumerate(zip([begin, *restarts], [*restarts, end], strict=True), start=1):
        above.text((left + right) / 2, 5.35, f"factors {number}", ha="center")
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "demo"}):
        figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    draw(RunFolder(Path(sys.argv[1])), Path(sys.argv[2]))
