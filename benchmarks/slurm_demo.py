"""Trains the demo on four nodes of a real SLURM, by ``relora-ds slurm submit``, and compares it with four processes on one machine.

    python benchmarks/slurm_demo.py OUT

Needs what tests/cluster/cluster.py needs (root, Debian's SLURM), and the tokens in data/demo (`make train` prepares them).
The nodes are namespaces of this machine, each with a network of its own. The demo is trained

- by ``relora-ds train --nproc 4``;
- by a job on four nodes, one rank each, which a signal stops and requeues half-way.

Prints a table (Markdown); exit code 1 when metrics.jsonl or restarts.jsonl differ in anything but times.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.cluster.cluster import Cluster  # noqa: E402
from tests.command_line import environment, read_log  # noqa: E402

RELORA = [sys.executable, "-m", "relora_ds"]
RECIPE = "recipes/demo.yaml"
COMMON = ["wandb.mode=disabled", "train.micro_batch=6", "train.checkpoint_every=50"]
STOP_AT = 450
"""Lines of metrics.jsonl after which the job is signalled."""
OVER = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    words = [*RELORA, "train", RECIPE, "--nproc", "4", f"run.dir={out}/one_machine", *COMMON]
    subprocess.run(words, cwd=ROOT, env=environment(), check=True)
    rows = [("4 processes on one machine", 1, time.monotonic() - started, out / "one_machine")]
    with Cluster(out / "cluster", 4) as cluster:
        rows.append(job(cluster, out / "nodes"))
    print("| run | starts | minutes | updates | restarts | last perplexity | equal |\n|---|---|---|---|---|---|---|")
    whole = logs(rows[0][3])
    for name, starts, seconds, folder in rows:
        updates, restarts = logs(folder)
        perplexity = [record["eval_perplexity"] for record in updates if "eval_perplexity" in record][-1]
        equal = logs(folder) == whole
        count = sum("loss" in record for record in updates)
        print(f"| {name} | {starts} | {seconds / 60:.1f} | {count} | {len(restarts)} | {perplexity:.4f} | {equal} |")
    return 0 if all(logs(folder) == whole for *_, folder in rows) else 1


def job(cluster: Cluster, folder: Path) -> tuple[str, int, float, Path]:
    """Submits the demo, stops it once and waits for its end: name, starts, seconds from submission to end, folder."""
    started = time.monotonic()
    words = [*RELORA, "slurm", "submit", RECIPE, f"run.dir={folder}", *COMMON, "--nodes", 4, "--tasks-per-node", 1, "--time", 60]
    said = cluster.run("ctl", *words, env=environment(), cwd=ROOT).stdout
    print(said, file=sys.stderr)
    number = int(said.split("submitted job ")[1].split(":")[0])
    while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text().splitlines()) < STOP_AT:
        time.sleep(1)
    cluster.run("ctl", "scancel", "--signal=USR2", number)
    ended = cluster.wait(number, OVER, timeout=3600)
    if ended["state"] != "COMPLETED":
        raise SystemExit((folder / "slurm" / "job.out").read_text())
    return "4 nodes of SLURM, stopped once", ended["restarts"] + 1, time.monotonic() - started, folder


def logs(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return read_log(folder / "metrics.jsonl"), read_log(folder / "restarts.jsonl")


if __name__ == "__main__":
    sys.exit(main())
