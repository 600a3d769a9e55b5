"""What sbatch may know of the environment that it is called in. PURE.

sbatch hands its environment on to the job, and reads options in it that stand over those of the script. So whatever the caller is
itself, a task of another job, a rank, a user with SBATCH_ACCOUNT in the profile, would decide over the new job, without a word.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from relora_ds.errors import ConfigError

PLACE_OF_A_PROCESS = re.compile(
    r"(SLURM|SLURMD|SRUN|SALLOC|PMI|PMI2|PMIX|OMPI|ORTE|PRTE|PALS|ALPS|HYDRA|MV2_COMM_WORLD|TORCHELASTIC)_\w+"
    r"|RANK|WORLD_SIZE|(LOCAL|GROUP|NODE|ROLE)_(RANK|SIZE|WORLD_SIZE|NAME)|GROUP_WORLD_SIZE|CROSS_(RANK|SIZE)|MASTER_(ADDR|PORT)"
    r"|MPI_LOCAL(RANKID|NRANKS)|((CUDA|HIP|ROCR)_VISIBLE_DEVICES|GPU_DEVICE_ORDINAL|ZE_AFFINITY_MASK)|DS_ACCELERATOR"
)
"""Names of what launchers, SLURM and DeepSpeed tell a process of itself: true of the caller, false of the job."""
ACCESS = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_SACK_SOCKET", "SLURM_SACK_KEY")
"""How SLURM's programs find and convince the controller."""

MEMORY = ("mem", "mem-per-cpu", "mem-per-gpu")
GPUS = ("gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket", "gres")
REQUEUE = ("requeue", "no-requeue")
ANSWERS: dict[str, tuple[str, ...]] = {
    "TIMELIMIT": ("time",), "ERROR": ("error", "output"), "REQ_SWITCH": ("switches",), "REQUEUE": REQUEUE, "NO_REQUEUE": REQUEUE,
    "MEM_PER_NODE": MEMORY, "MEM_PER_CPU": MEMORY, "MEM_PER_GPU": MEMORY,
    "GPUS": GPUS, "GPUS_PER_NODE": GPUS, "GPUS_PER_TASK": GPUS, "GPUS_PER_SOCKET": GPUS, "GRES": GPUS,
}  # fmt: skip
"""The options that say what a variable SBATCH_… says, where they are not its name."""
SHORT = {
    "A": "account", "C": "constraint", "G": "gpus", "J": "job-name", "M": "clusters", "N": "nodes", "a": "array", "e": "error",
    "o": "output", "p": "partition", "q": "qos", "t": "time", "x": "exclude",
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """How to call sbatch.

    Attributes:
        environment: for it, and so for the job.
        options: that the environment said and the job's own environment must not.
        told: what was decided over the caller's variables, for the user.
    """

    environment: dict[str, str]
    options: tuple[str, ...]
    told: tuple[str, ...]


def for_sbatch(environment: Mapping[str, str], script: str) -> Call:
    """The call of sbatch for a script, whose directives stand over the variables that would overrule them.

    Args:
        environment: the caller's.
        script: the text of the batch script.

    Raises:
        ConfigError: a variable makes an array of the job.
    """
    stated = stated_options(script)
    kept, told = {}, []
    for name, value in environment.items():
        if name.startswith("SBATCH_"):
            option = name.removeprefix("SBATCH_")
            answers = ANSWERS.get(option, (option.lower().replace("_", "-"),))
            if option.startswith("ARRAY"):
                raise ConfigError(name, value, "a run is one job, not an array", f"unset {name}")
            if option in ("WAIT", "CLUSTERS"):
                continue  # sbatch would not come back before the job's end; and the clusters are an option, below
            if stated & set(answers):
                told.append(f"{name}={value!r} of the environment gives way to the job's own options")
                continue
            told.append(f"{name}={value!r} of the environment counts: no option says otherwise")
        elif name not in ACCESS and PLACE_OF_A_PROCESS.fullmatch(name):
            continue
        kept[name] = value
    clusters = environment.get("SBATCH_CLUSTERS") or environment.get("SLURM_CLUSTERS")
    # as an option: in the job the programs of SLURM must ask the cluster that it runs on, which is theirs anyway
    options = (f"--clusters={clusters}",) if clusters and not stated & {"clusters", "cluster"} else ()
    return Call(kept, options, tuple(told))


def stated_options(script: str) -> set[str]:
    """The long names of the options in a batch script's ``#SBATCH`` lines."""
    lines = [line.removeprefix("#SBATCH") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {name for line in lines for word in _words(line) if (name := option_of(word))}


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # a quote that stays open: sbatch itself will say so
        return line.split()


def option_of(word: str) -> str | None:
    """The long name of the option of sbatch that a word begins: ``--time=1`` and ``-t1`` -> ``time``; None for a value."""
    if word.startswith("--"):
        return word[2:].partition("=")[0]
    return SHORT.get(word[1:2], word[1:2]) if word.startswith("-") else None
