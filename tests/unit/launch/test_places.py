"""Who am I under each launcher."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import NoReturn

import pytest

from relora_ds.errors import ConfigError
from relora_ds.launch import places
from relora_ds.launch.places import Place, discover
from relora_ds.slurm import nodes as slurm_nodes
from tests.unit.launch.launchers import (
    AZURE,
    BATCHSPAWNER,
    INTERACTIVE,
    OPEN_MPI,
    OVER_NODES,
    PLACES,
    PTY,
    PYTORCHJOB,
    SAGEMAKER,
    SET_ONCE,
    SRUN,
    STEP_8_OVER_2,
    TORCHRUN,
    WRAPPED,
)


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


# Under all launchers


@pytest.mark.parametrize(("environment", "expected"), PLACES.values(), ids=PLACES)
def test_a_place_under_each_launcher(environment: dict[str, str], expected: tuple[object, ...] | None) -> None:
    place = discover(environment)
    found = place and (place.rank, place.world_size, place.local_rank, place.local_world_size, place.master_addr)
    assert found == expected


def test_several_nodes_are_not_taken_for_one_where_nobody_says_how_many_ranks_are_here() -> None:
    for environment in (WRAPPED, PYTORCHJOB, SAGEMAKER, AZURE):
        place = discover(environment)
        assert place is not None and not place.is_one_node


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        (STEP_8_OVER_2 | SET_ONCE, r"RANK=0: this is task 5 of srun; leave RANK and WORLD_SIZE to srun"),
        (
            STEP_8_OVER_2 | {"RANK": "0", "WORLD_SIZE": "1"},
            r"WORLD_SIZE=1: srun started 8 tasks",
        ),  # a pod's, or a shell's, left over
        (STEP_8_OVER_2 | {"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "0"}, "WORLD_SIZE=1"),
        ({"RANK": "zero", "WORLD_SIZE": "1"}, "RANK='zero': is no number"),
    ],
)
def test_variables_that_contradict_srun_are_refused(environment: dict[str, str], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        discover(environment)


def test_an_mpi4py_without_an_mpi_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        __spec__ = SimpleNamespace()

        def __getattr__(self, name: str) -> NoReturn:
            raise RuntimeError("cannot load MPI library\nlibmpi.so: cannot open shared object file")

    monkeypatch.setitem(sys.modules, "mpi4py", Broken())
    places._mpi_place.cache_clear()
    with pytest.raises(ConfigError, match=r"mpi4py=None: mpi4py finds no MPI library here \(cannot load MPI library libmpi"):
        discover({"PMIX_RANK": "3", "MASTER_ADDR": "node1"})


def test_a_restart_listens_on_another_port() -> None:
    """A program that took the port would meet every start of the job."""
    ports = {place.master_port for n in ("", "1", "2") if (place := discover(SRUN | {"SLURM_RESTART_COUNT": n}))}
    assert len(ports) == 3


def test_the_one_task_of_a_step_is_known() -> None:
    notebook, rank = discover(BATCHSPAWNER), discover(SRUN)
    assert notebook is not None and notebook.is_lone_task
    assert rank is not None and not rank.is_lone_task
