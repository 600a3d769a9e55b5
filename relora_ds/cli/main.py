"""relora-ds: the command line. Each command parses, checks, and hands over to the module that does the work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from relora_ds import environment
from relora_ds.cli import plan as cli_plan
from relora_ds.cli import slurm as cli_slurm
from relora_ds.cli import traffic as cli_traffic
from relora_ds.config import Config, load
from relora_ds.errors import (
    EXIT_BAD_CONFIG,
    EXIT_DONE,
    EXIT_FAILED,
    ConfigError,
    RankError,
    RestartError,
    StartError,
    refuse_below,
    refuse_rest,
    with_rest,
)
from relora_ds.launch import launcher, libraries, places, process_group
from relora_ds.paths import path_argument, refuse_unwritable, text_argument
from relora_ds.run.folder import RunFolder
from relora_ds.slurm.client import SlurmError
from relora_ds.slurm.events import write_outcome
from relora_ds.supervision import faults
from relora_ds.supervision.stop import StopSignal
from relora_ds.version import __version__

if TYPE_CHECKING:  # it imports torch
    from relora_ds.training.preflight import Checked


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, and with its errors in this project's form: one line, exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        print(f"relora-ds: error: {message} (try {self.prog} --help)", file=sys.stderr)
        raise SystemExit(EXIT_BAD_CONFIG)


def build_parser() -> Parser:
    parser = Parser(prog="relora-ds", description="ReLoRA pre-training on DeepSpeed.")
    parser.add_argument("--version", action="version", version=f"relora-ds {__version__}")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    prepare = commands.add_parser("prepare", help="text, jsonl, parquet or a hub data set -> token folder")
    prepare.add_argument(
        "source", metavar="SOURCE", type=text_argument, help="a file, a folder, a glob, or the name of a hub data set"
    )
    prepare.add_argument(
        "out", metavar="OUT", type=path_argument, help="the token folder to write; run again to go on after an interruption"
    )
    prepare.add_argument(
        "--tokenizer", type=text_argument, help="a tokenizer.json, a folder or a hub name; left out: a byte-level BPE is trained"
    )
    prepare.add_argument("--vocab-size", type=int, default=8192, help="of the BPE that is trained (default: %(default)s)")
    prepare.add_argument("--text-column", default="text", help="default: %(default)s")
    prepare.add_argument("--config-name", help="of a hub data set, e.g. en for C4")
    prepare.add_argument("--split", default="train", help="of a hub data set (default: %(default)s)")
    prepare.add_argument("--holdout", type=float, default=0.01, help="share of the documents held out (default: %(default)s)")
    prepare.add_argument("--max-documents", type=int, help="stop after so many")
    prepare.add_argument("--seed", type=int, default=0, help="of the choice of held-out documents (default: %(default)s)")
    prepare.set_defaults(run=run_prepare)

    train = commands.add_parser("train", help="train a recipe; resumes by itself")
    train.add_argument("recipe", metavar="RECIPE", type=text_argument, help="a YAML file")
    train.add_argument("overrides", metavar="key.sub=value", nargs="*", help="replace single settings of the recipe")
    train.add_argument("--nproc", type=int, help="processes on this machine (default: one per GPU, or 1)")
    train.add_argument(
        "--under",
        choices=("srun", "torchrun", "mpirun"),
        help="what starts the ranks: refused where it left no trace (used by scripts)",
    )
    cli_slurm.add_insisting(train)
    train.set_defaults(run=run_train)

    evaluation = commands.add_parser("eval", help="validation perplexity of a run or a checkpoint")
    evaluation.add_argument("place", metavar="RUN_DIR|CHECKPOINT", type=path_argument)
    evaluation.add_argument("--data", type=path_argument, help="another token folder than the run's")
    evaluation.add_argument("--max-tokens", type=int, help="evaluate on so many validation tokens (default: the run's setting)")
    evaluation.add_argument("--batch-size", type=int, help="sequences of one forward pass (default: the run's micro batch)")
    cli_slurm.add_trust(evaluation)
    evaluation.set_defaults(run=run_eval)

    export = commands.add_parser("export", help="merged weights as a Hugging Face folder")
    export.add_argument("place", metavar="RUN_DIR|CHECKPOINT", type=path_argument)
    export.add_argument("out", metavar="OUT", type=path_argument)
    export.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: the one it was trained in")
    export.add_argument("--adapter", action="store_true", help="as a PEFT adapter of the current factors, its base beside it")
    cli_slurm.add_trust(export)
    export.set_defaults(run=run_export)

    listing = commands.add_parser("checkpoints", help="a run's checkpoints: size, what each needs, whether it is whole")
    listing.add_argument("place", metavar="RUN_DIR", type=path_argument)
    listing.add_argument("--verify", action="store_true", help="read every file and compare it with its checksum")
    listing.set_defaults(run=run_checkpoints)

    report = commands.add_parser("report", help="tables and plots of one run, or of several overlaid")
    report.add_argument("places", metavar="RUN_DIR", type=path_argument, nargs="+")
    report.add_argument("--out", type=path_argument, help="folder to write to (default: the run's folder; report/ for several)")
    report.set_defaults(run=run_report)

    cli_traffic.add_command(commands)
    cli_plan.add_command(commands)
    cli_slurm.add_commands(commands, Parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 done, 2 bad configuration, 75 stopped with a checkpoint written, 1 anything else."""
    options, rest = build_parser().parse_known_args(arguments)
    try:
        return options.run(options, rest)
    except ConfigError as error:
        if not _runs_in_ranks(options) or _speaks_as(error.speaker if isinstance(error, RankError) else 0):
            print(f"relora-ds: error: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    except StartError as error:
        if is_main():
            print(f"relora-ds: error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except (RestartError, SlurmError) as error:
        print(f"relora-ds: error: {error}", file=sys.stderr)
        return EXIT_FAILED


def _runs_in_ranks(options: argparse.Namespace) -> bool:
    """Whether a launcher starts this command many times. Others speak wherever they are called, also in a shell that has a RANK."""
    return options.command in ("train", "traffic") or getattr(options, "slurm_command", None) == "torchrun"


def is_main() -> bool:
    """Whether this process speaks for the job: what every rank finds, one of them says."""
    return _speaks_as(0)


def _speaks_as(rank: int) -> bool:
    """Whether this process is the one to speak; it is where nobody knows its rank."""
    try:
        place = places.discover()
    except ConfigError:
        return True
    return place is None or place.rank == rank


def run_prepare(options: argparse.Namespace, rest: Sequence[str]) -> int:
    refuse_rest(rest)
    from relora_ds.data.prepare import prepare, tell_left_out

    index = prepare(
        options.source, options.out, tokenizer=options.tokenizer, vocab_size=options.vocab_size, text_column=options.text_column,
        config_name=options.config_name, split=options.split, holdout=options.holdout, max_documents=options.max_documents,
        seed=options.seed,
    )  # fmt: skip
    for split, content in index["splits"].items():
        print(f"{options.out}/{content['file']}: {content['tokens']:,} tokens of {content['documents']:,} documents ({split})")
    if left_out := tell_left_out(index):
        print(left_out)
    return EXIT_DONE


def run_train(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """In the launching process: check, then start the ranks. In a rank: check, join the others, train."""
    overrides = with_rest(options.overrides, rest, ["--nproc", "--under", "--allow-changed", "--trust"])
    libraries.quiet_libraries()
    place = places.launched(options.under)
    launcher.check_nproc(options.nproc, place)
    if place is None:
        return _train_here(options, load(options.recipe, overrides), overrides)
    recipe, stop, checked, refusal = None, None, None, None
    try:
        recipe = load(options.recipe, overrides)
        stop = StopSignal(recipe.train.stop_signal)  # before the slow imports: until then a signal ends the process
        checked = _check(options, recipe, place.world_size)
    except ConfigError as error:
        refusal = error  # for all ranks to hear: others may find nothing wrong
    return _train_rank(recipe, checked, place, stop, refusal)


def _train_here(options: argparse.Namespace, recipe: Config, overrides: Sequence[str]) -> int:
    """Without a launcher: one process, or as many as are asked for."""
    from relora_ds.training.preflight import refuse_busy

    num_processes = options.nproc or launcher.default_num_processes()
    refuse_unwritable("run.dir", Path(recipe.run.dir))
    refuse_busy(recipe, environment.attempt())
    checked = _check(options, recipe, num_processes)
    launcher.check_devices(num_processes)
    if num_processes == 1:
        return _train_rank(recipe, checked, places.single(), StopSignal(recipe.train.stop_signal))
    print(f"[relora-ds] starting {num_processes} processes", file=sys.stderr, flush=True)
    words = ["train", options.recipe, *overrides, *cli_slurm.insisted(options)]
    return launcher.spawn(words, num_processes, stop_signal=recipe.train.stop_signal)


def _check(options: argparse.Namespace, recipe: Config, num_processes: int) -> Checked:
    """Judges the recipe, and makes bf16 safe on this CPU before any product is formed. Raises ConfigError."""
    from relora_ds.ds_config import fit as ds_config
    from relora_ds.training.preflight import check

    checked = check(recipe, Path(options.recipe), num_processes, options.allow_changed, options.trust)
    if ds_config.precision(checked.deepspeed) == "bf16" and not cuda_here() and (done := libraries.guard_bf16()) and is_main():
        print(f"[relora-ds] {done}", file=sys.stderr, flush=True)
    return checked


def _train_rank(
    recipe: Config | None,
    checked: Checked | None,
    place: places.Place,
    stop: StopSignal | None,
    refusal: ConfigError | None = None,
) -> int:
    """This process is a rank: join the others, train, and leave together. ``refusal``: why it cannot, instead of what it checked."""
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
        return _train_together(checked, place, device, stop)
    except ConfigError as error:
        found = process_group.of_all_or_one(error, place)
        _tell_end(recipe, place, found)
        raise found from None


def _train_together(checked: Checked, place: places.Place, device: Any, stop: StopSignal) -> int:
    """Trains; what ends a run in order, on all ranks, becomes its exit code."""
    from relora_ds.checkpoint.universal import ConversionError
    from relora_ds.checkpoint.writer import FencedError
    from relora_ds.training.loop import TrainingError, train

    message, is_final = "", True
    try:
        code = train(checked, place, device, stop)
    except (TrainingError, FencedError, ConversionError) as error:
        message, code = str(error), EXIT_FAILED
        is_final = isinstance(error, TrainingError)  # another start may convert, and a folder that was lost is another job's
        if place.is_main:
            print(f"relora-ds: error: {error}", file=sys.stderr)
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


def run_eval(options: argparse.Namespace, rest: Sequence[str]) -> int:
    refuse_rest(rest)
    refuse_below("--max-tokens", options.max_tokens, 1)
    refuse_below("--batch-size", options.batch_size, 1)
    libraries.quiet_libraries()
    import torch

    from relora_ds.checkpoint.reader import locate
    from relora_ds.data.token_dataset import TokenDataset
    from relora_ds.models.export import load_merged
    from relora_ds.training.evaluate import evaluate

    libraries.guard_bf16()
    folder, checkpoint = locate(options.place)
    settings = folder.read_config()
    tokens = options.data or Path(settings.data.path)
    if not tokens.is_dir() and options.data is None:
        raise ConfigError("--data", None, f"the run's tokens are not in {tokens} any more", "name the folder where they are")
    data = TokenDataset(tokens, "validation", settings.data.sequence_length, shuffle=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_merged(checkpoint, device=device, attention=settings.model.attention, trust=options.trust)
    result = evaluate(
        model, data, batch_size=options.batch_size or settings.train.micro_batch, device=device,
        max_tokens=options.max_tokens or settings.train.eval_tokens,
    )  # fmt: skip
    print(f"{checkpoint}: loss {result.loss:.6f}, perplexity {result.perplexity:.4f} over {result.tokens:,} validation tokens")
    return EXIT_DONE


def run_export(options: argparse.Namespace, rest: Sequence[str]) -> int:
    refuse_rest(rest)
    libraries.quiet_libraries()
    from relora_ds.ds_config.fit import DTYPES
    from relora_ds.models.export import export_adapter, export_model

    write = export_adapter if options.adapter else export_model
    dtype = DTYPES[options.dtype] if options.dtype else None
    print(f"wrote {write(options.place, options.out, dtype=dtype, trust=options.trust)}")
    return EXIT_DONE


def run_checkpoints(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Prints the table; exit code 1 when something is damaged."""
    refuse_rest(rest, ["--verify"])
    libraries.quiet_libraries()
    from relora_ds.checkpoint.listing import listing
    from relora_ds.run.folder import RunFolder

    lines, is_whole = listing(RunFolder(options.place), deep=options.verify)
    print("\n".join(lines))
    return EXIT_DONE if is_whole else EXIT_FAILED


def run_report(options: argparse.Namespace, rest: Sequence[str]) -> int:
    refuse_rest(rest)
    from relora_ds.reports.report import report

    print(f"wrote {report(options.places, options.out)}")
    return EXIT_DONE


def entry_point() -> NoReturn:
    command: Callable[[], int] = main
    sys.exit(command())


if __name__ == "__main__":
    entry_point()
