"""Who am I: this process's rank, world and node, read from the variables that its launcher set."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from relora_ds.comm import network
from relora_ds.environment import process_environment
from relora_ds.errors import ConfigError
from relora_ds.slurm import nodes as slurm_nodes

MPIRUN_VARIABLES = ("OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_RANK")
"""Set by mpirun of Open MPI, of MPICH and Intel MPI, of MVAPICH2, but not by srun."""
PMI_VARIABLES = ("PMI_RANK", "PMIX_RANK")
"""Set by other launchers of MPI programs, and by srun beside its own."""
MPI_NAMES = {
    "rank": ("OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"),
    "size": ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE"),
    "local rank": (
        "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID",
    ),
    "local size": ("OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
}  # fmt: skip
OWN_NUMBERING = ("TORCHELASTIC_RUN_ID", "LOCAL_SIZE", *MPIRUN_VARIABLES)
"""Who sets one of these may start several ranks in a task of srun: torchrun, the deepspeed launcher, mpirun."""
DEFAULT_PORT = 29500
LAST_STEP_ID = 0xFFFFFFF0
"""SLURM's job steps are numbered up to here; above are its own, such as the interactive shell of salloc."""


@dataclass(frozen=True)
class Place:
    """Where this process stands in the job.

    Attributes:
        rank, world_size: in the whole job.
        local_rank, local_world_size: on this node; None where the launcher does not say: known once the ranks have met.
        master_addr, master_port: of rank 0. Under mpirun over several nodes the address may be empty: not known before the start.
        launcher: torchrun (and all that set the same variables), srun, mpirun, or single.
    """

    rank: int
    world_size: int
    local_rank: int | None
    local_world_size: int | None
    master_addr: str
    master_port: int
    launcher: str

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_one_node(self) -> bool:
        """Whether the job is known to be on one node."""
        return self.world_size == self.local_world_size

    @property
    def is_lone_task(self) -> bool:
        """Whether this is the one task of a step of srun: a shell or a notebook inside a job may be one, too."""
        return self.launcher == "srun" and self.world_size == 1


def of(env: Mapping[str, str]) -> Place | None:
    """A process's place as its launcher tells it; None when no launcher started it.

    torchrun's variables win, because torchrun may run under srun or mpirun. Then mpirun's own: inside a SLURM job it starts its
    daemons by srun, whose variables the ranks inherit. Those of PMI and PMIx come last: srun may set them beside its own, which
    say more.

    A variable that is empty is one that is not set.

    Raises:
        ConfigError: a launcher was found, but not where rank 0 is; its variables are no numbers, or contradict each other or srun's.
    """
    if env.get("RANK") and env.get("WORLD_SIZE"):
        return _consistent(_from_torch(env), "RANK", "WORLD_SIZE", "LOCAL_RANK")
    if any(env.get(name) for name in MPIRUN_VARIABLES):
        return _consistent(_from_mpi(env), *(_name(env, *MPI_NAMES[what]) for what in ("rank", "size", "local rank")))
    if _is_srun(env):
        return _consistent(_from_slurm(env), "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    if any(env.get(name) for name in PMI_VARIABLES):
        return _consistent(_from_mpi(env), *(_name(env, *MPI_NAMES[what]) for what in ("rank", "size", "local rank")))
    _refuse_half(env)
    return None


def _consistent(place: Place, rank: str, size: str, local_rank: str) -> Place:
    """The place as it is; raises ConfigError where its numbers, of the variables of these names, cannot be true together."""
    way_out = "start the ranks by srun, torchrun or mpirun, which count them"
    if place.rank >= place.world_size:
        raise ConfigError(rank, place.rank, f"is not below {size}={place.world_size}", way_out)
    if place.local_world_size is not None and place.local_world_size > place.world_size:
        problem = f"is less than the {place.local_world_size} ranks of this node alone"
        raise ConfigError(size, place.world_size, problem, way_out)
    if (place.local_rank or 0) >= (place.local_world_size or place.world_size):
        raise ConfigError(local_rank, place.local_rank, "is not below the number of ranks of this node", way_out)
    return place


def _refuse_half(env: Mapping[str, str]) -> None:
    """Raises ConfigError for a rank without a number of ranks, or the other way round: left over, or the other was forgotten."""
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if env.get(name):
            raise ConfigError(name, env[name], f"means nothing without {other}", f"unset {name}, or set both for each process")


def _from_torch(env: Mapping[str, str]) -> Place:
    """torchrun, the deepspeed launcher (LOCAL_SIZE), and scripts that set the variables which torch reads."""
    rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE", least=1)
    assert rank is not None and size is not None
    step = _from_slurm(env) if _is_step_of_tasks(env) else None
    if step is not None and not any(name in env for name in OWN_NUMBERING):
        _refuse_contradiction(rank, size, step)
    address, port = env.get("MASTER_ADDR") or "127.0.0.1", _port(env)
    local, local_size = _number(env, "LOCAL_RANK"), _number(env, "LOCAL_WORLD_SIZE", "LOCAL_SIZE", least=1)
    if step is not None and (step.rank, step.world_size) == (rank, size):  # a rank is a task
        local = step.local_rank if local is None else local
        local_size = local_size or step.local_world_size
    elif address in ("localhost", "::1") or address.startswith("127."):  # no other node could reach rank 0
        local, local_size = rank if local is None else local, local_size or size
    return Place(rank, size, local, local_size, address, DEFAULT_PORT if port is None else port, "torchrun")


def _refuse_contradiction(rank: int, size: int, step: Place) -> None:
    """Raises ConfigError for a RANK that a job script set once for all tasks, or that was left over where the job was submitted."""
    way_out = "leave RANK and WORLD_SIZE to srun (unset them in the job script), or set both behind srun, for each task"
    if size < step.world_size:
        raise ConfigError("WORLD_SIZE", size, f"srun started {step.world_size} tasks", way_out)
    if size == step.world_size and rank != step.rank:
        raise ConfigError("RANK", rank, f"this is task {step.rank} of srun", way_out)


def _is_srun(env: Mapping[str, str]) -> bool:
    """Whether srun started this process as a task of a job step, not as, or inside, a user's interactive shell.

    An srun inside such a shell inherits SLURM_PTY_PORT, so that alone says nothing about a step of several tasks; a single task
    is alone either way.
    """
    step = _number(env, "SLURM_STEP_ID")
    if step is None or not env.get("SLURM_PROCID") or step > LAST_STEP_ID:
        return False
    return not ("SLURM_PTY_PORT" in env and env.get("SLURM_STEP_NUM_TASKS") == "1")


def _is_step_of_tasks(env: Mapping[str, str]) -> bool:
    return _is_srun(env) and (env.get("SLURM_STEP_NUM_TASKS") or "1") != "1"


def _from_slurm(env: Mapping[str, str]) -> Place:
    """srun: one task per GPU. The master is the first node of the step, its port the same on all nodes."""
    size = _number(env, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", least=1) or 1
    nodes = _number(env, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", least=1) or 1
    counts, node = env.get("SLURM_STEP_TASKS_PER_NODE") or f"{size // nodes}(x{nodes})", _number(env, "SLURM_NODEID") or 0
    tasks = slurm_nodes.tasks_of_nodes(counts)
    if node >= len(tasks):
        raise ConfigError("SLURM_STEP_TASKS_PER_NODE", counts, f"says nothing of node {node}", "start the ranks by srun")
    address = env.get("MASTER_ADDR") or ("127.0.0.1" if nodes == 1 else slurm_nodes.first_host(step_nodes(env)))
    reserved = env.get("SLURM_STEP_RESV_PORTS", "").replace(",", "-").partition("-")[0]  # of srun --resv-ports: 12345-12346
    job, step, restart = (_number(env, f"SLURM_{name}") or 0 for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    port = _port({"MASTER_PORT": env.get("MASTER_PORT") or reserved}) or slurm_nodes.port_of(job, step, restart)
    rank, local = (_number(env, name) or 0 for name in ("SLURM_PROCID", "SLURM_LOCALID"))
    return Place(rank, size, local, tasks[node], address, port, "srun")


def step_nodes(env: Mapping[str, str]) -> str:
    """The nodes of a step, or of the job, as SLURM writes them."""
    return env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")


def _from_mpi(env: Mapping[str, str]) -> Place:
    """mpirun and what else starts MPI programs (PALS). What its variables do not say is asked of MPI."""
    rank, size, local, local_size = (_number(env, *names) for names in MPI_NAMES.values())
    address = env.get("MASTER_ADDR") or ("127.0.0.1" if local_size and local_size == size else "")
    is_told = bool(size and local_size) and local is not None
    if not (is_told and address) and importlib.util.find_spec("mpi4py") is None:
        problem = "MPI over several nodes needs rank 0's address"
        raise ConfigError("MASTER_ADDR", None, problem, "set it, or install relora_ds[mpi]")
    if rank is None or not size or not local_size or local is None:
        rank, size, local, local_size = _mpi_place()
    return Place(rank, size, local, local_size, address, _port(env) or DEFAULT_PORT, "mpirun")


@functools.cache
def _mpi_place() -> tuple[int, int, int, int]:
    """Rank and size, in the job and on this node, asked of MPI. All ranks must meet here: asked once, then remembered.

    Raises:
        ConfigError: mpi4py finds no MPI library.
    """
    mpi = load_mpi()
    comm = mpi.COMM_WORLD
    here = comm.Split_type(mpi.COMM_TYPE_SHARED)
    return comm.Get_rank(), comm.Get_size(), here.Get_rank(), here.Get_size()


def load_mpi() -> Any:
    """mpi4py's MPI. Raises ConfigError where it does not load, which it says in many ways."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError, OSError) as error:
        problem = f"mpi4py finds no MPI library here ({' '.join(str(error).split())})"
        raise ConfigError(
            "mpi4py", None, problem, "load the module of the MPI that started the ranks, or set MASTER_ADDR"
        ) from None
    return MPI


def _name(env: Mapping[str, str], *names: str) -> str:
    """The first of some variables that is set; of none, the first."""
    return next((name for name in names if env.get(name)), names[0])


def _number(env: Mapping[str, str], *names: str, least: int = 0, most: float = math.inf) -> int | None:
    """The first of some variables that is set. Raises ConfigError where it is no whole number in the range."""
    name = _name(env, *names)
    if not env.get(name):
        return None
    way_out = "unset it, or start the ranks by srun, torchrun or mpirun"
    try:
        number = int(env[name])
    except ValueError:
        raise ConfigError(name, env[name], "is no number", way_out) from None
    if not least <= number <= most:
        raise ConfigError(name, number, f"is below {least}" if number < least else f"is above {most}", way_out)
    return number


def _port(env: Mapping[str, str]) -> int | None:
    return _number(env, "MASTER_PORT", least=1, most=65535)


def discover(environment: Mapping[str, str] | None = None) -> Place | None:
    """This process's place, as :func:`relora_ds.launch.places.of` finds it in the environment; None when no launcher started it.

    Raises:
        ConfigError: a launcher was found, but not where rank 0 is, or its variables contradict srun's.
    """
    return of(process_environment() if environment is None else environment)


def launched(under: str | None = None) -> Place | None:
    """The place of a command that starts ranks itself where no launcher did; None where it is to.

    The one task of a step of srun counts as started by nobody, unless it is said: it may be a shell, or a notebook, with all GPUs of
    its node.

    Args:
        under: the launcher that this command was told of.

    Raises:
        ConfigError: ``under`` is given, and there is no trace of any launcher; or as in :func:`discover`.
    """
    place = discover()
    if place is None and under is not None:
        raise ConfigError(
            "--under", under, "nothing in the environment says which rank this is",
            "let the launcher's variables through: start the container without --cleanenv or --containall, and no env -i",
        )  # fmt: skip
    return None if place is not None and place.is_lone_task and under is None else place


def single() -> Place:
    """One process that stands alone."""
    return Place(0, 1, 0, 1, "127.0.0.1", network.free_port(), "single")


def speaks_as(rank: int) -> bool:
    """Whether this process is the one to speak for a rank, 0 for what every rank finds; it is where nobody knows its rank."""
    try:
        place = discover()
    except ConfigError:
        return True
    return place is None or place.rank == rank
