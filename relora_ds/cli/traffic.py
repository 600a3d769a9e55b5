"""``relora-ds traffic``: what a recipe sends, measured beside full-rank training."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relora_ds.cli.options import add_recipe, add_trust, new_command
from relora_ds.comm import nic
from relora_ds.config import Run, load
from relora_ds.console import say
from relora_ds.errors import EXIT_DONE, ConfigError, nearest, with_rest
from relora_ds.launch import launcher, libraries, places, process_group
from relora_ds.paths import path_argument, refuse_unwritable
from relora_ds.reports.tables import aligned
from relora_ds.units import parse_bytes

if TYPE_CHECKING:  # it imports torch
    from relora_ds.training.preflight import Checked

LINKS = "100Mbit,1Gbit,10Gbit"


def add_command(parent: Any) -> None:
    """Adds ``traffic`` to the parser of ``relora-ds``."""
    traffic = new_command(
        parent, "traffic", run_traffic, "Measure what a recipe sends, beside full-rank training.",
        about="""\
A few updates are trained in each way that --arms names, with the same model, data
and batch, and no run is written. Like train, it also runs under torchrun, srun and mpirun.""",
        examples=[
            "relora-ds traffic recipes/demo.yaml --nproc 2",
            "relora-ds traffic recipes/llama_130m.yaml --nproc 8 --arms recipe,zero2 --link 10Gbit,100Gbit",
        ],
    )  # fmt: skip
    add_recipe(traffic)
    traffic.add_argument(
        "--nproc", metavar="N", type=int,
        help="Processes to start on this machine, at least 2. Default: one per GPU, or 2.",
    )  # fmt: skip
    traffic.add_argument(
        "--updates", metavar="N", type=int, default=3, help="Updates to measure of each way. Default: %(default)s."
    )
    traffic.add_argument(
        "--arms", metavar="NAMES", default="recipe,full,zero2,zero1,ddp",
        help="The ways of training to compare: the recipe; full-rank training with the same collectives (full), "
        "with DeepSpeed's defaults (zero2, zero1) and by DistributedDataParallel (ddp). Default: %(default)s.",
    )  # fmt: skip
    traffic.add_argument(
        "--link", metavar="SPEEDS", default=LINKS,
        help="Link speeds for which to estimate the seconds of an update. Default: %(default)s.",
    )  # fmt: skip
    traffic.add_argument(
        "--out", metavar="FOLDER", type=path_argument,
        help="The folder for the table, the picture and the JSON. Default: traffic/ and the recipe's name.",
    )  # fmt: skip
    add_trust(traffic)


def run_traffic(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """In the launching process: check, then start the ranks. In a rank: check, join the others, measure."""
    overrides = options.overrides = with_rest(options.overrides, rest, options.known())
    libraries.quiet_libraries()
    place = places.launched()
    num_processes = _num_processes(options, place)
    links = {name.strip(): parse_bytes(name, "--link") for name in options.link.split(",")}
    arms = _arms(options)
    out = options.out or Path("traffic") / Path(options.recipe).stem
    refuse_unwritable("--out", out)
    checked = _check(options, out, num_processes, is_main=place is None or place.is_main)
    if place is not None:
        return _measure(checked, place, arms, options, links, out)
    launcher.check_devices(num_processes)
    say(f"starting {num_processes} processes")
    words = ["traffic", options.recipe, *overrides, "--updates", str(options.updates), "--arms", options.arms]
    return launcher.spawn([*words, "--link", options.link, "--out", str(out), *["--trust"] * options.trust], num_processes)


def _num_processes(options: argparse.Namespace, place: places.Place | None) -> int:
    """Ranks of the job. Raises ConfigError for numbers that cannot be, and where a launcher has decided it already."""
    if options.updates < 1:
        raise ConfigError("--updates", options.updates, "must be at least 1")
    launcher.check_nproc(options.nproc, place)
    count: int = place.world_size if place else options.nproc or max(2, launcher.default_num_processes())
    if count < 2:
        raise ConfigError("--nproc", count, "one process sends nothing", "use at least 2")
    return count


def _arms(options: argparse.Namespace) -> list[str]:
    from relora_ds.bandwidth.comparison import ARMS

    chosen = [name.strip() for name in options.arms.split(",")]
    for name in chosen:
        if name not in ARMS:
            raise ConfigError("--arms", name, "no such way to train", nearest(name, ARMS))
    return chosen


def _check(options: argparse.Namespace, out: Path, num_processes: int, *, is_main: bool) -> Checked:
    """Judges the recipe, and makes bf16 safe on this CPU before any product is formed. Raises ConfigError."""
    import torch

    from relora_ds.ds_config import fit as ds_config
    from relora_ds.training.preflight import check

    config = load(options.recipe, options.overrides)
    config = config.model_copy(update={"run": Run(dir=str(out), seed=config.run.seed)})  # no run is written, or gone on with
    checked = check(config, Path(options.recipe), num_processes, trust=options.trust)
    on_cpu = not torch.cuda.is_available()
    if ds_config.precision(checked.deepspeed) == "bf16" and on_cpu and (done := libraries.guard_bf16()) and is_main:
        say(done)
    return checked


def _measure(
    checked: Checked, place: places.Place, arms: Sequence[str], options: argparse.Namespace, links: dict[str, float], out: Path
) -> int:
    """This process is a rank: join the others, measure, and leave together; rank 0 tells."""
    libraries.skip_muon_compilation()
    from relora_ds.bandwidth.comparison import accumulation, arms_of, compare
    from relora_ds.bandwidth.table import NOTE, table, write

    config = checked.config
    place, device = process_group.start(place)
    tell = say if place.is_main else lambda text: None
    for remark in checked.remarks:
        tell(remark)
    results = compare(checked, place, device, arms_of(config, arms), options.updates, tell)
    if place.is_main:
        unseen = nic.unseen(shares_memory=device.type == "cuda" and (place.local_world_size or 1) > 1)
        about = {
            "recipe": " ".join([options.recipe, *options.overrides]),
            "ranks": f"{place.world_size} on {math.ceil(place.world_size / (place.local_world_size or 1))} node(s), {device.type}",
            "global batch": f"{config.train.global_batch} x {config.data.sequence_length} tokens",
            "micro batches": f"{accumulation(config, place.world_size)} of an update on a rank",
            "versions": _versions(),
            **({"not on the wire": f"what went by {', '.join(unseen)}"} if unseen else {}),
        }
        write(out, results, links, about)
        print("\n".join(aligned(table(results, links))))
        print(f"\n{NOTE}")
        if unseen:
            print(f"Not on the wire is what went by {', '.join(unseen)}.")
        say(f"wrote {out}/comparison.md, .png and .json")
    process_group.leave()
    return EXIT_DONE


def _versions() -> str:
    import deepspeed
    import torch

    from relora_ds import __version__

    return f"relora_ds {__version__}, torch {torch.__version__}, deepspeed {deepspeed.__version__}"
