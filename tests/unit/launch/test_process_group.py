"""Who am I under each launcher, how the ranks meet and leave, and the guards around CPUs."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch.distributed as dist

from relora_ds.comm import network
from relora_ds.errors import AllError, ConfigError, RankError, StartError
from relora_ds.launch import devices, launcher, libraries, meeting, places, process_group
from relora_ds.launch.devices import Gpu
from relora_ds.launch.meeting import Card
from relora_ds.launch.places import Place, discover
from relora_ds.run.lock import boot_id
from relora_ds.slurm import nodes as slurm_nodes
from tests.unit.launch.launchers import BATCHSPAWNER, OVER_NODES, PLACE, SRUN, TORCHRUN


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
        places._mpi_place.cache_clear()
        return comm

    return install


@pytest.mark.usefixtures("clean")
def test_mpirun_over_nodes_asks_rank_0_at_the_start_alone(world: Callable[[int], World]) -> None:
    """`discover` serves error messages, too, which ranks write unequally often."""
    comm = world(2)
    place = discover(OVER_NODES)
    assert place == Place(2, 4, 0, 2, "", 29500, "mpirun")
    assert comm.asked == 0
    found = process_group.find_master(place)
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
    found = process_group.find_master(Place(0, 4, 0, 2, "", 29500, "mpirun"))
    assert (found.master_addr, found.master_port) == ("10.0.0.1", int(chosen or 5555))


def test_an_mpi_that_tells_little_is_asked_once(world: Callable[[int], World]) -> None:
    comm = world(3)
    for _ in range(3):
        place = discover({"PMIX_RANK": "3", "MASTER_ADDR": "node1", "MASTER_PORT": "7777"})
        assert place == Place(3, 4, 1, 2, "node1", 7777, "mpirun")
    assert comm.asked == 1


def test_a_process_alone() -> None:
    place = places.single()
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (0, 1, 0, 1)
    assert place.is_main


NODES = Place(5, 8, 1, 4, "node03", 24567, "srun")
ONE_NODE = Place(1, 2, 1, 2, "127.0.0.1", 29500, "single")


@pytest.mark.usefixtures("clean")
def test_export_tells_torch_and_deepspeed_the_place() -> None:
    process_group._export(Place(5, 8, 1, 4, "node03", 34067, "srun"))
    assert {name: os.environ[name] for name in PLACE} == PLACE


@pytest.mark.usefixtures("clean")
@pytest.mark.skipif(not any(name == "lo" for _, name in socket.if_nameindex()), reason="no loopback interface named lo")
def test_gloo_of_one_node_stays_on_loopback() -> None:
    process_group._choose_interface(ONE_NODE)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("place", [NODES, ONE_NODE], ids=["nodes", "one node"])
def test_gloo_is_left_to_the_user(place: Place) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "eth1"
    process_group._choose_interface(place)
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
    process_group._choose_interface(replace(NODES, launcher=launcher))
    assert asked == [*order, network.ANYWHERE]
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


@pytest.mark.usefixtures("clean")
def test_gloo_is_left_alone_where_all_ways_are_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "address_towards", lambda hosts: None)
    process_group._choose_interface(NODES)
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_the_master_of_srun_is_looked_up_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(slurm_nodes, "reachable", lambda node, pause_s: pauses.append(pause_s) or {"node03": "10.0.0.3"}[node])
    assert process_group.find_master(NODES) == replace(NODES, master_addr="10.0.0.3")
    process_group.find_master(replace(NODES, rank=499))
    assert pauses == pytest.approx([0.1, 9.98]), "one rank after the other"
    named = replace(NODES, launcher="torchrun")
    assert process_group.find_master(named) is named
    assert process_group.find_master(ONE_NODE) is ONE_NODE


# Leaving together: two processes over gloo

LEAVER = """
import os, sys, time
from datetime import timedelta
import torch.distributed as dist
from relora_ds.launch import launcher, libraries, places, process_group
process_group.MEETING_S = 1.0
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
{before}
began = time.monotonic()
process_group.leave()
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


def test_shared_memory_collective_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed
    from deepspeed.comm.torch import build_shm_op

    builder = deepspeed.accelerator.get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None:
        pytest.skip("this accelerator has no such operator")
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, builder.NAME, True)
    libraries.skip_shared_memory_build()
    assert deepspeed.ops.__compatible_ops__[builder.NAME] is False  # first: the next line would compile for a minute
    assert build_shm_op() is None


@pytest.mark.parametrize(("gpus", "processes", "fits"), [(0, 4, True), (2, 2, True), (2, 3, False)])
def test_one_process_drives_one_gpu(monkeypatch: pytest.MonkeyPatch, gpus: int, processes: int, fits: bool) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    if fits:
        launcher.check_devices(processes)
    else:
        with pytest.raises(ConfigError, match=r"--nproc=3: this machine has 2 GPU\(s\)"):
            launcher.check_devices(processes)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, clean: None) -> Job:
    """This process is a rank of a job whose other ranks are only what they say of themselves; no process group is started."""
    import deepspeed

    stand_in = Job()
    for name in (*devices.SHOWN_GPUS, *devices.GRANTED_GPUS, "SLURMD_NODENAME", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr("relora_ds.comm.counter.count_everything", lambda: None)
    monkeypatch.setattr(libraries, "skip_shared_memory_build", lambda: None)
    monkeypatch.setattr(process_group, "_open_store", lambda limit_s: stand_in.store)
    monkeypatch.setattr(process_group, "_meetings", itertools.repeat(0))
    monkeypatch.setattr(meeting, "PARTING_S", 0.1)
    monkeypatch.setattr(meeting, "SPEAK_S", 0.0)
    monkeypatch.setattr(devices, "visible", lambda: list(stand_in.gpus))
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(stand_in.gpus))
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(stand_in.gpus))
    monkeypatch.setattr("torch.cuda.set_device", stand_in.chosen.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **words: stand_in.joined.append((backend, words)))
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: None)
    return stand_in


class Job:
    """The other ranks of a job, and what this one does.

    Attributes:
        gpus: that this rank is shown.
        chosen: the GPU that it takes.
        joined: the process group that it starts.
    """

    def __init__(self) -> None:
        self.store = dist.HashStore()
        self.gpus: tuple[Gpu, ...] = ()
        self.chosen: list[int] = []
        self.joined: list[tuple[str, dict[str, Any]]] = []

    def has(self, *cards: Card) -> None:
        """The other ranks say this; this one is rank 0."""
        for card in cards:
            here = replace(card, boot=boot_id())
            dist.PrefixStore("relora_ds/0/0", self.store).set(meeting._key(card.rank), json.dumps(asdict(here)))

    def start(self, local_rank: int | None = 0, world_size: int = 2, **more: Any) -> tuple[Place, Any]:
        """This rank, 0 of ``world_size``, starts; ``local_rank`` is what its launcher says."""
        return process_group.start(Place(0, world_size, local_rank, world_size, "127.0.0.1", 29500, "torchrun"), 0.5, **more)


A, B = Gpu("GPU-a", "0000:1b:00"), Gpu("GPU-b", "0000:43:00")
HERE = socket.gethostname()


def test_a_rank_that_is_shown_its_own_gpu_drives_that(job: Job) -> None:
    """LOCAL_RANK stays the true one: under mpirun DeepSpeed compares it with Open MPI's. NCCL is bound to the GPU all the same."""
    job.gpus = (B,)
    job.has(Card(1, HERE, 0, (A,)))
    _, device = job.start(local_rank=1)
    assert str(device) == "cuda:0"
    assert (job.chosen, os.environ["LOCAL_RANK"], libraries.naming_gpu().device_rank) == ([0], "1", 0)
    ((backend, words),) = job.joined
    assert (backend, words["device_id"], words["world_size"]) == ("nccl", device, 2)
    assert job.store.timeout == timedelta(seconds=0.5), "that of the collectives, however long the ranks could take to come"


def test_arguments_that_name_a_gpu_stay(job: Job) -> None:
    os.environ["LOCAL_RANK"] = "3"
    given = SimpleNamespace(device_rank=7)
    assert libraries.naming_gpu(given) is given and libraries.naming_gpu(None) is None  # on a CPU
    job.gpus = (A,)
    assert libraries.naming_gpu(given).device_rank == 7
    assert vars(libraries.naming_gpu(SimpleNamespace(local_rank=3))) == {"local_rank": 3, "device_rank": 0}


def test_a_rank_that_is_shown_all_gpus_drives_its_own(job: Job) -> None:
    job.gpus = (A, B)
    job.has(Card(1, HERE, 0, (A, B)))
    assert str(job.start(local_rank=1)[1]) == "cuda:1"
    assert (job.chosen, libraries.naming_gpu()) == ([1], None)


def test_two_ranks_on_a_machine_with_one_gpu_are_refused(job: Job) -> None:
    job.gpus = (A,)
    job.has(Card(1, HERE, 1, (A,)))
    with pytest.raises(ConfigError, match=r"rank 1 on .* drives the same GPU GPU-a as rank 0, and is shown 1: start one process"):
        job.start()
    assert (job.chosen, job.joined) == ([], [])


def test_a_job_over_gpus_and_cpus_is_refused(job: Job) -> None:
    job.gpus = (A,)
    job.has(Card(1, "node2", 0))
    with pytest.raises(RankError, match="rank 1 on node2: drives the CPU"):
        job.start()
    assert job.joined == []


def test_gpus_that_slurm_gave_and_that_are_not_seen_are_an_error(job: Job) -> None:
    os.environ.update(SLURM_GPUS_ON_NODE="8", SLURMD_NODENAME="gpu12")
    with pytest.raises(AllError, match="^SLURM_GPUS_ON_NODE='8': SLURM gave gpu12 GPUs, but PyTorch sees none"):
        job.start(world_size=1)
    job.has(Card(1, "gpu13", 0, (A,)))
    with pytest.raises(RankError, match="^rank 0 on gpu12: SLURM_GPUS_ON_NODE"):
        job.start()
    assert job.joined == []


def test_an_accelerator_left_over_from_a_login_node_is_not_believed(job: Job) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    job.start(world_size=1)
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    job.gpus = (A,)
    job.start(world_size=1)
    assert "DS_ACCELERATOR" not in os.environ
    os.environ["DS_ACCELERATOR"] = "cpu"
    libraries.quiet_libraries()
    assert "DS_ACCELERATOR" not in os.environ


def test_what_the_launcher_does_not_say_is_counted(job: Job) -> None:
    job.has(Card(1, "node2", None), Card(2, HERE, None))
    place, _ = process_group.start(Place(0, 3, None, None, "node1", 29500, "torchrun"), 0.5)
    assert (place.local_rank, place.local_world_size, place.is_one_node) == (0, 2, False)
    assert (os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]) == ("0", "2")


def test_a_refusal_is_told_to_all(job: Job) -> None:
    refusal = ConfigError("data.path", "/data", "is not there")
    job.has(Card(1, "node2", 0))
    with pytest.raises(RankError, match="data.path='/data': is not there") as error:
        job.start(refusal=refusal)
    assert (error.value.rank, error.value.host, error.value.speaker) == (0, HERE, 0)


def test_a_rank_that_refuses_where_rank_0_is_not_says_so_itself(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: float) -> NoReturn:
        raise RuntimeError("The client socket has timed out")

    monkeypatch.setattr(process_group, "_open_store", gone)
    place = Place(3, 4, 1, 2, "node1", 29500, "srun")
    monkeypatch.setattr(slurm_nodes, "reachable", lambda node, pause_s: node)
    with pytest.raises(RankError, match=r"rank 3 on .*: relora.rank=0: too small") as error:
        process_group.start(place, refusal=ConfigError("relora.rank", 0, "too small"))
    assert error.value.speaker == 3
    with pytest.raises(RuntimeError, match="timed out"):
        process_group.start(place)


def test_a_name_that_one_rank_cannot_resolve_is_told_by_it(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(node: str, pause_s: float) -> NoReturn:
        raise ConfigError("MASTER_ADDR", node, "this name does not resolve")

    monkeypatch.setattr(slurm_nodes, "reachable", unknown)
    with pytest.raises(RankError, match="rank 3 on .*: MASTER_ADDR='node1'") as error:
        process_group.start(Place(3, 4, 1, 2, "node1", 29500, "srun"))
    assert error.value.speaker == 3


def test_a_port_that_is_taken_is_named(clean: None) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        place = replace(places.single(), master_port=other.getsockname()[1])
        with pytest.raises(StartError, match=rf"port {place.master_port} of .* is in use by another program: another start"):
            process_group.start(place)


@pytest.mark.parametrize(
    ("told", "refused"),
    [("Last error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000", True), ("a timeout", False)],
    ids=["shared", "another error"],
)
def test_ranks_that_are_shown_the_same_gpu_are_refused_when_they_meet(
    monkeypatch: pytest.MonkeyPatch, job: Job, told: str, refused: bool
) -> None:
    """Where PyTorch does not say which GPU it is, NCCL does."""

    def meet(*_: object, **__: object) -> NoReturn:
        raise RuntimeError(told)

    monkeypatch.setattr(dist, "init_process_group", meet)
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    job.gpus = (Gpu("", ""),)
    job.has(Card(1, HERE, 1, (Gpu("", ""),)))
    line = r"CUDA_VISIBLE_DEVICES='0': several processes of this machine were shown the same GPU; start one"
    with pytest.raises(RankError if refused else RuntimeError, match=line if refused else told):
        job.start()


def test_an_error_after_the_start_is_of_all_or_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    error, place = ConfigError("model.path", "m", "is not there"), Place(1, 2, 1, 2, "127.0.0.1", 29500, "torchrun")
    monkeypatch.setattr(process_group, "_common", dist.HashStore())
    monkeypatch.setattr(meeting, "ANSWER_S", 0.1)
    monkeypatch.setattr(meeting, "SPEAK_S", 0.0)
    mine = process_group.of_all_or_one(error, place)
    assert isinstance(mine, RankError) and mine.speaker == 1 and str(mine).endswith(": model.path='m': is not there")
    assert process_group.of_all_or_one(error, place) is error  # it is the second to find it
    assert process_group.of_all_or_one(mine, place) is mine
    assert process_group.of_all_or_one(error, replace(place, world_size=1)) is error


# Who is started by a launcher


def test_the_one_task_of_a_step_starts_ranks_itself(monkeypatch: pytest.MonkeyPatch, clean: None) -> None:
    for name, value in BATCHSPAWNER.items():
        monkeypatch.setenv(name, value)
    assert places.launched() is None
    told = places.launched("srun")
    assert told is not None and told.world_size == 1


def test_a_container_that_lets_nothing_through_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "discover", lambda: None)
    with pytest.raises(ConfigError, match="^--under='srun': nothing in the environment says which rank this is; .*--cleanenv"):
        places.launched("srun")
    assert places.launched() is None
