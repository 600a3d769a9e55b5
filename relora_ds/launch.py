"""Who am I: rank, world size and device, from torchrun, deepspeed, srun, mpirun or our own launcher.

The environment is read, and set, in this file only.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

from relora_ds import network, slurm_nodes
from relora_ds.errors import ConfigError, RankError

TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MPIRUN_VARIABLES = ("OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID")
"""Set by mpirun of Open MPI, and of MPICH and Intel MPI, but not by srun."""
DEFAULT_PORT = 29500
LAST_STEP_ID = 0xFFFFFFF0
"""SLURM's job steps are numbered up to here; above are its own, such as the interactive shell of salloc."""
GRACE_S = 20.0
"""How long the other processes of a node may take to end after one of them failed, before they are killed."""
SHOWN_GPUS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
ORDERLY = (2, 75)
"""Exit codes with which all ranks end by themselves, together: a bad setting, a signal."""
MEETING_S = 60.0
"""How long a rank that has finished waits for the others."""
SAFE_ISA = "AVX512_CORE_FP16"
"""The newest instruction set of oneDNN without AMX."""


@dataclass(frozen=True)
class Place:
    """Where this process stands in the job.

    Attributes:
        rank, world_size: in the whole job.
        local_rank, local_world_size: on this node.
        master_addr, master_port: of rank 0. Under mpirun over several nodes the address may be empty: not known before the start.
        launcher: torchrun (and all that set the same variables), srun, mpirun, or single.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    launcher: str

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_one_node(self) -> bool:
        return self.world_size == self.local_world_size


def discover(environment: Mapping[str, str] | None = None) -> Place | None:
    """This process's place as its launcher tells it; None when no launcher started it.

    torchrun's variables win, because torchrun may run under srun or mpirun. Then mpirun's own: inside a SLURM job it starts its
    daemons by srun, whose variables the ranks inherit. Those of PMI and PMIx come last: srun may set them beside its own, which
    say more.

    Raises:
        ConfigError: a launcher was found, but not where rank 0 is.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env and "WORLD_SIZE" in env:
        local = int(env.get("LOCAL_RANK", env["RANK"]))
        size = int(env["WORLD_SIZE"])
        address = env.get("MASTER_ADDR", "127.0.0.1")
        port = int(env.get("MASTER_PORT", DEFAULT_PORT))
        return Place(int(env["RANK"]), size, local, _local_size(env, size), address, port, "torchrun")
    if any(name in env for name in MPIRUN_VARIABLES):
        return _from_mpi(env)
    if _is_srun(env):
        return _from_slurm(env)
    if "PMI_RANK" in env or "PMIX_RANK" in env:
        return _from_mpi(env)
    return None


def attempt(environment: Mapping[str, str] | None = None) -> str:
    """This start of the SLURM job, ``JOB_ID.RESTART_COUNT``; empty outside of one."""
    env = os.environ if environment is None else environment
    job = env.get("SLURM_JOB_ID", "")
    return f"{job}.{env.get('SLURM_RESTART_COUNT') or 0}" if job else ""


def environment() -> dict[str, str]:
    """A copy of this process's environment as it is now."""
    return dict(os.environ)


def expand(path: str, environment: Mapping[str, str] | None = None) -> str:
    """A path with its ``$VAR`` and ``${VAR}`` filled in, then a leading ``~`` or ``~user``, as a shell does.

    Raises:
        ValueError: with the name of the variable that is unset or empty, or of the user that there is not.
    """
    env = os.environ if environment is None else environment

    def value(match: re.Match[str]) -> str:
        if not (found := env.get(match[1] or match[2])):
            raise ValueError(f"the environment variable {match[1] or match[2]} is not set, or empty")
        return found

    filled = re.sub(r"\$(?:(\w+)|\{(\w+)\})", value, path)
    try:
        return str(Path(filled).expanduser()) if filled.startswith("~") else filled
    except RuntimeError:
        name = filled.partition("/")[0]
        raise ValueError(f"{name} is nobody's home folder; write ./{name} for what has this name") from None


def _local_size(env: Mapping[str, str], world_size: int) -> int:
    """Processes on this node: torchrun says LOCAL_WORLD_SIZE, the deepspeed launcher LOCAL_SIZE."""
    return int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or world_size)


def _is_srun(env: Mapping[str, str]) -> bool:
    """Whether srun started this process as a task of a job step, not as, or inside, a user's interactive shell.

    An srun inside such a shell inherits SLURM_PTY_PORT, so that alone says nothing about a step of several tasks; a single task
    is alone either way.
    """
    if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env or int(env["SLURM_STEP_ID"]) > LAST_STEP_ID:
        return False
    return not ("SLURM_PTY_PORT" in env and env.get("SLURM_STEP_NUM_TASKS") == "1")


def _from_slurm(env: Mapping[str, str]) -> Place:
    """srun: one task per GPU. The master is the first node of the step, its port the same on all nodes."""
    size = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
    nodes = int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1")))
    tasks = slurm_nodes.tasks_of_nodes(env.get("SLURM_STEP_TASKS_PER_NODE", f"{size // nodes}(x{nodes})"))
    local_size = tasks[int(env.get("SLURM_NODEID", "0"))]
    address = env.get("MASTER_ADDR") or ("127.0.0.1" if nodes == 1 else slurm_nodes.first_host(_step_nodes(env)))
    reserved = env.get("SLURM_STEP_RESV_PORTS", "").replace(",", "-").partition("-")[0]  # of srun --resv-ports: 12345-12346
    port = env.get("MASTER_PORT") or reserved or slurm_nodes.port_of(int(env.get("SLURM_JOB_ID", "0")), int(env["SLURM_STEP_ID"]))
    return Place(int(env["SLURM_PROCID"]), size, int(env.get("SLURM_LOCALID", "0")), local_size, address, int(port), "srun")


def _step_nodes(env: Mapping[str, str]) -> str:
    return env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", ""))


def allocation() -> str | None:
    """The nodes of the SLURM job that this process is in, as SLURM writes them; None outside of jobs."""
    return os.environ.get("SLURM_JOB_NODELIST")


def _from_mpi(env: Mapping[str, str]) -> Place:
    """mpirun. Over several nodes rank 0's address is left open unless the user named it: it is asked of rank 0 at the start."""
    rank = int(env.get("OMPI_COMM_WORLD_RANK") or env.get("PMI_RANK") or env.get("PMIX_RANK") or 0)
    size = int(env.get("OMPI_COMM_WORLD_SIZE") or env.get("PMI_SIZE") or 0)
    local = int(env.get("OMPI_COMM_WORLD_LOCAL_RANK") or env.get("MPI_LOCALRANKID") or 0)
    local_size = int(env.get("OMPI_COMM_WORLD_LOCAL_SIZE") or env.get("MPI_LOCALNRANKS") or 0)
    address = env.get("MASTER_ADDR") or ("127.0.0.1" if local_size and local_size == size else "")
    if not (size and local_size and address) and importlib.util.find_spec("mpi4py") is None:
        problem = "MPI over several nodes needs rank 0's address"
        raise ConfigError("MASTER_ADDR", None, problem, "set it, or install relora_ds[mpi]")
    if not (size and local_size):  # an MPI that tells the processes less
        rank, size, local, local_size = _mpi_place()
    return Place(rank, size, local, local_size, address, int(env.get("MASTER_PORT", DEFAULT_PORT)), "mpirun")


@functools.cache
def _mpi_place() -> tuple[int, int, int, int]:
    """Rank and size, in the job and on this node, asked of MPI. All ranks must meet here: asked once, then remembered."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    here = comm.Split_type(MPI.COMM_TYPE_SHARED)
    return comm.Get_rank(), comm.Get_size(), here.Get_rank(), here.Get_size()


def _ask_rank_0(port: int | None) -> tuple[str, int]:
    """Rank 0's address and a port that is free there, or ``port``, over MPI. All ranks must call this."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    names = comm.allgather(socket.gethostname())
    found = None
    if comm.Get_rank() == 0:
        # An address, because the others may not know the name; not the one that the name has here, which may be 127.0.1.1.
        others = [name for name in names if name != names[0]]
        found = network.address_towards([*others, names[0], network.ANYWHERE]) or names[0], port or network.free_port()
    return comm.bcast(found, root=0)


def single() -> Place:
    """One process that stands alone."""
    return Place(0, 1, 0, 1, "127.0.0.1", network.free_port(), "single")


def default_num_processes() -> int:
    """One process per GPU, or one where there is none."""
    import torch

    return max(1, torch.cuda.device_count())


def require_process_group() -> None:
    """Starts torch.distributed and DeepSpeed as the launcher says, where the user's script has not done so."""
    import torch.distributed as dist

    if not dist.is_initialized():
        start_process_group(discover() or single())


def quiet_libraries() -> None:
    """Leaves the screen to this program: DeepSpeed, torch and transformers tell of themselves only what went wrong.

    Before DeepSpeed is imported: it warns on the standard output unless it is told that there is only a CPU.
    """
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\..*")


def check_nproc(nproc: int | None, place: Place | None) -> None:
    """Raises ConfigError for a ``--nproc`` that cannot be, and where a launcher has decided it already."""
    if nproc is not None and place is not None:
        raise ConfigError("--nproc", nproc, f"this process was started by {place.launcher}, which sets the number of processes")
    if nproc is not None and nproc < 1:
        raise ConfigError("--nproc", nproc, "must be at least 1")


def check_devices(num_processes: int) -> None:
    """Raises RankError when this machine has GPUs, but fewer than processes."""
    import torch

    if torch.cuda.is_available() and num_processes > torch.cuda.device_count():
        raise RankError(
            "--nproc", num_processes, f"this machine has {torch.cuda.device_count()} GPU(s)", "one process drives one GPU"
        )


def start_process_group(place: Place, timeout_s: float = 1800.0) -> Any:
    """Joins the job: NCCL on CUDA, gloo on CPU, under torch.distributed and DeepSpeed alike. Returns this process's torch device.

    Raises:
        ConfigError: rank 0's node has no address that is known here, or this machine has too few GPUs, or one for several ranks.
    """
    import torch

    place = find_master(place)
    _choose_interface(place)
    on_cuda = torch.cuda.is_available()
    if on_cuda and sees_its_own_gpu(torch.cuda.device_count(), os.environ):
        place = replace(place, local_rank=0)
    _export(place)
    if on_cuda:
        check_devices(place.local_rank + 1)
        torch.cuda.set_device(place.local_rank)
    import deepspeed

    from relora_ds import ledger

    skip_shared_memory_build()
    backend, timeout = "nccl" if on_cuda else "gloo", timedelta(seconds=timeout_s)
    with _one_gpu_each():
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    ledger.count_everything()
    return torch.device("cuda", place.local_rank) if on_cuda else torch.device("cpu")


def sees_its_own_gpu(num_gpus: int, env: Mapping[str, str]) -> bool:
    """Whether this process is shown one GPU alone, of its own, which is then number 0 to it, whatever its local rank.

    SLURM does so (``--gpus-per-task``, ``--tres-per-task``, ``--gpu-bind``), and so do scripts around the command that set
    CUDA_VISIBLE_DEVICES to the local rank. That others are not shown the same one is seen by NCCL when they meet.
    """
    by_slurm = (
        "SLURM_GPUS_PER_TASK" in env
        or "gpu" in env.get("SLURM_TRES_PER_TASK", "")  # gres/gpu:1, or cpu=4 alone
        or env.get("SLURM_GPU_BIND", "none") != "none"
    )
    by_script = any(name in env and "," not in env[name] for name in SHOWN_GPUS)
    return num_gpus == 1 and (by_slurm or by_script)


@contextmanager
def _one_gpu_each() -> Iterator[None]:
    """Says in one line what NCCL finds of several processes that were shown the same GPU."""
    try:
        yield
    except RuntimeError as error:
        if "Duplicate GPU" not in str(error):
            raise
        shown = {name: os.environ[name] for name in SHOWN_GPUS if name in os.environ}
        name, value = next(iter(shown.items()), (SHOWN_GPUS[0], None))
        problem = "several processes of this machine were shown the same GPU"
        raise RankError(name, value, problem, "start one process for each GPU, and show each its own or all of them") from None


def _export(place: Place) -> None:
    """torch.distributed and DeepSpeed read the place from the environment, whichever launcher it came from."""
    values = (place.rank, place.world_size, place.local_rank, place.master_addr, place.master_port)
    for name, value in zip(TORCH_VARIABLES, values, strict=True):
        os.environ[name] = str(value)
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(place.local_world_size))


def find_master(place: Place) -> Place:
    """The place with an address of rank 0 that can be connected to. Not part of `discover`, which any rank may call at any time."""
    if place.is_one_node or place.launcher not in ("srun", "mpirun"):
        return place
    if not place.master_addr:
        chosen = os.environ.get("MASTER_PORT")
        address, port = _ask_rank_0(int(chosen) if chosen else None)
        place = replace(place, master_addr=address, master_port=port)
    return replace(place, master_addr=slurm_nodes.reachable(place.master_addr))


def _choose_interface(place: Place) -> None:
    """Tells gloo, unless the user did, through which interface the ranks meet.

    Left alone it takes the address that the own host name resolves to: often 127.0.1.1, or one of a network for administrators.
    NCCL is told nothing: it looks through all interfaces and takes InfiniBand first, and NCCL_SOCKET_IFNAME is the user's word on it.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    if place.is_one_node:
        interface = next((name for _, name in socket.if_nameindex() if name == "lo"), None)
    else:
        address = network.address_towards([*_neighbours(place, os.environ), place.master_addr, network.ANYWHERE])
        interface = network.interface_of(address) if address else None
    if interface:
        os.environ["GLOO_SOCKET_IFNAME"] = interface


def _neighbours(place: Place, env: Mapping[str, str]) -> list[str]:
    """Another node of a step of srun: rank 0's own name may mean anything on its own node. None where the user named a master."""
    if place.launcher != "srun" or "MASTER_ADDR" in env:
        return []
    return list(islice((node for node in slurm_nodes.hosts(_step_nodes(env)) if node != env.get("SLURMD_NODENAME")), 1))


def skip_shared_memory_build() -> None:
    """Keeps DeepSpeed from compiling its shared-memory collective on CPU.

    It serves tensor-parallel inference only, is compiled at the first start, which takes long and needs a compiler, and a build that
    was killed leaves a lock on which every later start hangs.
    """
    import deepspeed

    builder = deepspeed.accelerator.get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None:
        deepspeed.ops.__compatible_ops__[builder.NAME] = False


def leave_process_group() -> None:
    """Ends torch.distributed on all ranks together: where the first exit ends the job, as under srun --kill-on-bad-exit, none is
    killed over files that it is still closing. Only for ends that all ranks come to; one that does not is waited for in vain.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    # Whoever is the first to exit has the others terminated. Python gives handlers of its own up before it ends; this one stays.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if dist.get_world_size() == 1 or _all_are_here():
        dist.destroy_process_group()  # so that the process exits without a warning


def _all_are_here() -> bool:
    """Whether all ranks came here within MEETING_S; raises nothing."""
    import torch
    import torch.distributed as dist

    with suppress(Exception):  # of many kinds; and a run that is over must not fail by the way it ends
        if dist.get_backend() == "gloo":
            dist.monitored_barrier(timeout=timedelta(seconds=MEETING_S))
            return True
        meeting, deadline = dist.barrier(async_op=True, device_ids=[torch.cuda.current_device()]), time.monotonic() + MEETING_S
        while not meeting.is_completed() and time.monotonic() < deadline:
            time.sleep(0.01)
        return meeting.is_completed()
    return False


def guard_bf16() -> str | None:
    """Makes bf16 matrix products safe on a CPU that advertises AMX but traps on it; returns what was done, to be told, or None.

    Some virtual machines do: oneDNN then picks an AMX kernel and the process dies of SIGILL. One product in a child process tells.
    Must run before the first bf16 product of this process, because oneDNN reads its variable once.
    """
    if "ONEDNN_MAX_CPU_ISA" in os.environ or not _cpu_has("amx_bf16"):
        return None
    probe = "import torch; a = torch.ones(64, 64, dtype=torch.bfloat16); torch.nn.functional.linear(a, a)"
    died = subprocess.run(tied([sys.executable, "-c", probe]), capture_output=True, check=False).returncode
    if died != -signal.SIGILL:
        return None
    os.environ["ONEDNN_MAX_CPU_ISA"] = SAFE_ISA
    return f"bf16 products trap on this CPU (SIGILL in an AMX kernel); going on with ONEDNN_MAX_CPU_ISA={SAFE_ISA}"


def _cpu_has(flag: str) -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return any(line.startswith("flags") and f" {flag} " in f"{line.strip()} " for line in file)
    except OSError:
        return False


def tied(command: Sequence[str]) -> list[str]:
    """The command so that it is killed when the thread that starts it ends, even by SIGKILL; its process id stays the one started."""
    return [sys.executable, "-I", "-S", str(Path(__file__).with_name("tie.py")), str(os.getpid()), *command]


def spawn(arguments: Sequence[str], num_processes: int, stop_signal: str = "USR2") -> int:
    """Runs ``python -m relora_ds.cli ARGUMENTS`` in ``num_processes`` processes on this machine; returns the job's exit code.

    SIGTERM, SIGINT and the stop signal are passed on (from the main thread: no other hears them), so that the run can write its
    checkpoint. When one process fails, the others are stopped. When this one dies, however it does, all die at once.
    """
    port, cores, more = network.free_port(), os.cpu_count() or 1, getattr(signal, f"SIG{stop_signal}")
    processes: list[subprocess.Popen[Any]] = []

    def pass_on(number: int, _frame: Any) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM if number == signal.SIGINT else number)

    heard = (signal.SIGINT, signal.SIGTERM, more) if threading.current_thread() is threading.main_thread() else ()
    previous = {number: signal.signal(number, pass_on) for number in heard}
    try:
        for rank in range(num_processes):
            environment = dict(os.environ)
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
            environment.update(
                {name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
            )
            environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_processes)))
            command = tied([sys.executable, "-m", "relora_ds.cli", *arguments])
            # Own session: a Ctrl-C of the terminal reaches this launcher alone, which passes it on once.
            processes.append(subprocess.Popen(command, env=environment, start_new_session=True))
        return _wait(processes)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for process in processes:
            if process.poll() is None:
                process.kill()


def _wait(processes: list[subprocess.Popen[Any]]) -> int:
    """Waits for all; the first failure decides the exit code, and a disorderly one stops the rest."""
    failed, deadline = 0, math.inf
    while None in (codes := [process.poll() for process in processes]):  # a list, so that every process is asked
        crash = next((code for code in codes if code and code not in ORDERLY), 0)
        if crash and failed in (0, *ORDERLY):
            failed, deadline = crash, time.monotonic() + GRACE_S
            for process in processes:
                if process.poll() is None:
                    process.terminate()
        elif not failed and (orderly := next(filter(None, codes), 0)):
            failed, deadline = orderly, time.monotonic() + GRACE_S
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    ended = [code for code in codes if code]
    code = next((code for code in ended if code not in ORDERLY), next(iter(ended), 0)) if failed in (0, *ORDERLY) else failed
    return code if code >= 0 else 1
