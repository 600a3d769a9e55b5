"""What checkpoints take: bytes beside DeepSpeed's default, and the time for which training stands still.

    python benchmarks/checkpoints.py OUT [key.sub=value …]

The demo recipe is really run for a few updates (one rank); larger models are computed from their shapes by the formula that the run
checks: 2 + 12 bytes for each trainable parameter in bf16 (4 + 12 in fp32), and, in DeepSpeed's default, the frozen weights on top.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from relora_ds import config
from relora_ds.checkpoint import reader as checkpoints
from relora_ds.checkpoint import writer as saver
from relora_ds.checkpoint.listing import readable
from relora_ds.launch import libraries, places, process_group
from relora_ds.method import lora
from relora_ds.method.targets import find_targets
from relora_ds.models import build as models
from relora_ds.run.folder import RunFolder
from relora_ds.training.loop import train
from relora_ds.training.preflight import check

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "demo.yaml"
VOCABULARY = 32_100


def sizes(architecture: Any, rank: int) -> tuple[int, int]:
    """Trainable and frozen parameters in the LoRA phase."""
    model = models.build_meta(architecture)
    layers = find_targets(model, "all-linear")
    trainable = lora.num_trainable(model, layers, rank)
    return trainable, sum(module.weight.numel() for module in layers.values())


def row(name: str, ours: float, default: float, base: float, measured: str) -> str:
    return f"| {name} | {readable(ours)} | {readable(default)} | {default / ours:.2f} | {readable(base)} | {measured} |"


def main() -> None:
    out, overrides = Path(sys.argv[1]), sys.argv[2:]
    libraries.guard_bf16()
    place = places.single()
    device = process_group.start(place)
    times: list[tuple[float, float]] = []
    copying = saver._states
    copied = [0.0]

    def timed_copy(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        states = copying(*args, **kwargs)
        copied[0] = time.perf_counter() - started
        return states

    original = saver.Saver.start

    def timed_start(self: saver.Saver, *args: Any) -> None:
        started = time.perf_counter()
        original(self, *args)
        times.append((time.perf_counter() - started, copied[0]))

    saver._states, saver.Saver.start = timed_copy, timed_start  # type: ignore[method-assign]
    rows, taken = [], {}
    for contained in (False, True):
        folder = RunFolder(out / f"contained_{contained}")
        few = [
            "train.updates=24",
            "train.checkpoint_every=4",
            "relora.warm_start=0",
            "relora.restart_every=10",
            "optimizer.warmup=2",
        ]
        few += [
            "relora.restart_warmup=2",
            "wandb.mode=disabled",
            "train.eval_every=null",
            f"checkpoint.self_contained={contained}",
        ]
        recipe = config.load(RECIPE, [*few, f"run.dir={folder.path}", *overrides])
        checked = check(recipe, RECIPE, 1)
        train(checked, place, device)
        newest = checkpoints.find_all(folder)[-1]
        content = checkpoints.read_manifest(newest)
        taken[contained] = sum(entry["bytes"] for entry in content.files.values())
        if content.base is not None:
            base = sum(path.stat().st_size for path in checkpoints.base_folder(newest, content).iterdir())
    process_group.leave()
    trainable, frozen = sizes(checked.architecture, recipe.relora.rank)
    width = 2 if content.precision == "bf16" else 4
    formula = (width + 12) * trainable
    rows.append(row(f"demo, {content.precision}, measured", taken[False], taken[True], base, f"{taken[False] / formula:.3f}"))
    rows.append(row(f"demo, {content.precision}, formula", formula, formula + width * frozen, width * frozen, "1"))
    for name in ("llama_1b", "llama_7b"):
        trainable, frozen = sizes(models.preset_config(name, VOCABULARY), 128)
        rows.append(row(f"{name}, r = 128, bf16, formula", 14 * trainable, 14 * trainable + 2 * frozen, 2 * frozen, ""))
    print("| model | checkpoint | DeepSpeed's default | ratio | base, once per restart | measured / formula |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))
    stalls, copies = (sorted(column)[len(times) // 2] * 1e3 for column in zip(*times[1:], strict=True))  # the first allocates
    print(
        f"\nStanding still: median {stalls:.1f} ms a checkpoint, of which copying {copies:.1f} ms ({len(times) - 1} checkpoints)."
    )


if __name__ == "__main__":
    main()
