"""Places in jobs of a real SLURM, of three versions, as `benchmarks/slurm_environments.py` recorded what their tasks were told."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

from relora_ds.launch import devices
from relora_ds.launch.places import discover

RECORDED: dict[str, dict[str, dict[str, dict[str, str]]]] = json.loads(
    (Path(__file__).parents[1] / "data" / "slurm_environments.json").read_text()
)
SHELLS = ("batch", "shell")
JOBS = [
    pytest.param({task: told for task, told in tasks.items() if task not in SHELLS}, id=f"{version}-{shape}")
    for version, shapes in RECORDED.items()
    for shape, tasks in shapes.items()
    if len(tasks) > 2
]


@pytest.mark.parametrize("tasks", JOBS)
def test_every_task_finds_its_place(tasks: dict[str, dict[str, str]]) -> None:
    """A task's name is its rank; its node, and so its local rank, is told by which others are there."""
    nodes = defaultdict(list)
    for rank in sorted(map(int, tasks)):
        nodes[tasks[str(rank)]["SLURMD_NODENAME"]].append(rank)
    masters = set()
    for task, told in tasks.items():
        place = discover(told | {"MASTER_ADDR": "n1"} if "OMPI_COMM_WORLD_RANK" in told else told)  # asked of MPI, if not given
        assert place is not None
        mates = nodes[told["SLURMD_NODENAME"]]
        assert (place.rank, place.world_size) == (int(task), len(tasks))
        assert (place.local_rank, place.local_world_size) == (mates.index(int(task)), len(mates))
        assert place.is_one_node == (len(nodes) == 1)
        masters.add((place.master_addr, place.master_port))
    assert len(masters) == 1
    assert masters.pop()[0] == ("127.0.0.1" if len(nodes) == 1 else "n1")


@pytest.mark.parametrize("version", RECORDED)
def test_scripts_and_shells_are_no_ranks(version: str) -> None:
    for shape, tasks in RECORDED[version].items():
        for name in SHELLS:
            if name in tasks:
                assert discover(tasks[name]) is None, shape


def test_what_slurm_says_of_a_tasks_gpus_is_no_word_on_what_it_sees() -> None:
    """So that which GPU is a rank's own is decided by what it sees."""

    def of_rank_1(version: str, shape: str) -> tuple[bool, bool, str]:
        told = RECORDED[version][shape]["1"]
        return "SLURM_GPUS_PER_TASK" in told, "SLURM_TRES_PER_TASK" in told, told["CUDA_VISIBLE_DEVICES"]

    assert of_rank_1("20.11.4", "gpus_per_task") == (True, False, "0,1")
    assert of_rank_1("20.11.4", "srun_gpus_per_task") == (False, False, "0,1")
    assert of_rank_1("22.05.8", "gpus_per_task") == (True, False, "1")
    assert of_rank_1("22.05.8", "srun_gpus_per_task") == (False, False, "1")
    assert of_rank_1("24.11.5", "gpus_per_task") == (False, True, "1")
    assert of_rank_1("24.11.5", "gpus_per_task_unbound") == (False, True, "0,1")


def shows_gpus(tasks: dict[str, dict[str, str]]) -> bool:
    return any("SLURM_JOB_GPUS" in told for told in tasks.values())


@pytest.mark.parametrize("tasks", JOBS)
def test_no_two_ranks_of_a_node_drive_the_same_gpu(tasks: dict[str, dict[str, str]]) -> None:
    """Whatever each is shown: all of the node, its own, or what no variable says (srun --gpu-bind=none), which is all."""
    drives = defaultdict(list)
    for told in tasks.values():
        place = discover(told | {"MASTER_ADDR": "n1"} if "OMPI_COMM_WORLD_RANK" in told else told)
        assert place is not None
        shown = told.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
        drives[told["SLURMD_NODENAME"]].append(shown[devices.own(place.local_rank, len(shown))])
    for gpus in drives.values():
        assert sorted(gpus) == ["0", "1"][: len(gpus)]


@pytest.mark.parametrize("tasks", JOBS)
def test_gpus_that_slurm_gave_are_missed(tasks: dict[str, dict[str, str]]) -> None:
    for told in tasks.values():
        error = devices.missing(told, "n1", num_visible=0)
        assert (error is not None) == shows_gpus(tasks)
        assert devices.missing(told, "n1", num_visible=1) is None
