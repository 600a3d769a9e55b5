"""``relora-ds slurm …``: options, and which function serves them."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from relora_ds.cli.options import Parser, add_insisting, add_recipe, insisted, new_command
from relora_ds.config import Config, load
from relora_ds.console import say
from relora_ds.environment import allocation, attempt, node_name, process_environment
from relora_ds.errors import EXIT_BAD_CONFIG, EXIT_DONE, EXIT_STOPPED, ConfigError, refuse_below, refuse_rest, with_rest
from relora_ds.launch import libraries, places, process_group
from relora_ds.paths import path_argument, text_argument
from relora_ds.run.folder import RunFolder
from relora_ds.slurm.script import (
    SITE_FILE,
    RequeueBy,
    Settings,
    check_environment_file,
    check_signal,
    describe,
    doubts,
    option_name,
    read_site,
    settings,
)

HELP = {
    "nodes": ("N|N-M", "Nodes of the job. With a range, as 2-4, it goes on with fewer after a node has failed."),
    "gpus_per_node": ("N|TYPE:N", "GPUs of a node, as 8 or a100:8; 0 for none. Needed, unless --tasks-per-node is given."),
    "gpu_request": ("", "How SLURM is asked for the GPUs: by --gpus-per-node, by --gres, or not at all."),
    "tasks_per_node": ("N", "Ranks of a node. Default: one per GPU."),
    "cpus_per_task": ("N", "CPU cores of a rank. Default: the site's, often 1."),
    "mem": ("SIZE", "Memory of a node, as 512G; 0 for all of it. Default: the site's."),
    "time": ("TIME", "Time limit of one start, as 24:00:00 or 2-00:00. Default: the partition's."),
    "partition": ("PARTITION", "The partition to run in. Default: the site's."),
    "account": ("ACCOUNT", "The account to charge. Default: your default account."),
    "qos": ("QOS", "The quality of service to ask for. Default: the site's."),
    "constraint": ("FEATURES", "Features that the nodes must have, as sbatch takes them. Default: none."),
    "exclude": ("NODES", "Nodes not to use, as node[3,7]. Default: none."),
    "job_name": ("NAME", "The name of the job. Default: the recipe's."),
    "launcher": ("", "What starts the ranks."),
    "signal": ("", "The signal that asks the ranks to stop before the time limit. Default: the recipe's train.stop_signal."),
    "signal_before": ("SECONDS", "How long before the time limit that signal is sent."),
    "requeue_by": ("", "How the job starts again: by scontrol requeue, as a job that waits for its end, or not at all."),
    "max_stalled": ("N", "Starts in a row without a newer checkpoint that end the job."),
    "setup": ("LINE", "A shell line to run before all else, as 'module load cuda'. May be given several times."),
    "environment_file": ("FILE", "A file of NAME=VALUE lines, which all processes get. Default: none."),
    "container": ("COMMAND", "What to put before the training command, as 'apptainer exec --nv image.sif'. Default: nothing."),
    "container_python": ("PATH", "The Python inside the container. Default: python."),
    "python": ("PATH", "The Python on the nodes. Default: the one that runs this command."),
    "sbatch_args": ("OPTION", "One more option of sbatch, as --sbatch-args=--reservation=week. May be given several times."),
    "srun_args": ("OPTION", "One more option of srun, or of mpirun. May be given several times."),
}
"""For each field of :class:`Settings`: what its value is called in the usage (nothing: its choices), and its help. What the field
has as a default is added to the help where that does not say it."""
AWAY_S, AWAY_PAUSE_S = 300.0, 5.0
"""How long, and how far apart, the end of a start looks for its recipe."""
PLACE = "The folder of the run (run.dir of its recipe), or the recipe."


def add_commands(parent: Any) -> None:
    """Adds ``slurm`` and its commands to the parser of ``relora-ds``."""
    slurm = parent.add_parser(
        "slurm",
        help="Submit to a SLURM cluster, and look after the job.",
        description="Submit to a SLURM cluster, and look after the job.",
        epilog="Examples:\n  relora-ds slurm submit recipes/llama_1b.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00\n"
        "  relora-ds slurm status runs/llama_1b",
    )
    commands = slurm.add_subparsers(dest="slurm_command", required=True, metavar="COMMAND", parser_class=Parser)
    _add_submit(commands)
    new_command(
        commands, "status", run_status, "Show the job's state and the run's progress.",
        examples=["relora-ds slurm status runs/llama_1b"],
    )  # fmt: skip
    logs = new_command(
        commands, "logs", run_logs, "Show the last lines of the job's output.",
        examples=["relora-ds slurm logs --follow runs/llama_1b"],
    )  # fmt: skip
    cancel = new_command(
        commands, "cancel", run_cancel, "Let the ranks write a checkpoint, then end the job for good.",
        about="Submit the recipe again to resume the run.", examples=["relora-ds slurm cancel runs/llama_1b"],
    )  # fmt: skip
    for command in map(commands.choices.get, ("status", "logs", "cancel")):
        command.add_argument("place", metavar="RUN_DIR|RECIPE", type=path_argument, help=PLACE)
    logs.add_argument("--follow", "-f", action="store_true", help="Show what is written from now on, too, until the job ends.")
    logs.add_argument("--lines", "-n", metavar="N", type=int, default=40, help="Lines to show. Default: %(default)s.")
    cancel.add_argument(
        "--wait", metavar="SECONDS", type=float, default=120.0,
        help="How long the ranks may take for the checkpoint; 0 to end the job at once. Default: %(default)g.",
    )  # fmt: skip

    hostfile = new_command(
        commands, "hostfile", run_hostfile, "Print the nodes of an allocation as the deepspeed launcher reads them.",
        examples=["relora-ds slurm hostfile --slots 8 > hostfile"],
    )  # fmt: skip
    hostfile.add_argument("--slots", metavar="N", type=int, required=True, help="Processes of a node.")
    hostfile.add_argument("--job", metavar="ID", type=int, help="The job's id. Default: the allocation that this runs in.")
    _add_inside(commands)


def _add_submit(commands: Any) -> None:
    submit = new_command(
        commands, "submit", run_submit, "Check a recipe, write its batch script, and submit it.",
        about="""\
The job stops with a checkpoint before its time limit and requeues itself until
the last update. Every option from --nodes on may stand in the site file instead,
with _ for -.""",
        examples=[
            "relora-ds slurm submit recipes/llama_1b.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00",
            "relora-ds slurm submit recipes/llama_1b.yaml --nodes 2-4 optimizer.lr=3e-4 --dry-run",
        ],
    )  # fmt: skip
    add_recipe(submit)
    submit.add_argument("--dry-run", action="store_true", help="Print the batch script; write and submit nothing.")
    submit.add_argument(
        "--no-check", action="store_true",
        help="Leave the check of the recipe to the job, where this machine is too small for torch.",
    )  # fmt: skip
    submit.add_argument(
        "--site", metavar="FILE", type=path_argument,
        help=f"YAML file with what is the same for all of your jobs. Default: ~/{SITE_FILE}.",
    )  # fmt: skip
    add_insisting(submit)
    for name, field in Settings.model_fields.items():
        _add_setting(submit, name, field)


def _add_setting(parser: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
    """One option for one field of :class:`Settings`, which judges the value."""
    metavar, text = HELP[name]
    kind = str(field.annotation)
    taken: dict[str, Any] = {"action": "append"} if "list" in kind else {"type": int} if "int" in kind else {}
    taken |= {"metavar": metavar} if metavar else {"choices": typing.get_args(field.annotation)}
    if field.default not in (None, PydanticUndefined) and "Default:" not in text:
        text += f" Default: {field.default}."
    parser.add_argument(option_name(name), default=argparse.SUPPRESS, help=text, **taken)


def _add_inside(commands: Any) -> None:
    """What the batch scripts call: not in the list of commands, since it has no help."""
    before, after, torchrun = (commands.add_parser(name) for name in ("before", "after", "torchrun"))
    for command, run in ((before, run_before), (after, run_after), (torchrun, run_torchrun)):
        command.add_argument("recipe", metavar="RECIPE", type=text_argument)
        command.set_defaults(run=run)
    for command in (before, torchrun):
        command.add_argument("--tasks-per-node", type=int, required=True)
        add_insisting(command)
    before.add_argument("--probe", metavar="COMMAND")  # must run where the ranks are to: a container's interpreter
    after.add_argument("--code", type=int, required=True)  # of what started the ranks
    for command in (before, after):
        command.add_argument("--requeue-by", choices=typing.get_args(RequeueBy), default="requeue")
    after.add_argument("--max-stalled", type=int, default=3)


def read_place(place: Path) -> Config:
    """The recipe of a run's folder, or of a file. Raises ConfigError."""
    if not place.is_dir():
        return load(place, [])
    run = RunFolder(place)
    submitted = run.slurm / "recipe.yaml"
    config = load(submitted, []) if submitted.is_file() and not run.config.is_file() else run.read_config()
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": str(place)})})


def run_submit(options: argparse.Namespace, rest: Sequence[str]) -> int:
    overrides = with_rest(options.overrides, rest, options.known())
    site = options.site or Path.home() / SITE_FILE
    if options.site is not None and not site.is_file():
        raise ConfigError("--site", str(site), "no such file", "name a YAML file, or leave it out")
    given = {name: value for name, value in vars(options).items() if name in Settings.model_fields}
    found = settings(read_site(site), given, site)
    config = load(options.recipe, overrides)
    if "signal" not in found.model_fields_set:
        found = found.model_copy(update={"signal": config.train.stop_signal})
    elif found.signal not in ("TERM", "INT"):  # those stop every run
        config = config.model_copy(update={"train": config.train.model_copy(update={"stop_signal": found.signal})})
    check_signal(found)
    for doubt in doubts(found):
        say(doubt)
    workdir = Path.cwd()
    from relora_ds.slurm import commands as slurm

    name = Path(options.recipe).stem
    if not options.dry_run:
        from relora_ds.slurm import client as slurm_client

        slurm_client.need("sbatch")
    environment = process_environment()  # before the libraries below add to it
    check_environment_file(found, environment)
    deepspeed = check_sizes(config, found, options)
    text = slurm.script(config, found, recipe_name=name, workdir=workdir, insisted=insisted(options))
    if options.dry_run:
        print(text, end="")
        return EXIT_DONE
    job, output = slurm.submit(config, found, deepspeed, text, workdir=workdir, environment=environment)
    print(f"submitted job {job}: {describe(found)}, into {config.run.dir}")
    print(f"  relora-ds slurm status {config.run.dir}     state, update, speed, ETA")
    print(f"  relora-ds slurm logs -f {config.run.dir}    its output ({output})")
    print(f"  relora-ds slurm cancel {config.run.dir}     a checkpoint, then the end; submit again to resume")
    return EXIT_DONE


def check_sizes(config: Config, found: Settings, options: argparse.Namespace) -> dict[str, Any]:
    """Judges the recipe for the most nodes of the range, unless that is left to the job; returns DeepSpeed's JSON as the recipe
    names it. Raises ConfigError."""
    from relora_ds.ds_config.file import read

    recipe, ranks = Path(options.recipe), found.node_range[1] * found.ranks_per_node
    if not options.no_check:
        libraries.quiet_libraries()
        from relora_ds.training.preflight import check

        check(config, recipe, ranks, options.allow_changed, options.trust, on_cuda=found.num_gpus > 0)
    return dict(read(config.deepspeed, recipe.resolve().parent, recipe.resolve().parent.parent))


def run_status(options: argparse.Namespace, rest: Sequence[str]) -> int:
    refuse_rest(rest, options.known())
    from relora_ds.slurm import commands as slurm

    for line in slurm.status(read_place(options.place)):
        print(line)
    return EXIT_DONE


def run_logs(options: argparse.Namespace, rest: Sequence[str]) -> int:
    refuse_rest(rest, options.known())
    refuse_below("--lines", options.lines, 0)
    from relora_ds.slurm import client as slurm_client
    from relora_ds.slurm import commands as slurm

    config = read_place(options.place)
    path = slurm.log_file(config)

    def is_over() -> bool:
        events, number = slurm.known_job(RunFolder(Path(config.run.dir)))
        job = slurm_client.job(number, events.cluster(number))
        return job is None or job.is_over

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    slurm.tail(path, options.lines, write, is_over if options.follow else None)
    return EXIT_DONE


def run_cancel(options: argparse.Namespace, rest: Sequence[str]) -> int:
    refuse_rest(rest, options.known())
    refuse_below("--wait", options.wait, 0)
    from relora_ds.slurm import commands as slurm

    config = read_place(options.place)
    slurm.cancel(config, wait_s=options.wait, stop_signal=config.train.stop_signal, say=say)
    return EXIT_DONE


def run_hostfile(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Prints it; redirect it into the file that ``deepspeed --hostfile`` gets."""
    refuse_rest(rest, options.known())
    refuse_below("--slots", options.slots, 1)
    from relora_ds.slurm.nodes import hostfile, hosts, nodes_of_job

    here = allocation()
    if options.job is None and here is None:
        raise ConfigError("--job", None, "this is not inside an allocation", "name a job that runs")
    nodes = nodes_of_job(options.job) if options.job is not None else list(hosts(here or ""))
    print(hostfile(nodes, options.slots), end="")
    return EXIT_DONE


def run_before(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Prints the number of nodes for the step, and how often the job was requeued; all else goes to the standard error."""
    refuse_rest(rest, options.known())
    environment = process_environment()
    _refuse_shape(environment)
    from relora_ds.slurm import job as slurm_job

    def fits(nodes: int) -> None:
        libraries.quiet_libraries()  # here: a start on as many nodes as before needs no torch, and is there seconds sooner
        from relora_ds.training.preflight import check

        # What needs a GPU is left to the ranks where none is seen: they may run in a container, and this does not.
        ranks = nodes * options.tasks_per_node
        check(config, Path(options.recipe), ranks, options.allow_changed, options.trust, on_cuda=True)

    def probe() -> None:
        if options.probe is not None:
            try_container(options.probe, environment)

    try:
        with redirect_stdout(sys.stderr):  # whatever a library prints must not come between
            attempt = slurm_job.confirmed(this_attempt())
            if attempt.restart and not Path(options.recipe).is_file():
                slurm_job.leave_node(attempt, node_name(), say)
            config = load(options.recipe, [])
            nodes = slurm_job.before(
                config, attempt, fits, requeue_by=options.requeue_by, say=say, environment=environment, probe=probe
            )
    except slurm_job.ExcludedError as error:
        say(str(error))
        return EXIT_STOPPED
    print(nodes, attempt.restart)
    return EXIT_DONE


def _refuse_shape(environment: Mapping[str, str]) -> None:
    """Raises ConfigError in a job of several components or tasks: SLURM requeues them together, and they want the same folder."""
    if "SLURM_HET_SIZE" in environment:
        problem = "jobs of several components are not served"
        raise ConfigError("SLURM_HET_SIZE", environment["SLURM_HET_SIZE"], problem, "ask for nodes of one kind")
    if task := environment.get("SLURM_ARRAY_TASK_ID"):
        raise ConfigError("SLURM_ARRAY_TASK_ID", task, "a run is one job, not an array", "submit each recipe by itself")


def try_container(command: str, environment: Mapping[str, str]) -> None:
    """Raises ConfigError where a shell command that only tells the version fails: relora_ds is not there in the container."""
    done = subprocess.run(
        ["bash", "-c", command], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).strip().splitlines()[-1:]) or f"code {done.returncode}"
        way_out = "install relora_ds in the image, bind the folder it is in, or name --container-python"
        raise ConfigError("--container", command, f"relora_ds does not start in it: {said}", way_out)


def run_after(options: argparse.Namespace, rest: Sequence[str]) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM ends this script as soon as the job is requeued
    refuse_rest(rest, options.known())
    from relora_ds.slurm import job as slurm_job

    if options.code not in (EXIT_DONE, EXIT_BAD_CONFIG, EXIT_STOPPED):
        await_recipe(Path(options.recipe))
    attempt = slurm_job.confirmed(this_attempt(), slurm_job.OUTAGE_S)
    return slurm_job.after(
        load(options.recipe, []),
        attempt,
        options.code,
        requeue_by=options.requeue_by,
        max_stalled=options.max_stalled,
        say=say,
    )


def await_recipe(recipe: Path) -> None:
    """Waits a while for a recipe that was there when this start began: what ended its ranks may be a file system that is away."""
    deadline, is_told = time.monotonic() + AWAY_S, False
    while not os.path.isfile(recipe) and time.monotonic() < deadline:  # noqa: PTH113  # Path.is_file raises where the disk fails
        if not is_told:
            say(f"waiting up to {AWAY_S:.0f} s for {recipe}, which is away")
        is_told = True
        time.sleep(AWAY_PAUSE_S)


def this_attempt() -> Any:
    """Raises ConfigError outside a job."""
    from relora_ds.slurm.job import Attempt
    from relora_ds.slurm.nodes import hosts

    job, _, restart = attempt().partition(".")
    if not job:
        raise ConfigError("SLURM_JOB_ID", None, "this is not inside a SLURM job", "it is called by the batch scripts of slurm/")
    return Attempt(int(job), int(restart), tuple(hosts(allocation() or "")))


def run_torchrun(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Runs torchrun's agent of this node, of as many as srun started."""
    refuse_rest(rest, options.known())
    from relora_ds.launch.torchrun_agent import run_agent

    node = places.discover()
    if node is None:
        raise ConfigError(
            "SLURM_STEP_ID", None, "this is not inside a step of srun", "it is called by the batch scripts of slurm/"
        )
    node = process_group.find_master(node)
    words = [
        f"--nnodes={node.world_size}", f"--node-rank={node.rank}", f"--nproc-per-node={options.tasks_per_node}",
        f"--master-addr={node.master_addr}", f"--master-port={node.master_port}",
        "--module", "relora_ds", "train", options.recipe, *insisted(options),
    ]  # fmt: skip
    return run_agent(words, load(options.recipe, []).train.stop_signal)
