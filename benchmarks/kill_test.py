"""Kills runs at random instants and aimed ones, resumes them until they are done, and compares them with a run that nobody killed.

    python benchmarks/kill_test.py OUT [--runs 30] [--seed 0]

Every run is a small one of two ranks (warm start, restarts, int8 with a sharded master, checkpoints every other update). It is killed
(SIGKILL to the launcher and all ranks) up to three times, then left alone. Its metrics, its restarts and its final weights must be
those of the uninterrupted run, to the last digit. Prints a table (Markdown); exit code 1 when a run differs.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from relora_ds.data.prepare import prepare
from relora_ds.models.export import stored_model

ROOT = Path(__file__).resolve().parent.parent
MODEL = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TIMES = ("tokens_per_s", "seconds", "parts", "sent_bytes")
POLL_S = 0.0005
Aim = Callable[[Path, float], bool]
"""(run's folder, seconds since the run was started) -> whether the moment has come."""


def recipe(folder: Path, name: str, tokens: Path) -> Path:
    """40 updates into ``folder / name``: the change of phase after 8, restarts after 14, 20, 26, 32 and 38."""
    content = {
        "run": {"dir": str(folder / name), "seed": 1},
        "model": {"config": {**MODEL, "max_position_embeddings": 64}},
        "data": {"path": str(tokens), "sequence_length": 32},
        "relora": {
            "rank": 4, "alpha": 8, "dropout": 0.1, "warm_start": 8, "restart_every": 6, "restart_warmup": 2,
            "frozen": {"dtype": "int8", "group_size": 16, "master": "sharded"},
        },
        "optimizer": {"lr": 5e-3, "warmup": 2},
        "train": {"updates": 40, "global_batch": 8, "micro_batch": 2, "eval_every": 20, "checkpoint_every": 2, "keep": 2},
        "wandb": {"mode": "disabled"},
        "deepspeed": {"zero_optimization": {"stage": 2}},
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def token_folder(folder: Path) -> Path:
    source = folder / "text.jsonl"
    lines = (f"Entry {i}: the square of {i} is {i * i}, and {i} words follow." + " and so on" * (i % 7) for i in range(200))
    source.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    prepare(str(source), folder / "tokens", vocab_size=300, holdout=0.1, progress=False)
    return folder / "tokens"


def start(path: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "relora_ds", "train", str(path), "--nproc", "2"]
    return subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)


def kill(process: subprocess.Popen[bytes]) -> None:
    """The launcher and all ranks, at once, as a node that dies."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(family, timeout=10)


def updates_logged(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_bytes().count(b'"loss"')
    except OSError:
        return 0


def at_random(rng: random.Random) -> tuple[str, Aim]:
    """At some time of a run's life of about twelve seconds, start-up included."""
    moment = rng.uniform(4.0, 13.0)
    return "at random", lambda _run, age: age > moment


def after_update(rng: random.Random) -> tuple[str, Aim]:
    """A little after some update was logged: in the next one, its restart, its checkpoint."""
    update, delay, seen = rng.randrange(1, 39), rng.uniform(0.0, 0.05), [0.0]

    def aim(run: Path, age: float) -> bool:
        if not seen[0] and updates_logged(run) >= update:
            seen[0] = age
        return bool(seen[0]) and age >= seen[0] + delay

    return "after an update", aim


def in_a_save(rng: random.Random) -> tuple[str, Aim]:
    """While a checkpoint's folder is there and its manifest is not."""
    update = 2 * rng.randrange(1, 20)

    def aim(run: Path, _age: float) -> bool:
        folder = run / "checkpoints" / f"update_{update:07d}"
        return folder.is_dir() and not (folder / "manifest.json").exists()

    return "in a save", aim


def in_a_base(rng: random.Random) -> tuple[str, Aim]:
    """While a base's folder is there and its manifest is not."""
    restart = rng.randrange(0, 6)

    def aim(run: Path, _age: float) -> bool:
        folder = run / "base" / f"restart_{restart:04d}"
        return folder.is_dir() and not (folder / "manifest.json").exists()

    return "in the writing of a base", aim


def in_a_rotation(rng: random.Random) -> tuple[str, Aim]:
    """When an old checkpoint has begun to go."""
    update = 2 * rng.randrange(1, 17)

    def aim(run: Path, _age: float) -> bool:
        newer = run / "checkpoints" / f"update_{update + 4:07d}" / "manifest.json"
        folder = run / "checkpoints" / f"update_{update:07d}"
        return newer.exists() and not (folder / "manifest.json").exists()

    return "in a rotation", aim


def around_a_merge(rng: random.Random) -> tuple[str, Aim]:
    """After the update before one that a restart follows, with a delay of about an update."""
    update, delay, seen = 8 + 6 * rng.randrange(1, 6) - 1, rng.uniform(0.0, 0.06), [0.0]

    def aim(run: Path, age: float) -> bool:
        if not seen[0] and updates_logged(run) >= update:
            seen[0] = age
        return bool(seen[0]) and age >= seen[0] + delay

    return "around a merge", aim


def in_the_change_of_phase(rng: random.Random) -> tuple[str, Aim]:
    """After the last update at full rank, before the first of the LoRA phase."""
    delay, seen = rng.uniform(0.0, 0.15), [0.0]

    def aim(run: Path, age: float) -> bool:
        if not seen[0] and updates_logged(run) == 8:
            seen[0] = age
        return bool(seen[0]) and age >= seen[0] + delay

    return "in the change of phase", aim


AIMS = (at_random, after_update, in_a_save, in_a_base, in_a_rotation, around_a_merge, in_the_change_of_phase)


def torture_once(path: Path, run: Path, aim: Aim) -> bool:
    """Runs a recipe until the moment has come, and kills it; False when it ended before."""
    process, started = start(path), time.monotonic()
    while process.poll() is None and not aim(run, time.monotonic() - started):
        time.sleep(POLL_S)
    if process.poll() is not None:
        return False
    kill(process)
    return True


def torture(path: Path, run: Path, rng: random.Random, most_kills: int = 3) -> list[tuple[str, int]]:
    """Runs a recipe to its end over up to ``most_kills`` kills; returns how each was aimed and at which update it hit."""
    hits = []
    for _ in range(rng.randint(1, most_kills)):
        name, aim = rng.choice(AIMS)(rng)
        if not torture_once(path, run, aim):
            break
        hits.append((name, updates_logged(run)))
    process = start(path)
    code = process.wait(timeout=300)
    assert code == 0, f"{path}: exit code {code} after {hits}"
    return hits


def result(run: Path) -> dict[str, Any]:
    """All that two runs must have in common: their logs but for times, and the weights of the last checkpoint."""
    logs = {}
    for name in ("metrics.jsonl", "restarts.jsonl"):
        records = [json.loads(line) for line in (run / name).read_text().splitlines()]
        logs[name] = [{key: value for key, value in record.items() if key not in TIMES} for record in records]
    return {**logs, "weights": stored_model(run).state_dict()}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    found = [name for name in ("metrics.jsonl", "restarts.jsonl") if one[name] != other[name]]
    names = one["weights"].keys() | other["weights"].keys()
    return found + [name for name in names if not torch.equal(one["weights"][name], other["weights"][name])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    tokens = token_folder(options.out)
    assert start(recipe(options.out, "whole", tokens)).wait(timeout=300) == 0
    expected = result(options.out / "whole")
    kills: Counter[str] = Counter()
    bad = 0
    for number in range(options.runs):
        rng = random.Random(options.seed * 1000 + number)
        name = f"run{number}"
        hits = torture(recipe(options.out, name, tokens), options.out / name, rng)
        wrong = differences(result(options.out / name), expected)
        kills.update(how for how, _ in hits)
        bad += bool(wrong)
        told = ", ".join(f"{how} (update {update})" for how, update in hits)
        print(f"run {number}: killed {told}: {'the same' if not wrong else wrong[:3]}", file=sys.stderr, flush=True)
    print("| killed | times |\n|---|---|")
    for how, times in kills.most_common():
        print(f"| {how} | {times} |")
    print(
        f"\n{options.runs} runs, {sum(kills.values())} kills, {options.runs - bad} ended as the uninterrupted run, {bad} did not."
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
