"""Traffic on nodes: ranks under SLURM, each on a node of its own with an address and a byte counter, links as fast as asked.

    python -m benchmarks.nodes bytes                    counted, estimated and on the wire: 2, 3, 4 nodes x methods x accumulation
    python -m benchmarks.nodes llama_60m DATA           all ways to train, llama_60m on 4 nodes
    python -m benchmarks.nodes seconds DATA 100mbit     seconds of an update over links of that speed, 4 nodes

The nodes are namespaces of this machine (tests/cluster/cluster.py), so the cores are shared: seconds are those of a slow machine.
Needs root, SLURM and ``DATA``: a token folder of ``relora-ds prepare recipes/corpus/english.jsonl.gz DATA --vocab-size 32100``.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.cluster.cluster import Cluster

ROOT = Path(__file__).resolve().parents[1]
SMALL = "model.config={model_type: llama, hidden_size: 256, intermediate_size: 688, num_hidden_layers: 4, num_attention_heads: 4}"
"""2.1 million parameters without embedding and head: what the headers of small messages add is well below 1%."""


def traffic(cluster: Cluster, nodes: int, out: Path, recipe: str, *words: str) -> dict[str, Any]:
    """Runs ``relora-ds traffic`` on so many nodes, one rank each; returns what it wrote."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["srun", f"--nodes={nodes}", "--ntasks-per-node=1", sys.executable, "-m", "relora_ds", "traffic", recipe]
    result = cluster.run("ctl", *command, *words, f"--out={out}", env=env, cwd=ROOT, timeout=3600)
    print(result.stdout, file=sys.stderr, flush=True)
    content: dict[str, Any] = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    return content


def compare_bytes(folder: Path) -> None:
    """Every method on 2, 3 and 4 nodes with 1 and 8 micro-batches of an update."""
    print("| nodes | method | accumulation | MB counted | counted / formula | wire / counted |")
    print("|---|---|---|---|---|---|")
    with Cluster(folder / "cluster", 4) as cluster:
        for nodes in (2, 3, 4):
            for method in ("full", "lora", "relora"):
                for accumulation in (1, 8):
                    (arm,) = traffic(
                        cluster, nodes, folder / "out", "recipes/demo.yaml", f"method={method}", SMALL, "--arms=recipe",
                        "--updates=4", "deepspeed=ds_configs/zero2_bf16.json", "data.sequence_length=32", "train.micro_batch=1",
                        f"train.global_batch={nodes * accumulation}",
                    )["arms"]  # fmt: skip
                    print(
                        f"| {nodes} | {method} | {accumulation} | {arm['total_bytes'] / 1e6:.3f} "
                        f"| {arm['total_bytes'] / arm['formula']:.4f} | {arm['wire'] / arm['total_bytes']:.4f} |",
                        flush=True,
                    )


def llama_60m(folder: Path, data: str, *words: str) -> None:
    """All ways to train, with 1 and 8 micro-batches of an update."""
    print("| accumulation | way | trainable | MB of an update | of DeepSpeed's defaults | counted / formula | wire / counted |")
    print("|---|---|---|---|---|---|---|")
    with Cluster(folder / "cluster", 4) as cluster:
        for accumulation in (1, 8):
            content = traffic(
                cluster, 4, folder / "out", "recipes/llama_60m.yaml", f"data.path={data}", "data.sequence_length=32",
                "train.micro_batch=1", f"train.global_batch={4 * accumulation}", "--updates=1", *words,
            )  # fmt: skip
            default = next(arm for arm in content["arms"] if arm["arm"] == "zero2")
            for arm in content["arms"]:
                print(
                    f"| {accumulation} | {arm['arm']} | {arm['trainable']:,} | {arm['total_bytes'] / 1e6:.2f} "
                    f"| {arm['total_bytes'] / default['total_bytes']:.1%} | {arm['total_bytes'] / arm['formula']:.4f} "
                    f"| {arm['wire'] / arm['total_bytes']:.4f} |",
                    flush=True,
                )


def seconds(folder: Path, data: str, rate: str, *words: str) -> None:
    """Seconds of an update on 4 nodes, over links of ``rate`` as tc writes it."""
    with Cluster(folder / "cluster", 4, rate=rate) as cluster:
        traffic(
            cluster, 4, folder / "out", "recipes/llama_60m.yaml", f"data.path={data}", "data.sequence_length=32",
            "train.micro_batch=1", "train.global_batch=4", "--updates=3", "--arms=recipe,full,zero2", *words,
        )  # fmt: skip
    print((folder / "out" / "comparison.md").read_text(encoding="utf-8"))


def main() -> None:
    which, *words = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="nodes_", dir="/tmp") as name:
        {"bytes": compare_bytes, "llama_60m": llama_60m, "seconds": seconds}[which](Path(name), *words)


if __name__ == "__main__":
    main()
