"""What reading ahead costs on a CPU, and saves on a slow disk: updates whose batches are read when wanted, or ahead, in turns.

    python -m benchmarks.prefetch [--updates 200]

Two ranks of one thread each train the demo's model, and a tiny one whose updates are almost all Python. Every other update reads
ahead. The slow disk is a sleep in each read. CPU time is the process's, with all its threads: other work on the machine hardly
changes it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relora_ds.config import parse
from relora_ds.data.prefetch import Prefetch
from relora_ds.data.prepare import prepare
from relora_ds.data.token_dataset import TokenDataset
from relora_ds.engine.release import release
from relora_ds.launch import places
from relora_ds.text import yaml_text
from relora_ds.training.preflight import check
from relora_ds.training.trainer import Trainer
from tests.distributed import pool

ROOT = Path(__file__).resolve().parents[1]
WAYS = ("wanted", "ahead")
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "demo, 1 micro batch of 12": ({}, {}, 0.0),
    "demo, 4 micro batches of 3": ({}, {"micro_batch": 3}, 0.0),
    "tiny, 4 micro batches of 3": (TINY, {"micro_batch": 3}, 0.0),
    "demo, 1 micro batch of 12, 50 ms a read": ({}, {}, 0.05),
}
WARM_UP = 6


class Disk:
    """The tokens, each read of which takes ``slow_s`` longer."""

    def __init__(self, dataset: TokenDataset, slow_s: float) -> None:
        self.dataset, self.slow_s = dataset, slow_s

    def batch(self, samples: Sequence[int]) -> Tensor:
        time.sleep(self.slow_s)
        return self.dataset.batch(samples)


def seconds_of(content: dict[str, Any], slow_s: float) -> dict[str, list[tuple[float, float]]]:
    """Of each update on this rank, by the way its batches are read: CPU time, and by the clock."""
    place = places.discover()
    assert place is not None
    config = parse(content)
    trainer = Trainer(check(config, Path("recipe.yaml"), place.world_size), place, torch.device("cpu"))
    data = TokenDataset(Path(config.data.path), "train", config.data.sequence_length, seed=config.run.seed)
    disk, numbers = Disk(data, slow_s), range(1, config.total_updates + 1)
    order = chain.from_iterable(trainer.micro_batches(number) for number in numbers if number % 2)
    trainer.train_data.close()
    readers: dict[str, Any] = {"wanted": disk, "ahead": Prefetch(disk, order, torch.device("cpu"))}  # type: ignore[arg-type]
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for number in numbers:
        trainer.train_data = readers[WAYS[number % 2]]
        started = time.process_time(), time.perf_counter()
        trainer.update(number, False)
        if number > WARM_UP:
            found[WAYS[number % 2]].append((time.process_time() - started[0], time.perf_counter() - started[1]))
    trainer.train_data = readers["ahead"]
    trainer.close(exit_code=1)
    release(trainer.engine)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=200)
    updates = parser.parse_args().updates
    pool.TIMEOUT_S = 1800.0  # on a machine with other work
    demo = yaml_text.read_yaml_file(ROOT / "recipes" / "demo.yaml", "the demo")
    print(
        "| ms an update, the median | CPU, when wanted | CPU, ahead | clock, when wanted | clock, ahead |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens"
        prepare(str(ROOT / "recipes" / "corpus" / "english.jsonl.gz"), tokens, vocab_size=1024, holdout=0.1, progress=False)
        for number, (name, (sizes, train, slow_s)) in enumerate(CASES.items()):
            content = {
                **demo,
                "run": {"dir": f"{folder}/run{number}", "seed": 1},
                "model": {"config": {**demo["model"]["config"], **sizes}},
                "data": {**demo["data"], "path": str(tokens)},
                "relora": {"rank": 16, "warm_start": 0, "restart_every": 10_000},
                "train": {**demo["train"], "updates": updates, **train},
                "deepspeed": str(ROOT / "ds_configs" / "zero2_cpu.json"),
                "wandb": {"mode": "disabled"},
            }
            found = pool.run(2, seconds_of, content, slow_s)[0]
            cells = [f"{statistics.median(times[kind] for times in found[way]) * 1e3:.1f}" for kind in (0, 1) for way in WAYS]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
