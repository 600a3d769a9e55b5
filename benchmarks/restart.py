"""What a restart takes in updates, by its parts, for each way to store frozen weights and each kind of reset; in turns.

    python -m benchmarks.restart [--hidden 512] [--layers 4] [--rank 64] [--tokens 2048] [--rounds 5] [--world-size 1]
                                 [--dtype fp32] [--json FILE] [--markdown FILE]

Each round restarts every engine once, after two updates of every engine (after one, all moments of A are still zero), so that
whatever else the machine does meets all of them. The second update is timed. With
more than one rank the ranks are processes of this machine. Blocks are not compiled.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import rounds
from benchmarks.gpu_steps import DTYPES, wait
from benchmarks.peers import LENGTH, VOCABULARY, model
from relora_ds.launch import launcher, process_group

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
"""Of engines in fp32."""


def modes(dtype: str) -> dict[str, dict[str, Any]]:
    """:data:`MODES` of engines in ``dtype``, whose frozen weights are stored in it unless a mode says otherwise."""
    own = {"frozen": {"dtype": dtype}}
    return {name.replace("fp32", dtype): settings for name, settings in MODES.items() if settings != own}


def engine(options: argparse.Namespace, settings: dict[str, Any]) -> Any:
    import relora_ds
    from relora_ds.config import Optimizer
    from relora_ds.engine.initialize import adamw

    config = {"train_batch_size": options.tokens // LENGTH, "gradient_clipping": 1.0, "zero_optimization": {"stage": 2}}
    config["bf16"] = {"enabled": options.dtype == "bf16"}
    relora = {"rank": options.rank, "alpha": 32, "restart_every": 10**6, **settings}
    return relora_ds.initialize(model=model(options), optimizer=adamw(Optimizer(lr=1e-4)), config=config, relora=relora)[0]


def measure(options: argparse.Namespace) -> None:
    """As one rank; rank 0 tells."""
    engines = {name: engine(options, settings) for name, settings in modes(options.dtype).items()}
    batch = options.tokens // LENGTH // dist.get_world_size()
    found: dict[str, dict[str, list[Any]]] = {name: {"update_s": [], "restart_s": [], "parts": []} for name in engines}
    for number in range(options.rounds + 1):
        for name, one in engines.items():
            ids = torch.randint(VOCABULARY, (batch, LENGTH), generator=torch.Generator().manual_seed(number)).to(one.device)
            for _ in range(2):
                wait(one.device)
                started = time.perf_counter()
                one.backward(one(input_ids=ids, labels=ids).loss)
                one.step()
                wait(one.device)
                seconds = time.perf_counter() - started
            record = one.optimizer.restart()
            if number:
                found[name]["update_s"].append(seconds)
                found[name]["restart_s"].append(record.seconds)
                found[name]["parts"].append(record.parts)
    if not dist.get_rank():
        rounds.write(options, {"ways": found}, [rows(found)])


def rows(found: Mapping[str, Mapping[str, Sequence[Any]]]) -> list[list[str]]:
    """A table: for each way its updates and restarts in seconds, and the parts of each restart."""
    table = [["way", "s an update", "s a restart (least, median, most)", "in updates", "merge", "reset", "verify"]]
    for name, own in found.items():
        update, restart = statistics.median(own["update_s"]), rounds.Spread.of(own["restart_s"])
        parts = [f"{statistics.median(one[part] for one in own['parts']):.3f}" for part in table[0][-3:]]
        spread = f"{restart.least:.3f}, {restart.median:.3f}, {restart.most:.3f}"
        table.append([name, f"{update:.3f}", spread, f"{restart.median / update:.2f}", *parts])
    return table


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 512), ("layers", 4), ("rank", 64), ("tokens", 2048), ("rounds", 5), ("world-size", 1)):
        parser.add_argument(f"--{name}", type=rounds.positive, default=default, metavar="N", help=f"default: {default}")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of engines (default: fp32)")
    rounds.add_files(parser)
    return parser.parse_args(words)


def main() -> None:
    options = parse()
    if "RANK" in os.environ:
        measure(options)
        process_group.leave()
        return
    sys.exit(launcher.spawn(sys.argv[1:], options.world_size, module="benchmarks.restart"))


if __name__ == "__main__":
    main()
