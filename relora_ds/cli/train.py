"""``relora-ds train``: checks the recipe, starts the ranks, trains, and says how it ended."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from relora_ds import environment
from relora_ds.cli.options import EXIT_CODES, add_insisting, add_recipe, insisted, new_command
from relora_ds.config import Config, load
from relora_ds.console import say, write
from relora_ds.errors import (
    EXIT_BAD_CONFIG,
    EXIT_FAILED,
    ConfigError,
    RankError,
    StartError,
    TrainingError,
    refuse_below,
    with_rest,
)
from relora_ds.launch import launcher, libraries, places, process_group
from relora_ds.paths import refuse_unwritable
from relora_ds.run.folder import RunFolder
from relora_ds.slurm.events import write_outcome
from relora_ds.supervision import faults
from relora_ds.supervision.stop import StopSignal

if TYPE_CHECKING:  # it imports torch
    from relora_ds.training.preflight import Checked

ABOUT = f"""\
Where run.dir holds a checkpoint, the run resumes from the newest whole one by
itself. Else it starts at update 1.

Called by hand, the command starts its processes on this machine. To start them
on several, or by another launcher:
  torchrun --nproc-per-node 8 -m relora_ds train RECIPE
  deepspeed --module relora_ds train RECIPE
  srun --ntasks-per-node 8 relora-ds train RECIPE
  mpirun -n 8 relora-ds train RECIPE
  relora-ds slurm submit RECIPE        (a job that requeues itself)

{EXIT_CODES}"""


def add_command(parent: Any) -> None:
    """Adds the command to the parser of ``relora-ds``."""
    train = new_command(
        parent, "train", run_train, "Train a recipe; a run that was stopped is resumed.", about=ABOUT,
        examples=[
            "relora-ds train recipes/demo.yaml --nproc 2",
            "relora-ds train recipes/llama_130m.yaml --nproc 8 optimizer.lr=5e-4 run.dir=runs/low_lr",
        ],
    )  # fmt: skip
    add_recipe(train)
    train.add_argument(
        "--nproc", metavar="N", type=int, help="Processes to start on this machine. Default: one per GPU; without GPUs, 1."
    )
    train.add_argument(
        "--under", choices=("srun", "torchrun", "mpirun"),
        help="Refuse to start unless this launcher started the process. For scripts in which a container may hide it.",
    )  # fmt: skip
    train.add_argument(
        "--profile", metavar="N", type=int,
        help="Profile N updates of this start on rank 0, after two that warm up. "
        "A trace of each and tables of where the time goes are written into run.dir/profile.",
    )  # fmt: skip
    add_insisting(train)


def run_train(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """In the launching process: check, then start the ranks. In a rank: check, join the others, train."""
    overrides = with_rest(options.overrides, rest, options.known())
    libraries.quiet_libraries()
    place = places.launched(options.under)
    launcher.check_nproc(options.nproc, place)
    refuse_below("--profile", options.profile, 1)
    if place is None:
        return _train_here(options, load(options.recipe, overrides), overrides)
    recipe, stop, checked, refusal = None, None, None, None
    try:
        recipe = load(options.recipe, overrides)
        stop = StopSignal(recipe.train.stop_signal)  # before the slow imports: until then a signal ends the process
        checked = _check(options, recipe, place.world_size)
    except ConfigError as error:
        refusal = error  # for all ranks to hear: others may find nothing wrong
    return _train_rank(recipe, checked, place, stop, options.profile, refusal)


def _train_here(options: argparse.Namespace, recipe: Config, overrides: Sequence[str]) -> int:
    """Without a launcher: one process, or as many as are asked for."""
    from relora_ds.training.preflight import refuse_busy

    num_processes = options.nproc or launcher.default_num_processes()
    refuse_unwritable("run.dir", Path(recipe.run.dir))
    refuse_busy(recipe, environment.attempt())
    checked = _check(options, recipe, num_processes)
    launcher.check_devices(num_processes)
    if num_processes == 1:
        return _train_rank(recipe, checked, places.single(), StopSignal(recipe.train.stop_signal), options.profile)
    say(f"starting {num_processes} processes")
    profile = [] if options.profile is None else ["--profile", str(options.profile)]
    words = ["train", options.recipe, *overrides, *profile, *insisted(options)]
    return launcher.spawn(words, num_processes, stop_signal=recipe.train.stop_signal)


def _check(options: argparse.Namespace, recipe: Config, num_processes: int) -> Checked:
    """Judges the recipe, and makes bf16 safe on this CPU before any product is formed. Raises ConfigError."""
    from relora_ds.ds_config import fit as ds_config
    from relora_ds.training.preflight import check

    checked = check(recipe, Path(options.recipe), num_processes, options.allow_changed, options.trust)
    if (
        ds_config.precision(checked.deepspeed) == "bf16"
        and not cuda_here()
        and (done := libraries.guard_bf16())
        and places.speaks_as(0)
    ):
        say(done)
    return checked


def _train_rank(
    recipe: Config | None,
    checked: Checked | None,
    place: places.Place,
    stop: StopSignal | None,
    profile: int | None,
    refusal: ConfigError | None = None,
) -> int:
    """This process is a rank: join the others, train, and leave together.

    ``profile``: so many updates. ``refusal``: why it cannot, instead of what it checked.
    """
    from relora_ds.supervision.watchdog import collective_timeout_s

    try:
        place, device = process_group.start(
            place, timeout_s=collective_timeout_s(recipe.train.hang_timeout if recipe else None), refusal=refusal
        )
    except Exception as error:
        _tell_end(recipe, place, error)
        raise
    assert checked is not None and stop is not None, "a refusal is raised by all ranks"
    try:
        return _train_together(checked, place, device, stop, profile)
    except ConfigError as error:
        found = process_group.of_all_or_one(error, place)
        _tell_end(recipe, place, found)
        raise found from None


def _train_together(checked: Checked, place: places.Place, device: Any, stop: StopSignal, profile: int | None) -> int:
    """Trains; what ends a run in order, on all ranks, becomes its exit code."""
    libraries.skip_muon_compilation()
    from relora_ds.callbacks.profile import Profile
    from relora_ds.checkpoint.universal import ConversionError
    from relora_ds.checkpoint.writer import FencedError
    from relora_ds.training.loop import train

    message, is_final = "", True
    try:
        code = train(checked, place, device, stop, [Profile(profile)] if profile and place.is_main else [])
    except (TrainingError, FencedError, ConversionError) as error:
        message, code = str(error), EXIT_FAILED
        is_final = isinstance(error, TrainingError)  # another start may convert, and a folder that was lost is another job's
        if place.is_main:
            write(f"relora-ds: error: {error}\n")
    if place.is_main and is_final:
        _tell_job(checked.config, code, message)
    process_group.leave()
    return code


def _tell_end(recipe: Config | None, place: places.Place, error: Exception) -> None:
    """Leaves what ended the run where whoever starts it again looks: a setting that all ranks refuse is final, all else a fault."""
    if recipe is None:
        return
    if isinstance(error, RankError):
        if place.rank == error.speaker:
            _note_fault(recipe, "refusal", error.rank, error.host, error)
    elif isinstance(error, ConfigError):
        if place.is_main:
            _tell_job(recipe, EXIT_BAD_CONFIG)
    elif not isinstance(error, StartError):
        _note_fault(recipe, "error", place.rank, environment.node_name(), error)
    elif place.is_main:
        _note_fault(recipe, "error", None, error.host, error)


def _note_fault(recipe: Config, kind: Literal["error", "refusal"], rank: int | None, host: str | None, error: Exception) -> None:
    text = str(error) if isinstance(error, (RankError, StartError)) else faults.describe(error)
    faults.record(Path(recipe.run.dir), kind=kind, attempt=environment.attempt(), rank=rank, host=host, update=0, detail=text)


def _tell_job(recipe: Config, code: int, message: str = "") -> None:
    """Inside a SLURM job: leaves the exit code where the batch script finds it, since launchers change it on the way."""
    if environment.attempt():
        with suppress(OSError):
            write_outcome(RunFolder(Path(recipe.run.dir)), environment.attempt(), code, message)


def cuda_here() -> bool:
    import torch

    return torch.cuda.is_available()
