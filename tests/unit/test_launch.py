"""Who am I under each launcher, how processes on one machine are started and waited for, and the guards around CPUs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from relora_ds import launch
from relora_ds.errors import ConfigError
from relora_ds.launch import Place, attempt, discover, first_host

SRUN = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "node[03-04]",
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


def test_srun_on_several_nodes() -> None:
    place = discover(SRUN)
    assert place == Place(5, 8, 1, 4, "node03", 29500 + 4567, "srun")
    assert discover(SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) == Place(0, 8, 0, 4, "node03", 29500 + 4567, "srun")


def test_srun_takes_a_master_that_the_job_script_names() -> None:
    place = discover(SRUN | {"MASTER_ADDR": "node04-ib", "MASTER_PORT": "12345"})
    assert place is not None
    assert (place.master_addr, place.master_port) == ("node04-ib", 12345)


def test_srun_on_one_node_needs_no_name() -> None:
    one_node = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_PROCID": "1"}
    assert discover(SRUN | one_node) == Place(1, 2, 1, 2, "127.0.0.1", 29500 + 4567, "srun")


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


def test_open_mpi_over_nodes_without_mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR=None: .*rank 0's address; set it, or install relora_ds\[mpi\]"):
        discover(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"})


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node[03-05,9],login", "node03"),
        ("node7", "node7"),
        ("a,b", "a"),
        ("gpu[1-2]", "gpu1"),
        ("rack[1-2]n[3,4]", "rack1n3"),
        ("n[01,05]-ib", "n01-ib"),
        ("n[01,05]-ib,login", "n01-ib"),
        ("login,node[03-05]", "login"),
        ("node[007]", "node007"),
    ],
)
def test_first_host_of_a_node_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_first_host_of_nothing() -> None:
    with pytest.raises(ConfigError, match="names no node"):
        first_host("")


def test_free_port_can_be_bound() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", launch.free_port()))


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


@pytest.mark.usefixtures("clean")
def test_export_tells_torch_and_deepspeed_the_place() -> None:
    launch._export(Place(5, 8, 1, 4, "node03", 34067, "srun"))
    assert {name: os.environ[name] for name in PLACE} == PLACE
    assert "GLOO_SOCKET_IFNAME" not in os.environ  # gloo must reach the other node


@pytest.mark.usefixtures("clean")
@pytest.mark.skipif(not any(name == "lo" for _, name in socket.if_nameindex()), reason="no loopback interface named lo")
def test_export_keeps_gloo_of_one_node_on_loopback() -> None:
    place = Place(1, 2, 1, 2, "127.0.0.1", 29500, "single")
    launch._export(place)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    os.environ["GLOO_SOCKET_IFNAME"] = "eth1"
    launch._export(place)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth1"


# Waiting for processes

Start = Callable[[str], subprocess.Popen]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts small Python programs, of which none outlives the test."""
    started: list[subprocess.Popen] = []

    def run(program: str) -> subprocess.Popen:
        started.append(subprocess.Popen([sys.executable, "-S", "-E", "-c", program], stdout=subprocess.PIPE))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_all_succeed(start: Start) -> None:
    assert launch._wait([start("pass"), start("import time; time.sleep(0.2)")]) == 0


@pytest.mark.parametrize("code", [75, 2])
def test_all_end_in_order_with_one_code(start: Start, code: int) -> None:
    """The second is given the time that it needs to end by itself."""
    processes = [start(f"raise SystemExit({code})"), start(f"import time; time.sleep(0.5); raise SystemExit({code})")]
    assert launch._wait(processes) == code
    assert [process.returncode for process in processes] == [code, code]


@pytest.mark.parametrize(
    ("crash", "code"),
    [("raise SystemExit(3)", 3), ("1 / 0", 1), ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 1)],
    ids=["exit", "exception", "killed"],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_crash_of_any_process_stops_the_others(start: Start, crash: str, code: int, place: int) -> None:
    began = time.monotonic()
    processes = [start(crash if i == place else "import time; time.sleep(30)") for i in range(3)]
    assert launch._wait(processes) == code
    assert time.monotonic() - began < launch.GRACE_S / 2
    assert [process.returncode for i, process in enumerate(processes) if i != place] == [-signal.SIGTERM, -signal.SIGTERM]


def test_a_crash_outweighs_an_orderly_end(start: Start) -> None:
    """A job that seems to have stopped with a checkpoint would be run again for ever."""
    assert launch._wait([start("raise SystemExit(75)"), start("import time; time.sleep(0.5); raise SystemExit(1)")]) == 1


def test_processes_that_do_not_stop_are_not_waited_for_longer_than_the_grace(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 0.3)
    ignores = start("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(30)")
    assert ignores.stdout is not None
    ignores.stdout.readline()
    began = time.monotonic()
    assert launch._wait([start("raise SystemExit(1)"), ignores]) == 1
    assert 0.3 <= time.monotonic() - began < 10
    assert ignores.poll() is None  # spawn kills it


# Starting processes: a shell script stands in for the Python interpreter


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes `spawn` run a shell script instead of Python; the script writes to files in the returned folder."""

    def install(script: str) -> Path:
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\ncd '{tmp_path}'\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        return tmp_path

    return install


def test_spawn_gives_each_process_its_place(stand_in: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    folder = stand_in('env > "env.$RANK"; echo "$@" > "arguments.$RANK"')
    assert launch.spawn(["train", "recipe.yaml", "run.seed=7"], 2) == 0
    ports = set()
    for rank in range(2):
        assert (folder / f"arguments.{rank}").read_text() == "-m relora_ds.cli train recipe.yaml run.seed=7\n"
        environment = dict(line.split("=", 1) for line in (folder / f"env.{rank}").read_text().splitlines() if "=" in line)
        ports.add(environment["MASTER_PORT"])
        assert discover(environment) == Place(rank, 2, rank, 2, "127.0.0.1", int(environment["MASTER_PORT"]), "torchrun")
        assert environment["OMP_NUM_THREADS"] == "3"
    assert len(ports) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_spawn_passes_a_signal_on_once_and_returns_the_code(stand_in: Callable[[str], Path], number: signal.Signals) -> None:
    folder = stand_in('trap \'echo stopped >> "stopped.$RANK"; exit 75\' TERM\ntouch "ready.$RANK"\nwhile :; do sleep 0.02; done')
    before = signal.getsignal(number)

    def interrupt() -> None:
        while signal.getsignal(number) is before or not all((folder / f"ready.{rank}").exists() for rank in range(2)):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert launch.spawn(["train"], 2) == 75
    thread.join()
    assert [(folder / f"stopped.{rank}").read_text() for rank in range(2)] == ["stopped\n", "stopped\n"]
    assert signal.getsignal(number) is before


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
