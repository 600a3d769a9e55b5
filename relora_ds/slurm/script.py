"""What a SLURM job is asked for, and the batch script that follows from it.

The script trains one recipe to its last update over as many requeues as it takes. What happens before and after the training step is
decided in :mod:`relora_ds.slurm.job`; the script itself only starts things and waits.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from relora_ds.config import Positive, Section, explain
from relora_ds.errors import ConfigError
from relora_ds.paths import LocalPath
from relora_ds.slurm.sbatch_environment import option_of
from relora_ds.text.yaml_text import read_yaml_file

SITE_FILE = Path(".config/relora-ds/slurm.yaml")
"""Under the home directory: the settings that are the same for all jobs of a user on a cluster."""

Launcher = Literal["srun", "torchrun", "mpi"]
RequeueBy = Literal["requeue", "dependency", "none"]
GpuRequest = Literal["gpus-per-node", "gres", "none"]
Lines = Annotated[list[str], Field(default_factory=list)]


FILLED_IN = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\}|[\d$?!@*#-])")
"""What a shell puts a variable's value for; ``${NAME:-…}`` says itself what else."""


class Settings(Section):
    """What ``relora-ds slurm submit`` takes as options, with ``-`` for ``_``, and the site file as keys."""

    nodes: Annotated[str, Field(pattern=r"^[1-9]\d*(-[1-9]\d*)?$", examples=["2", "2-4"])] = "1"
    """A number, or a range such as 2-4: after a node failure the job goes on with fewer nodes rather than wait."""
    gpus_per_node: Annotated[str | None, Field(pattern=r"^([\w.-]+:)?\d+$", examples=["8", "a100:8"])] = None
    """8, or with a type, a100:8; 0 on a cluster without GPUs."""
    gpu_request: GpuRequest = "gpus-per-node"
    """How sbatch is asked for them: --gpus-per-node=8, --gres=gpu:8, or not at all where a node is given with all that is in it."""
    tasks_per_node: Positive | None = None
    """Ranks on a node; left out: one per GPU."""
    cpus_per_task: Positive | None = None
    mem: str | None = None
    """Memory of a node, as sbatch takes it: 512G, or 0 for all."""
    time: str | None = None
    """Limit of one start of the run, as sbatch takes it: 24:00:00, 2-00:00. Left out: the partition's."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    """Nodes not to use."""
    job_name: str | None = None
    """Left out: the name of the recipe's file."""
    launcher: Launcher = "srun"
    """srun starts one process per GPU; torchrun one agent per node, which starts them; mpi: mpirun."""
    signal: Literal["USR1", "USR2", "TERM", "INT", "HUP"] = "USR2"
    """Sent to all ranks before the time limit: they finish the update, write a checkpoint and end."""
    signal_before: Annotated[int, Field(ge=30, le=65535)] = 300
    """So many seconds before the limit: more than an update, an evaluation and a checkpoint take. SLURM looks only twice a minute."""
    requeue_by: RequeueBy = "requeue"
    """requeue: scontrol requeue. dependency: submit a successor, where users may not requeue. none: leave it to the user."""
    max_stalled: Positive = 3
    """So many attempts in a row without a newer checkpoint end the job."""
    setup: Lines
    """Shell lines before anything else runs: module load …, source …/activate. The first that fails ends the job."""
    environment_file: LocalPath | None = None
    """A file of NAME=VALUE lines that all processes get, as a shell reads them."""
    container: str | None = None
    """Words before the training command, e.g. apptainer exec --nv image.sif. What runs before and after training runs outside."""
    container_python: str | None = None
    """The interpreter inside the container; left out: python. Given without ``container``, it is used for training alike: srun's
    own options may name an image."""
    python: LocalPath | None = None
    """The interpreter on the nodes; left out: the one that submits. With a container, for what runs outside of it."""
    sbatch_args: Lines
    """More options of sbatch, one each: --reservation=week."""
    srun_args: Lines
    """More options of srun (or of mpirun, with launcher: mpi), one each."""

    @property
    def node_range(self) -> tuple[int, int]:
        """The fewest and the most nodes."""
        fewest, _, most = self.nodes.partition("-")
        return int(fewest), int(most or fewest)

    @property
    def num_gpus(self) -> int:
        """On a node."""
        return int((self.gpus_per_node or "0").rpartition(":")[2])

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.num_gpus


def read_site(path: Path) -> dict[str, Any]:
    """The keys of a site file; none where there is no file. Raises ConfigError for what is not a mapping."""
    if not path.is_file():
        return {}
    content = read_yaml_file(path, "slurm.yaml")
    if not isinstance(content, dict | None):
        raise ConfigError("slurm.yaml", str(path), "must hold keys and values", "partition: gpu, for example")
    return content or {}


def settings(site: dict[str, Any], options: dict[str, Any], site_path: Path = SITE_FILE) -> Settings:
    """The site's settings with the command line's over them.

    Raises:
        ConfigError: an unknown key, a value that cannot be used, or no word on how many ranks a node gets.
    """
    site = {
        key: str(value) if key in ("nodes", "gpus_per_node", "time", "mem") and value is not None else value
        for key, value in site.items()
    }
    try:
        Settings.model_validate(site)
    except ValidationError as error:
        raise explain(error, Settings, site, prefix=(str(site_path),)) from None
    try:
        found = Settings.model_validate({**site, **options})
    except ValidationError as error:
        complaint = explain(error, Settings, options)
        raise ConfigError(option_name(complaint.key), complaint.value, complaint.problem) from None
    _check(found)
    return found


def option_name(key: str) -> str:
    return "--" + key.replace("_", "-")


def _check(found: Settings) -> None:
    fewest, most = found.node_range
    if fewest > most:
        raise ConfigError("--nodes", found.nodes, "the range is the wrong way round", f"--nodes {most}-{fewest}")
    if found.gpus_per_node is None and found.tasks_per_node is None:
        raise ConfigError("--gpus-per-node", None, "is required", "give it, or --tasks-per-node on a cluster without GPUs")
    if not found.ranks_per_node:
        raise ConfigError("--tasks-per-node", None, "is required where there are no GPUs")
    limit_s, own = seconds(found.time or ""), {"signal", "time"} & set(map(option_of, found.sbatch_args))
    if limit_s is not None and limit_s <= found.signal_before and not own:
        problem = f"--time={found.time} is {limit_s} s: the ranks would be asked to stop as they start"
        raise ConfigError("--signal-before", found.signal_before, problem, "take less, or more --time")
    if found.num_gpus and found.ranks_per_node > found.num_gpus:
        raise ConfigError("--tasks-per-node", found.tasks_per_node, f"more than the {found.num_gpus} GPU(s) of a node")
    for key, value in found.model_dump().items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and ("\n" in text or "\0" in text):
                raise ConfigError(option_name(key), text, "must be one line")
    for key, texts in (("--sbatch-args", found.sbatch_args), ("--srun-args", found.srun_args)):
        for text in texts:
            _check_shape(key, text)
    for text in found.sbatch_args:
        if not text.startswith("-"):
            raise ConfigError("--sbatch-args", text, "is no option of sbatch", "write it with its dashes: --reservation=week")


def seconds(limit: str) -> int | None:
    """Seconds of a time limit as sbatch reads it: ``minutes``, ``minutes:seconds``, ``hours:minutes:seconds``,
    ``days-hours[:minutes[:seconds]]``; None for what is no limit (0, UNLIMITED), or no time."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if found is None:
        return None
    days, *times = (None if part is None else int(part) for part in found.groups())
    given = [part for part in times if part is not None]
    hours, minutes, rest = [*given, 0, 0][:3] if days is not None or len(given) == 3 else [0, *given, 0][:3]
    return (((days or 0) * 24 + hours) * 60 + minutes) * 60 + rest or None


def _check_shape(key: str, text: str) -> None:
    """Raises ConfigError for an option that makes several jobs of one."""
    if option_of(text) == "array":
        raise ConfigError(key, text, "a run is one job, not an array", "submit each recipe by itself")
    if text in (":", "hetjob", "packjob") or option_of(text) in ("het-group", "pack-group"):
        raise ConfigError(key, text, "jobs of several components are not served", "ask for nodes of one kind")


def check_signal(found: Settings) -> None:
    """Raises ConfigError for a signal that the launcher does not hand on to the ranks."""
    if found.launcher == "mpi" and found.signal not in ("USR1", "USR2"):
        problem = "mpirun ends the ranks upon it, or keeps it to itself"
        raise ConfigError("--signal", found.signal, problem, "USR1 or USR2, and train.stop_signal alike")


def check_environment_file(found: Settings, known: Collection[str]) -> None:
    """Raises ConfigError for a line of the environment file of which the script's shell would make something else than it says.

    Where the file cannot be read from here, it is left to the job.

    Args:
        found: the job's settings.
        known: names of the variables that are set.
    """
    if found.environment_file is None:
        return
    try:
        lines = Path(found.environment_file).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    names = set(known)
    for number, line in enumerate(lines, start=1):
        if problem := _misread(line, names):
            where = f"line {number} of {found.environment_file}"
            way_out = "write NAME='VALUE' for a value as it stands; what needs a shell belongs into --setup"
            raise ConfigError("--environment-file", line.partition("=")[0].strip(), f"{where} {problem}", way_out)


def _misread(line: str, names: set[str]) -> str:
    """What is wrong with a line of NAME=VALUE as a shell reads it, "" where nothing is; adds to the ``names`` that are set."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:
        return "has a quote that stays open"
    for word in words[words[:1] == ["export"] :]:
        name, equals, _ = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
            return f"goes on with {word!r} after its value" if word != words[0] else "is not NAME=VALUE"
        names.add(name)
    for match in FILLED_IN.finditer(re.sub(r"'[^']*'|\\.", "", line.partition(" #")[0])):
        name = match[1] or match[2] or ""
        if name not in names and not name.startswith("SLURM"):
            return f"holds {match[0]}, which a shell fills in, and which is not set"
    return ""


def doubts(found: Settings) -> list[str]:
    """What is likely not meant, in a line each."""
    options = {option_of(word) for word in found.sbatch_args}
    if found.num_gpus and found.cpus_per_task is None and not options & {"cpus-per-task", "cpus-per-gpu", "c"}:
        return ["without --cpus-per-task SLURM gives each rank one core, which is too little to feed a GPU"]
    return []


def render(
    found: Settings, *, recipe: str, output: str, workdir: str | None = None, name: str = "", insisted: Sequence[str] = ()
) -> str:
    """The batch script.

    Args:
        found: what to ask for.
        recipe: path of the recipe on the nodes, absolute or under the working directory.
        output: file that the job's output is appended to; sbatch's patterns such as %j are kept.
        workdir: where the job runs; None: where sbatch is called.
        name: of the job, where the settings name none.
        insisted: more words for ``relora-ds train``.
    """
    directives = [f"#SBATCH {option}" for option in _options(found, output, workdir, found.job_name or name)]
    python, requeue = found.python or "python", f"--requeue-by {found.requeue_by}"
    more = "".join(f" {shlex.quote(word)}" for word in insisted)
    parts = [
        "\n".join(["#!/bin/bash", *directives]),
        _ABOUT.format(signal=found.signal, before=found.signal_before, how=_HOW[found.requeue_by]),
        "\n".join(f"{name}={value}" for name, value in _variables(found, recipe, python).items()),
        "\n".join(_surroundings(found)),
        _BEFORE.format(
            before=f'{_relora("slurm before")} --tasks-per-node "$tasks_per_node" {requeue}{_probe(found)}{more}',
            step=_step(found, more),
            heard=f"TERM {found.signal}" if found.launcher == "mpi" else "TERM",
        ),
        _AFTER.format(after=f'{_relora("slurm after")} --code "$code" {requeue} --max-stalled {found.max_stalled}'),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _variables(found: Settings, recipe: str, python: str) -> dict[str, object]:
    inner = {"container_python": shlex.quote(found.container_python or "python")} if _has_container(found) else {}
    return {"recipe": shlex.quote(recipe), "python": shlex.quote(python), **inner, "tasks_per_node": found.ranks_per_node}


def _has_container(found: Settings) -> bool:
    """Whether the ranks have another file system than what runs around them, and so another interpreter."""
    return bool(found.container or found.container_python)


def _probe(found: Settings) -> str:
    """Has ``slurm before`` try whether relora_ds is there in the container."""
    if not found.container:
        return ""
    inner = shlex.quote(found.container_python or "python")
    return " --probe " + shlex.quote(f"{found.container} {inner} -m relora_ds --version")


def _relora(command: str, python: str = "python") -> str:
    return f'"${python}" -m relora_ds {command} "$recipe"'


def _options(found: Settings, output: str, workdir: str | None, name: str) -> list[str]:
    """sbatch's options, each a word. To SLURM a task is a rank, or torchrun's agent for all ranks of a node."""
    ranks, is_torchrun = found.ranks_per_node, found.launcher == "torchrun"
    given = {
        "job-name": name or None,
        "nodes": found.nodes,
        # left out for one: SLURM then gives as many nodes of a range as are free, and else (22.05) as few as it may
        "ntasks-per-node": ranks if ranks > 1 and not is_torchrun else None,
        "gpus-per-node": found.gpus_per_node if found.num_gpus and found.gpu_request == "gpus-per-node" else None,
        "gres": f"gpu:{found.gpus_per_node}" if found.num_gpus and found.gpu_request == "gres" else None,
        "cpus-per-task": (found.cpus_per_task or 1) * ranks if is_torchrun else found.cpus_per_task,
        "mem": found.mem,
        "time": found.time,
        "partition": found.partition,
        "account": found.account,
        "qos": found.qos,
        "constraint": found.constraint,
        "exclude": found.exclude,
        "chdir": workdir,
        "output": output,
        "open-mode": "append",
        # B: goes to this script, which hands it to mpirun, which hands it to the ranks; else SLURM signals the ranks
        "signal": f"{'B:' if found.launcher == 'mpi' else ''}{found.signal}@{found.signal_before}",
    }
    words = [f"--{key}={_word(value)}" for key, value in given.items() if value is not None]
    return [*words, "--requeue" if found.requeue_by == "requeue" else "--no-requeue", *found.sbatch_args]


def _word(value: object) -> str:
    text = str(value)
    return text if re.fullmatch(r"[\w@%+=:,./\[\]-]*", text) else '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


_ABOUT = """\
# Trains one recipe to its last update, over as many starts as that takes. {before} seconds before the time limit SLURM sends
# {signal} to the ranks: they finish the update, write a checkpoint and end with code 75. Then, as after a fault, the job
# {how}, until the run is done or makes no more progress."""
_HOW = {
    "requeue": "requeues itself",
    "dependency": "submits its successor",
    "none": "says how to resume",
}
_BEFORE = """\
# SLURM's TERM (preemption, an operator's requeue) reaches the ranks, too: this shell waits for them and then decides.
trap : {heard}

# Checks the recipe for these nodes; says over how many of them the global batch divides, and how often the job was requeued.
if found=$({before}); then
    read -r nodes SLURM_RESTART_COUNT <<<"$found"
    export SLURM_RESTART_COUNT
{step}
else
    code=$?
fi"""
_AFTER = """\
# Requeues, or not. Must come to its end although SLURM ends this script as soon as the job is requeued.
trap '' TERM
{after}"""


_SET_UP = """\
succeeded() {
    local code=$?
    [ "$code" = 0 ] || { echo "[relora-ds] error: this set-up line ended with code $code: $1" >&2; exit "$code"; }
}"""
_MODULE = "type module >/dev/null 2>&1 || source /etc/profile  # a function of login shells, which this one need not be"


def _surroundings(found: Settings) -> list[str]:
    set_up: list[str] = []
    for line in found.setup:
        is_command = not line.lstrip().startswith("#") and not line.endswith("\\")
        set_up += [line, f"succeeded {shlex.quote(line)}"] if is_command else [line]
    if found.environment_file:
        path = Path(found.environment_file)
        name = str(path) if path.is_absolute() else f"./{path}"  # without a slash, source would look on the PATH first
        line = f"source {shlex.quote(name)}"
        set_up += ["set -a", line, f"succeeded {shlex.quote(line)}", "set +a"]
    checks = [_SET_UP] if any(line.startswith("succeeded ") for line in set_up) else []
    module = [_MODULE] if any(re.match(r"\s*(module|ml)\s", line) for line in found.setup) else []
    cores = "${SLURM_CPUS_PER_TASK:-1}"
    if found.launcher == "torchrun":
        cores = "$((${SLURM_CPUS_PER_TASK:-$tasks_per_node} / tasks_per_node))"
    exports = [
        "export SLURM_EXPORT_ENV=ALL  # srun hands all of this on, also after sbatch --export=NONE",
        f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{cores}}}"',
    ]
    return [*checks, *module, *set_up, *exports]


def _step(found: Settings, insisted: str) -> str:
    """The lines that start the ranks and wait for their end; bash's ``wait`` ends early when a signal comes, hence the loop."""
    inside = "container_python" if _has_container(found) else "python"
    under = (
        "mpirun" if found.launcher == "mpi" else "srun"
    )  # or each rank would begin a run of its own where it lost its variables
    train = " ".join(filter(None, [found.container, _relora("train", inside), f"--under {under}"])) + insisted
    agent = " ".join(filter(None, [found.container, _relora("slurm torchrun", inside), '--tasks-per-node "$tasks_per_node"']))
    agent += insisted
    more, forward = "".join(f" {shlex.quote(word)}" for word in found.srun_args), ""
    cpus = '${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}'  # srun does not take it over from sbatch
    if found.launcher == "srun":
        tasks, what = '--ntasks="$((nodes * tasks_per_node))" --ntasks-per-node="$tasks_per_node"', train
    else:
        tasks, what = '--ntasks="$nodes" --ntasks-per-node=1', agent
    start = f'srun --nodes="$nodes" {tasks} --kill-on-bad-exit=1 \\\n        {cpus}{more} \\\n        {what} &'
    if found.launcher == "mpi":
        place = '-np "$((nodes * tasks_per_node))" --map-by "ppr:$tasks_per_node:node" --bind-to none'
        start = f"mpirun {place}{more} \\\n        {train} &"
        # mpirun hands this signal on to the ranks; upon TERM it would end them, and SLURM's TERM need not reach it at all
        forward = f"trap 'kill -s {found.signal} \"$!\"' {found.signal} TERM\n    "
    return f"""\
    {forward}{start}
    step=$!
    while true; do
        wait "$step"
        code=$?
        kill -0 "$step" 2>/dev/null || break
    done"""


TEMPLATES: dict[str, dict[str, Any]] = {
    "single_node": {"nodes": "1", "launcher": "srun"},
    "multi_node_srun": {"nodes": "2-4", "launcher": "srun"},
    "multi_node_torchrun": {"nodes": "2-4", "launcher": "torchrun"},
    "mpi": {"nodes": "2-4", "launcher": "mpi"},
}
"""The files in slurm/: settings of each, beside those that all have."""


def template(name: str) -> str:
    """The text of ``slurm/<name>.sbatch``, to be edited and submitted by hand."""
    common = {
        "gpus_per_node": "8",
        "cpus_per_task": 8,
        "time": "24:00:00",
        "setup": ["# module load cuda; source venv/bin/activate"],
    }
    found = settings({}, {**common, **TEMPLATES[name]})
    return render(found, recipe="recipes/llama_130m.yaml", output="relora-%j.out", name="llama_130m")


def describe(found: Settings) -> str:
    """What is asked for, in words: 2-4 nodes × 8 ranks, by srun."""
    nodes, ranks = ("" if number == "1" else "s" for number in (found.nodes, str(found.ranks_per_node)))
    return f"{found.nodes} node{nodes} × {found.ranks_per_node} rank{ranks}, by {found.launcher}"
