"""What a restart takes in updates, by its parts, for each way to store frozen weights and each kind of reset; in turns on a CPU.

    python -m benchmarks.restart [--hidden 512] [--layers 4] [--rank 64] [--tokens 2048] [--rounds 5] [--world-size 1]

Each round restarts every engine once, after an update of every engine, so that whatever else the machine does meets all of them. With
more than one rank the ranks are processes of this machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.peers import LENGTH, VOCABULARY, model
from relora_ds.launch import launcher

MODES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16 store": {"frozen": {"dtype": "bf16"}},
    "int8 store": {"frozen": {"dtype": "int8"}},
    "bf16 store, sharded master": {"frozen": {"dtype": "bf16", "master": "sharded"}},
    "int8 store, sharded master": {"frozen": {"dtype": "int8", "master": "sharded"}},
    "int8 store, factors from the residual": {"frozen": {"dtype": "int8", "master": "sharded"}, "init": "residual"},
    "fp32, independent masks": {"reset": {"mask": "independent"}},
    "fp32, masks over all tensors": {"reset": {"scope": "global"}},
    "fp32, full reset": {"reset": {"kind": "full"}},
}


def engine(options: argparse.Namespace, settings: dict[str, Any]) -> Any:
    import relora_ds
    from relora_ds.config import Optimizer
    from relora_ds.engine.initialize import adamw

    config = {"train_batch_size": options.tokens // LENGTH, "gradient_clipping": 1.0, "zero_optimization": {"stage": 2}}
    relora = {"rank": options.rank, "alpha": 32, "restart_every": 10**6, **settings}
    return relora_ds.initialize(model=model(options), optimizer=adamw(Optimizer(lr=1e-4)), config=config, relora=relora)[0]


def measure(options: argparse.Namespace) -> None:
    """As one rank; rank 0 prints the table."""
    engines = {name: engine(options, settings) for name, settings in MODES.items()}
    batch = options.tokens // LENGTH // dist.get_world_size()
    updates: dict[str, list[float]] = {name: [] for name in MODES}
    restarts: dict[str, list[dict[str, float]]] = {name: [] for name in MODES}
    for number in range(options.rounds + 1):
        for name, one in engines.items():
            ids = torch.randint(VOCABULARY, (batch, LENGTH), generator=torch.Generator().manual_seed(number))
            started = time.perf_counter()
            one.backward(one(input_ids=ids, labels=ids).loss)
            one.step()
            seconds = time.perf_counter() - started
            record = one.optimizer.restart()
            if number:
                updates[name].append(seconds)
                restarts[name].append({"all": record.seconds, **record.parts})
    if dist.get_rank():
        return
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads a rank, {vars(options)}\n")
    print("| way | s an update | s a restart (least, median, most) | in updates | merge | reset | verify |\n|" + "---|" * 7)
    for name, found in restarts.items():
        update, times = statistics.median(updates[name]), [one["all"] for one in found]
        parts = " | ".join(f"{statistics.median(one[part] for one in found):.3f}" for part in ("merge", "reset", "verify"))
        spread = f"{min(times):.3f}, {statistics.median(times):.3f}, {max(times):.3f}"
        print(f"| {name} | {update:.3f} | {spread} | {statistics.median(times) / update:.2f} | {parts} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 512), ("layers", 4), ("rank", 64), ("tokens", 2048), ("rounds", 5), ("world-size", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    if "RANK" in os.environ:
        measure(options)
        return
    sys.exit(launcher.spawn(sys.argv[1:], options.world_size, module="benchmarks.restart"))


if __name__ == "__main__":
    main()
