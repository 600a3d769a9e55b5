"""Who am I under each launcher, how the ranks meet and leave, and the guards around CPUs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import NoReturn

import pytest

from relora_ds import launch, network, slurm_nodes
from relora_ds.errors import ConfigError, RankError
from relora_ds.launch import Place, attempt, discover

SRUN = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "node[03-04]",
    "SLURM_NODEID": "1",
    "SLURMD_NODENAME": "node04",
    "SLURM_NTASKS": "99",  # of the job, not of the step
    "SLURM_NNODES": "99",
    "SLURM_JOB_NODELIST": "login[1-9]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "29411",
}


# Who am I


def test_no_launcher() -> None:
    assert discover({}) is None
    assert discover({"PATH": "/bin", "LOCAL_RANK": "0"}) is None


def test_torchrun() -> None:
    place = discover(TORCHRUN)
    assert place == Place(5, 8, 1, 4, "10.0.0.7", 29411, "torchrun")
    assert not place.is_main


def test_deepspeed_launcher_on_one_node() -> None:
    environment = {
        "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2", "CROSS_RANK": "0", "CROSS_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
    }  # fmt: skip
    place = discover(environment)
    assert place == Place(0, 2, 0, 2, "127.0.0.1", 29500, "torchrun")
    assert place.is_main


def test_deepspeed_launcher_on_several_nodes() -> None:
    """It names the processes of a node LOCAL_SIZE; taken for one node, the job would be kept on the loopback interface."""
    env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "MASTER_ADDR": "node03", "MASTER_PORT": "29500"}
    assert discover(env) == Place(5, 8, 1, 4, "node03", 29500, "torchrun")


PORT = slurm_nodes.port_of(1234567, 0)
PTY = {  # task 0 of `srun --pty bash` on one node
    "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_STEP_NODELIST": "node1",
    "SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node1", "SLURM_PTY_PORT": "35551",
}  # fmt: skip
INTERACTIVE = PTY | {  # the shell of `salloc -N2 -n5` where LaunchParameters=use_interactive_step
    "SLURM_STEP_ID": "4294967290", "SLURM_NTASKS": "5", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]",
}  # fmt: skip


def test_srun_on_several_nodes() -> None:
    assert discover(SRUN) == Place(5, 8, 1, 4, "node03", PORT, "srun")
    first = SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    assert discover(first) == Place(0, 8, 0, 4, "node03", PORT, "srun")


@pytest.mark.parametrize(("node", "local_size"), [(0, 4), (1, 4), (2, 2)])
def test_srun_on_nodes_with_different_numbers_of_tasks(node: int, local_size: int) -> None:
    uneven = {"SLURM_STEP_NUM_TASKS": "10", "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_TASKS_PER_NODE": "4(x2),2"}
    place = discover(SRUN | uneven | {"SLURM_NODEID": str(node)})
    assert place is not None
    assert place.local_world_size == local_size
    assert not place.is_one_node


@pytest.mark.parametrize("reserved", ["12345-12346", "12345,12350-12352", "12345"])
def test_srun_takes_a_port_that_slurm_reserved(reserved: str) -> None:
    environment = SRUN | {"SLURM_STEP_RESV_PORTS": reserved}
    place, asked = discover(environment), discover(environment | {"MASTER_PORT": "7777"})
    assert place is not None and asked is not None
    assert (place.master_port, asked.master_port) == (12345, 7777)


@pytest.mark.parametrize("shell", [PTY, INTERACTIVE], ids=["srun --pty bash", "salloc"])
def test_a_shell_inside_a_step_is_not_a_rank(shell: dict[str, str]) -> None:
    """`relora-ds train --nproc 2` typed there starts its own processes."""
    assert discover(shell) is None


def test_srun_inside_a_shell_of_srun() -> None:
    """The inner srun passes the outer's SLURM_PTY_PORT on."""
    assert discover(SRUN | {"SLURM_PTY_PORT": "36521"}) == discover(SRUN)


def test_a_batch_script_is_not_a_rank() -> None:
    """It has the number of a task, but of no step."""
    environment = {name: value for name, value in SRUN.items() if "STEP" not in name}
    assert discover(environment | {"SLURM_PROCID": "0"}) is None


def test_srun_takes_a_master_that_the_job_script_names() -> None:
    place = discover(SRUN | {"MASTER_ADDR": "node04-ib", "MASTER_PORT": "12345"})
    assert place is not None
    assert (place.master_addr, place.master_port) == ("node04-ib", 12345)


def test_srun_on_one_node_needs_no_name() -> None:
    one_node = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2"}
    one_node |= {"SLURM_NODEID": "0", "SLURM_PROCID": "1"}
    assert discover(SRUN | one_node) == Place(1, 2, 1, 2, "127.0.0.1", PORT, "srun")


def test_srun_without_a_node_list() -> None:
    environment = {name: value for name, value in SRUN.items() if "NODELIST" not in name}
    with pytest.raises(ConfigError, match="set MASTER_ADDR"):
        discover(environment)


def test_a_job_script_is_not_a_step() -> None:
    """In the script of sbatch or the shell of salloc, `relora-ds train --nproc 2` starts its own processes."""
    assert discover({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}) is None


@pytest.mark.parametrize("outer", [SRUN, OPEN_MPI], ids=["srun", "mpirun"])
def test_torchrun_under_another_launcher(outer: dict[str, str]) -> None:
    assert discover(outer | TORCHRUN) == discover(TORCHRUN)


def test_open_mpi_on_one_node() -> None:
    assert discover(OPEN_MPI) == Place(2, 4, 2, 4, "127.0.0.1", 29500, "mpirun")


def test_open_mpi_over_nodes_with_a_named_master() -> None:
    environment = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "MASTER_ADDR": "10.0.0.7"}
    assert discover(environment) == Place(2, 4, 0, 2, "10.0.0.7", 29500, "mpirun")


def test_mpirun_inside_a_slurm_job() -> None:
    """On all nodes but the first its daemon is a task of srun, whose variables the rank inherits."""
    daemon = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}
    assert discover(OPEN_MPI | daemon | {"PMIX_RANK": "2"}) == discover(OPEN_MPI)


def test_srun_with_pmix_needs_no_mpi() -> None:
    assert discover(SRUN | {"PMIX_RANK": "5", "PMIX_NAMESPACE": "slurm.pmix.3.0"}) == discover(SRUN)


def test_open_mpi_over_nodes_without_mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR=None: .*rank 0's address; set it, or install relora_ds\[mpi\]"):
        discover(OVER_NODES)


OVER_NODES = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}


class World:
    """What mpi4py's COMM_WORLD answers to one rank; it counts the questions."""

    def __init__(self, rank: int, hosts: list[str]) -> None:
        self.rank, self.hosts, self.asked, self.sent = rank, hosts, 0, ("10.0.0.9", 4711)

    def allgather(self, own: str) -> list[str]:
        self.asked += 1
        return self.hosts

    def bcast(self, value: object, root: int) -> object:
        return value if self.rank == root else self.sent

    def Split_type(self, kind: object) -> World:
        self.asked += 1
        return World(self.rank % 2, self.hosts[:2])

    def Get_rank(self) -> int:
        return self.rank

    def Get_size(self) -> int:
        return len(self.hosts)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], World]:
    """Makes this process one of the ranks of an MPI job over two nodes with two ranks each."""

    def install(rank: int) -> World:
        comm = World(rank, ["node1", "node1", "node2", "node2"])
        mpi = SimpleNamespace(MPI=SimpleNamespace(COMM_WORLD=comm, COMM_TYPE_SHARED=0), __spec__=SimpleNamespace())
        monkeypatch.setitem(sys.modules, "mpi4py", mpi)
        launch._mpi_place.cache_clear()
        return comm

    return install


@pytest.mark.usefixtures("clean")
def test_mpirun_over_nodes_asks_rank_0_at_the_start_alone(world: Callable[[int], World]) -> None:
    """`discover` serves error messages, too, which ranks write unequally often."""
    comm = world(2)
    place = discover(OVER_NODES)
    assert place == Place(2, 4, 0, 2, "", 29500, "mpirun")
    assert comm.asked == 0
    found = launch.find_master(place)
    assert (found.master_addr, found.master_port, comm.asked) == ("10.0.0.9", 4711, 1)


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("chosen", [None, "7777"])
def test_rank_0_tells_an_address_that_leads_to_the_others(
    world: Callable[[int], World], monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    world(0)
    if chosen:
        monkeypatch.setenv("MASTER_PORT", chosen)
    routes = {"node2": "10.0.0.1", "node1": "192.168.9.1"}
    monkeypatch.setattr(network, "address_towards", lambda hosts: next(routes[host] for host in hosts if host in routes))
    monkeypatch.setattr(network, "free_port", lambda: 5555)
    found = launch.find_master(Place(0, 4, 0, 2, "", 29500, "mpirun"))
    assert (found.master_addr, found.master_port) == ("10.0.0.1", int(chosen or 5555))


def test_an_mpi_that_tells_little_is_asked_once(world: Callable[[int], World]) -> None:
    comm = world(3)
    for _ in range(3):
        place = discover({"PMIX_RANK": "3", "MASTER_ADDR": "node1", "MASTER_PORT": "7777"})
        assert place == Place(3, 4, 1, 2, "node1", 7777, "mpirun")
    assert comm.asked == 1


def test_a_process_alone() -> None:
    place = launch.single()
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (0, 1, 0, 1)
    assert place.is_main


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables that this module sets are unset, and put back afterwards."""
    for name in (*PLACE, "GLOO_SOCKET_IFNAME", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it, whether it was set or not
        monkeypatch.delenv(name)


PLACE = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node03",
    "MASTER_PORT": "34067",
}


NODES = Place(5, 8, 1, 4, "node03", 24567, "srun")
ONE_NODE = Place(1, 2, 1, 2, "127.0.0.1", 29500, "single")


@pytest.mark.usefixtures("clean")
def test_export_tells_torch_and_deepspeed_the_place() -> None:
    launch._export(Place(5, 8, 1, 4, "node03", 34067, "srun"))
    assert {name: os.environ[name] for name in PLACE} == PLACE


@pytest.mark.usefixtures("clean")
@pytest.mark.skipif(not any(name == "lo" for _, name in socket.if_nameindex()), reason="no loopback interface named lo")
def test_gloo_of_one_node_stays_on_loopback() -> None:
    launch._choose_interface(ONE_NODE)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("place", [NODES, ONE_NODE], ids=["nodes", "one node"])
def test_gloo_is_left_to_the_user(place: Place) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "eth1"
    launch._choose_interface(place)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth1"


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(
    ("launcher", "env", "order"),
    [
        ("srun", SRUN, ["node03", "node03"]),
        ("srun", SRUN | {"SLURMD_NODENAME": "node03"}, ["node04", "node03"]),  # node03 is rank 0's
        ("srun", SRUN | {"MASTER_ADDR": "node03"}, ["node03"]),
        ("torchrun", TORCHRUN, ["node03"]),
    ],
)
def test_gloo_meets_where_another_node_or_the_master_is_reached(
    monkeypatch: pytest.MonkeyPatch, launcher: str, env: dict[str, str], order: list[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(network, "address_towards", lambda hosts: asked.extend(hosts) or "10.0.0.4")
    monkeypatch.setattr(network, "interface_of", {"10.0.0.4": "ib0"}.get)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    launch._choose_interface(replace(NODES, launcher=launcher))
    assert asked == [*order, network.ANYWHERE]
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


@pytest.mark.usefixtures("clean")
def test_gloo_is_left_alone_where_all_ways_are_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "address_towards", lambda hosts: None)
    launch._choose_interface(NODES)
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_the_master_of_srun_is_looked_up_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_nodes, "reachable", {"node03": "10.0.0.3"}.__getitem__)
    assert launch.find_master(NODES) == replace(NODES, master_addr="10.0.0.3")
    named = replace(NODES, launcher="torchrun")
    assert launch.find_master(named) is named
    assert launch.find_master(ONE_NODE) is ONE_NODE


def test_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    assert launch.allocation() is None
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    assert launch.allocation() == "node[1-2]"


# Leaving together: two processes over gloo

LEAVER = """
import os, sys, time
from datetime import timedelta
import torch.distributed as dist
from relora_ds import launch
launch.MEETING_S = 1.0
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
{before}
began = time.monotonic()
launch.leave_process_group()
print(f"{{time.monotonic() - began:.3f}}", flush=True)
os.kill(os.getpid(), 15)  # as srun does to the rest when the first has ended
os._exit(0)
"""


def leave(before: str) -> tuple[list[subprocess.Popen], list[str]]:
    """Two ranks that run ``before`` and then leave; with the seconds that each took to leave."""
    port = str(network.free_port())
    ranks = []
    for rank in range(2):
        place = {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "GLOO_SOCKET_IFNAME": "lo",
        }
        words = [sys.executable, "-c", LEAVER.format(before=before)]
        ranks.append(
            subprocess.Popen(words, env={**os.environ, **place}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        )
    return ranks, [rank.communicate(timeout=60)[0].strip() for rank in ranks]


def test_a_rank_leaves_when_all_are_ready_to() -> None:
    ranks, seconds = leave("time.sleep(0.5 * dist.get_rank())")
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert float(seconds[0]) > 0.3


@pytest.mark.parametrize("absent", ["os._exit(9)", "time.sleep(4)\n    os._exit(9)"], ids=["dead", "busy"])
def test_a_rank_does_not_wait_for_ever_for_one_that_does_not_come(absent: str) -> None:
    ranks, seconds = leave(f"if dist.get_rank() == 1:\n    {absent}")
    assert [rank.returncode for rank in ranks] == [0, 9]
    assert float(seconds[0]) < 3


# Guards


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch, clean: None) -> list[list[str]]:
    """The commands that `guard_bf16` runs, on a CPU that advertises AMX and dies of it."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=-signal.SIGILL)

    monkeypatch.setattr(launch.subprocess, "run", run)
    monkeypatch.setattr(launch, "_cpu_has", lambda flag: flag == "amx_bf16")
    return commands


def test_guard_bf16_where_amx_traps(probes: list[list[str]]) -> None:
    message = launch.guard_bf16()
    assert message is not None
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == launch.SAFE_ISA
    assert f"ONEDNN_MAX_CPU_ISA={launch.SAFE_ISA}" in message
    assert len(probes) == 1
    assert "bfloat16" in probes[0][-1]
    assert launch.guard_bf16() is None  # the variable is set now
    assert len(probes) == 1


def test_guard_bf16_leaves_a_setting_of_the_user(probes: list[list[str]]) -> None:
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
    assert launch.guard_bf16() is None
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert probes == []


def test_guard_bf16_without_amx(probes: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_cpu_has", lambda flag: False)
    assert launch.guard_bf16() is None
    assert "ONEDNN_MAX_CPU_ISA" not in os.environ
    assert probes == []


@pytest.mark.usefixtures("probes")
@pytest.mark.parametrize("code", [0, 1, -signal.SIGKILL])
def test_guard_bf16_where_the_probe_does_not_trap(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(launch.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=code))
    assert launch.guard_bf16() is None
    assert "ONEDNN_MAX_CPU_ISA" not in os.environ


def test_shared_memory_collective_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed
    from deepspeed.comm.torch import build_shm_op

    builder = deepspeed.accelerator.get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None:
        pytest.skip("this accelerator has no such operator")
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, builder.NAME, True)
    launch.skip_shared_memory_build()
    assert deepspeed.ops.__compatible_ops__[builder.NAME] is False  # first: the next line would compile for a minute
    assert build_shm_op() is None


@pytest.mark.parametrize(("gpus", "processes", "fits"), [(0, 4, True), (2, 2, True), (2, 3, False)])
def test_one_process_drives_one_gpu(monkeypatch: pytest.MonkeyPatch, gpus: int, processes: int, fits: bool) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    if fits:
        launch.check_devices(processes)
    else:
        with pytest.raises(ConfigError, match=r"--nproc=3: this machine has 2 GPU\(s\)"):
            launch.check_devices(processes)


@pytest.mark.parametrize(
    ("environment", "name"),
    [({}, ""), ({"SLURM_JOB_ID": "12"}, "12.0"), ({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "3"}, "12.3")],
)
def test_attempt(environment: dict[str, str], name: str) -> None:
    assert attempt(environment) == name


@pytest.mark.parametrize(
    ("num_gpus", "environment", "own"),
    [
        (1, {"SLURM_GPUS_PER_TASK": "1"}, True),
        (1, {"SLURM_GPU_BIND": "per_task:1"}, True),
        (1, {"SLURM_GPUS_PER_NODE": "8"}, False),  # a node with one GPU
        (8, {"SLURM_GPUS_PER_TASK": "1"}, False),  # all are visible
        (1, {"SLURM_TRES_PER_TASK": "cpu=4,gres/gpu:1"}, True),
        (1, {"SLURM_TRES_PER_TASK": "gres/gpu=1"}, True),
        (1, {"SLURM_TRES_PER_TASK": "cpu=4"}, False),
        (1, {"SLURM_GPU_BIND": "none"}, False),
        (1, {**TORCHRUN, "CUDA_VISIBLE_DEVICES": "1"}, True),  # a script around the command, under torchrun and mpirun
        (1, {**OPEN_MPI, "CUDA_VISIBLE_DEVICES": "0"}, True),  # the number that its own has inside a container or cgroup
        (1, {**TORCHRUN, "CUDA_VISIBLE_DEVICES": "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"}, True),
        (1, {**TORCHRUN, "ROCR_VISIBLE_DEVICES": "1"}, True),
        (2, {**TORCHRUN, "CUDA_VISIBLE_DEVICES": "0,1"}, False),
        (1, {**TORCHRUN, "CUDA_VISIBLE_DEVICES": "0,1"}, False),  # the second is not there
        (0, {**TORCHRUN, "CUDA_VISIBLE_DEVICES": ""}, False),
        (1, TORCHRUN, False),  # two processes on a machine with one GPU
    ],
)
def test_a_task_that_sees_its_own_gpu_alone(num_gpus: int, environment: dict[str, str], own: bool) -> None:
    assert launch.sees_its_own_gpu(num_gpus, environment) is own


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch, clean: None) -> list[int]:
    """A machine that shows one GPU, and no process group; the devices that are chosen."""
    import deepspeed

    chosen: list[int] = []
    for name in (*launch.SHOWN_GPUS, "SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPU_BIND"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr("relora_ds.ledger.count_everything", lambda: None)
    monkeypatch.setattr(launch, "skip_shared_memory_build", lambda: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: None)
    return chosen


def test_a_rank_that_is_shown_its_own_gpu_drives_that(one_gpu: list[int]) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = "1"
    assert str(launch.start_process_group(replace(ONE_NODE, rank=1, local_rank=1))) == "cuda:0"
    assert one_gpu == [0]
    assert os.environ["LOCAL_RANK"] == "0"


def test_two_ranks_on_a_machine_with_one_gpu_are_refused(one_gpu: list[int]) -> None:
    with pytest.raises(RankError, match=r"this machine has 1 GPU\(s\)"):
        launch.start_process_group(replace(ONE_NODE, rank=1, local_rank=1))
    assert one_gpu == []


@pytest.mark.parametrize(
    ("told", "refused"),
    [("Last error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000", True), ("a timeout", False)],
    ids=["shared", "another error"],
)
def test_ranks_that_are_shown_the_same_gpu_are_refused_when_they_meet(
    monkeypatch: pytest.MonkeyPatch, one_gpu: list[int], told: str, refused: bool
) -> None:
    import deepspeed

    def meet(**_: object) -> NoReturn:
        raise RuntimeError(told)

    monkeypatch.setattr(deepspeed, "init_distributed", meet)
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    line = r"^CUDA_VISIBLE_DEVICES='0': several processes of this machine were shown the same GPU; start one"
    with pytest.raises(RankError if refused else RuntimeError, match=line if refused else told):
        launch.start_process_group(replace(ONE_NODE, rank=1, local_rank=1))
