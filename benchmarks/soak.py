"""A long run with many restarts: what a process holds, and how long an update takes, from the beginning to the end.

    python -m benchmarks.soak OUT [--updates 10000] [--restart-every 20]

`relora_ds.training.loop.train` itself trains a tiny LLaMA on two ranks: a short full-rank warm start and the change of phase, then
``--updates`` updates of the LoRA phase (int8 with the sharded master), with an asynchronous checkpoint every twentieth of the run.
Half-way between checkpoints every rank notes what it holds. Prints tables and a verdict (Markdown); exit code 1 when something
grows.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from benchmarks.kill_test import token_folder
from relora_ds.config import load
from relora_ds.launch import places, process_group
from relora_ds.training.loop import train
from relora_ds.training.preflight import check
from relora_ds.training.trainer import Trainer
from tests.memory import live_bytes

RANKS, WARM_START, SAMPLES = 2, 20, 20
MODEL = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SETTLED = 0.2
"""Share of the run, of the first hundred of 500 restarts, after which nothing may grow: allocators and caches have filled by then."""
ALLOWED = {
    "tensor_bytes": 0.0,
    "rss_bytes": 0.01,
    "files": 0.0,
    "threads": 0.0,
    "objects": 0.01,
    "update_s": 0.10,
    "restart_s": 0.10,
}
"""Growth, at most, of the median of the last quarter of the samples over that of the first quarter after :data:`SETTLED`.

Resident memory moves by pages that allocators keep, the number of objects by what is on its way to a log, times by what else a
machine does.
"""
COLUMNS = {
    "tensor_bytes": ("tensors, MB", 1e6, ".3f"), "rss_bytes": ("resident, MB", 1e6, ".1f"), "files": ("files", 1, "d"),
    "threads": ("threads", 1, "d"), "objects": ("Python objects", 1, "d"), "update_s": ("update, ms", 1e-3, ".2f"),
    "restart_s": ("restart, ms", 1e-3, ".2f"),
}  # fmt: skip


def recipe(out: Path, updates: int, restart_every: int) -> Path:
    every = max(2, updates // SAMPLES)
    content = {
        "run": {"dir": str(out / "run"), "seed": 1},
        "model": {"config": {**MODEL, "max_position_embeddings": 64}},
        "data": {"path": str(out / "tokens"), "sequence_length": 16},
        "relora": {
            "rank": 4, "alpha": 8, "warm_start": WARM_START, "restart_every": restart_every, "restart_warmup": 2,
            "frozen": {"dtype": "int8", "group_size": 16, "master": "sharded"},
        },
        "optimizer": {"lr": 1e-3, "warmup": 2},
        "train": {"updates": WARM_START + updates, "global_batch": RANKS, "micro_batch": 1, "checkpoint_every": every},
        "wandb": {"mode": "disabled"},
        "deepspeed": {"zero_optimization": {"stage": 2, "reduce_bucket_size": 100_000}},
    }  # fmt: skip
    path = out / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


# In a rank


def held() -> dict[str, int]:
    """What this process holds once garbage is collected; of tensors each storage once."""
    tensor_bytes, process = live_bytes(), psutil.Process()  # collects first
    return {
        "tensor_bytes": tensor_bytes,
        "rss_bytes": process.memory_info().rss,
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "objects": len(gc.get_objects()),
    }


def train_rank(path: Path, place: places.Place) -> int:
    """Trains, and writes a sample half-way between checkpoints: what is held, and the median time of the updates before it."""
    checked = check(load(path, []), path, place.world_size)
    every = checked.config.train.checkpoint_every or 1
    original, seconds, log = Trainer.update, [0.0] * 0, path.parent / f"rank_{place.rank}.jsonl"
    log.unlink(missing_ok=True)

    def update(self: Trainer, number: int, stop_requested: bool) -> bool:
        started = time.perf_counter()
        stopping = original(self, number, stop_requested)
        seconds.append(time.perf_counter() - started)
        if number % every == every // 2 and number > WARM_START:
            sample = {"update": number, "restarts": self.restarts, "update_s": statistics.median(seconds), **held()}
            with log.open("a") as file:
                file.write(json.dumps(sample) + "\n")
            seconds.clear()
        return stopping

    Trainer.update = update  # type: ignore[method-assign]
    device = process_group.start(place)
    code = train(checked, place, device)
    process_group.leave()
    return code


# In the process that starts them


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def samples_of(out: Path, rank: int) -> list[dict[str, Any]]:
    """Of a rank, with the median time of the restarts before each."""
    samples, restarts, before = lines_of(out / f"rank_{rank}.jsonl"), lines_of(out / "run" / "restarts.jsonl"), 0
    for sample in samples:
        took = [restart["seconds"] for restart in restarts if before < restart["update"] <= sample["update"]]
        sample["restart_s"], before = statistics.median(took) if took else None, sample["update"]
    return samples


def table(rank: int, samples: Sequence[dict[str, Any]]) -> str:
    rows = [f"| rank {rank}, after update | restarts | " + " | ".join(title for title, *_ in COLUMNS.values()) + " |"]
    rows.append("|---" * (len(COLUMNS) + 2) + "|")
    for sample in samples:
        cells = [_cell(sample[key], unit, form) for key, (_, unit, form) in COLUMNS.items()]
        rows.append(f"| {sample['update']:,} | {sample['restarts']} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(value: float | None, unit: float, form: str) -> str:
    return "" if value is None else format(value if form == "d" else value / unit, form)


def verdict(rank: int, samples: Sequence[dict[str, Any]]) -> tuple[str, bool]:
    """One line for each measure, and whether all are flat."""
    last = samples[-1]["update"]
    settled = [sample for sample in samples if sample["update"] > SETTLED * last]
    quarter = max(1, len(settled) // 4)
    lines, is_flat = [], True
    for key, (title, unit, form) in COLUMNS.items():
        values = [sample[key] for sample in settled if sample[key] is not None]
        first, end = statistics.median(values[:quarter]), statistics.median(values[-quarter:])
        is_good = end <= first * (1 + ALLOWED[key])
        is_flat &= is_good
        form = ".0f" if form == "d" else form
        lines.append(
            f"- rank {rank}, {title}: {first / unit:{form}} -> {end / unit:{form}} ({end / first - 1:+.2%}, "
            f"allowed {ALLOWED[key]:+.0%}): {'flat' if is_good else 'GROWS'}"
        )
    return "\n".join(lines), is_flat


def machine() -> str:
    """Processor, versions and date."""
    found = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout.splitlines()
    name = next((line.partition(":")[2].strip() for line in found if line.startswith("Model name")), platform.processor())
    import deepspeed
    import transformers

    where = f"{time.strftime('%Y-%m-%d')}, {name} ({os.cpu_count()} cores), Python {platform.python_version()}"
    with_ = f"torch {torch.__version__}, DeepSpeed {deepspeed.__version__}, transformers {transformers.__version__}"
    return f"{where}, {with_}."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--updates", type=int, default=10_000, help="of the LoRA phase")
    parser.add_argument("--restart-every", type=int, default=20)
    options = parser.parse_args()
    place = places.discover()
    if place is not None:
        return train_rank(options.out / "recipe.yaml", place)
    if (options.out / "run").exists():
        parser.error(f"{options.out / 'run'} is there: name a new folder")
    options.out.mkdir(parents=True, exist_ok=True)
    token_folder(options.out)
    recipe(options.out, options.updates, options.restart_every)
    started = time.perf_counter()
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "-m", "benchmarks.soak"]
    with (options.out / "stderr.txt").open("w") as errors:
        code = subprocess.run([sys.executable, *ranks, *sys.argv[1:]], stdout=errors, stderr=errors, check=False).returncode
    if code:
        print(f"the run ended with exit code {code}: see {options.out / 'stderr.txt'}", file=sys.stderr)
        return 1
    print(f"{machine()} {time.perf_counter() - started:.0f} s.\n")
    by_rank = [samples_of(options.out, rank) for rank in range(RANKS)]
    for rank, samples in enumerate(by_rank):
        print(table(rank, samples), end="\n\n")
    verdicts = [verdict(rank, samples) for rank, samples in enumerate(by_rank)]
    print("\n".join(text for text, _ in verdicts))
    return 0 if all(is_flat for _, is_flat in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
