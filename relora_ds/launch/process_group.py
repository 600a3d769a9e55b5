"""How the ranks come together and part, whoever started them: torchrun, deepspeed, srun, mpirun or our own launcher."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from typing import Any

from relora_ds.comm import network
from relora_ds.console import say
from relora_ds.environment import node_name
from relora_ds.errors import AllError, ConfigError, RankError, StartError
from relora_ds.launch import devices, libraries, meeting, places
from relora_ds.launch.meeting import Card
from relora_ds.launch.places import Place
from relora_ds.run.lock import boot_id
from relora_ds.slurm import nodes as slurm_nodes

ASK_PAUSE_S = 0.02
"""Between the questions of two ranks to SLURM's controller: 500 at once are a storm to it, which it may answer by limits."""
MEETING_S = 60.0
"""How long a rank that has finished waits for the others."""
_meetings = itertools.count()
_common: Any = None
"""Where the ranks met, for as long as rank 0 lives."""


def _ask_rank_0(port: int | None) -> tuple[str, int]:
    """Rank 0's address and a port that is free there, or ``port``, over MPI. All ranks must call this."""
    comm = places.load_mpi().COMM_WORLD
    names = comm.allgather(socket.gethostname())
    found = None
    if comm.Get_rank() == 0:
        # An address, because the others may not know the name; not the one that the name has here, which may be 127.0.1.1.
        others = [name for name in names if name != names[0]]
        found = network.address_towards([*others, names[0], network.ANYWHERE]) or names[0], port or network.free_port()
    return comm.bcast(found, root=0)


def require() -> None:
    """Starts torch.distributed and DeepSpeed as the launcher says, where the user's script has not done so."""
    import torch.distributed as dist

    if not dist.is_initialized():
        start(places.discover() or places.single())


def start(place: Place, timeout_s: float = 1800.0, refusal: ConfigError | None = None) -> tuple[Place, Any]:
    """Joins the job: NCCL on CUDA, gloo on CPU, under torch.distributed and DeepSpeed alike.

    Args:
        place: of this process.
        timeout_s: how long a collective may take.
        refusal: why this rank cannot train, to be told to the others.

    Returns:
        The place, complete, and this process's torch device.

    Raises:
        AllError: all ranks find the same obstacle: their refusals, or GPUs that were asked for and are not seen.
        RankError: some of them do, or two ranks drive the same GPU, or this one cannot reach rank 0.
        StartError: the ranks did not come together.
    """
    import torch
    import torch.distributed as dist

    libraries.forget_cpu()
    host = node_name()
    gpus = devices.visible()
    problem = refusal or devices.missing(os.environ, host, len(gpus))
    card = Card(place.rank, host, place.local_rank, tuple(gpus), str(problem or ""), boot_id())
    place, store = _meet(place, card, min(timeout_s, meeting.REMIND_S if problem else meeting.ARRIVAL_S))
    number = devices.own(place.local_rank or 0, len(gpus)) if gpus else None
    _choose_interface(place)
    _export(place)
    if number is not None:
        torch.cuda.set_device(number)
    import deepspeed

    from relora_ds.comm import counter

    libraries.skip_shared_memory_build()
    store.set_timeout(timedelta(seconds=timeout_s))  # as torch does with a store of its own
    device = torch.device("cpu") if number is None else torch.device("cuda", number)
    with _one_gpu_each(place.rank, host):
        # Not by deepspeed.init_distributed, which binds NCCL to the GPU numbered LOCAL_RANK: a rank may be shown its own alone.
        dist.init_process_group(
            "gloo" if number is None else "nccl", store=dist.PrefixStore("default_pg", store), rank=place.rank,
            world_size=place.world_size, timeout=timedelta(seconds=timeout_s), **devices.bound(device, place.world_size),
        )  # fmt: skip
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=timeout_s))
    counter.count_everything()
    return place, device


def _meet(place: Place, card: Card, limit_s: float) -> tuple[Place, Any]:
    """The place as the ranks know it once they have met, and their store; raises as :func:`start`."""
    import torch.distributed as dist

    global _common
    try:
        place = find_master(place)
        _export(place)
        store = _open_store(limit_s)
        _common = dist.PrefixStore(f"relora_ds/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_meetings)}", store)
        nodes = list(slurm_nodes.hosts(places.step_nodes(os.environ))) if place.launcher == "srun" else []
        cards = meeting.meet(_common, card, place.world_size, limit_s, say, nodes)
    except (RankError, StartError):
        raise
    except ConfigError as error:
        raise RankError(card.rank, card.host, card.problem or str(error), speaker=card.rank) from None
    except RuntimeError as error:
        if card.problem:
            raise RankError(card.rank, card.host, card.problem, speaker=card.rank) from None
        if "EADDRINUSE" in str(error):
            problem = f"port {place.master_port} of {card.host} is in use by another program"
            raise StartError(f"{problem}: another start of a SLURM job takes another one; MASTER_PORT names one") from None
        raise
    try:
        meeting.judge(cards)
    except ConfigError:
        meeting.part(_common, place.rank, place.world_size)
        raise
    return meeting.complete(place, cards), store


def _open_store(limit_s: float) -> Any:
    """The store at rank 0, or at torchrun's agent."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=limit_s)))
    store.set_timeout(timedelta(seconds=limit_s))
    return store


def of_all_or_one(error: ConfigError, place: Place) -> ConfigError:
    """An error that this rank found after the start as what it is: all ranks found it, or this one did."""
    if isinstance(error, (AllError, RankError)) or place.world_size == 1:
        return error
    if _common is not None and meeting.is_found_by_all(_common, place.rank, place.world_size):
        return error
    return RankError(place.rank, node_name(), str(error), speaker=place.rank)


@contextmanager
def _one_gpu_each(rank: int, host: str) -> Iterator[None]:
    """Says in one line what NCCL finds of several processes that were shown the same GPU, where PyTorch could not tell."""
    try:
        yield
    except RuntimeError as error:
        if "Duplicate GPU" not in str(error):
            raise
        shown = {name: os.environ[name] for name in devices.SHOWN_GPUS if name in os.environ}
        name, value = next(iter(shown.items()), (devices.SHOWN_GPUS[0], None))
        problem = f"{name}={value!r}: several processes of this machine were shown the same GPU"
        way_out = "start one process for each GPU, and show each its own or all of them"
        raise RankError(rank, host, f"{problem}; {way_out}", speaker=rank) from None


def _export(place: Place) -> None:
    """torch.distributed and DeepSpeed read the place from the environment, whichever launcher it came from.

    LOCAL_RANK is the true one, whatever the number of the GPU: under mpirun DeepSpeed compares it with Open MPI's.
    """
    values = {
        "RANK": place.rank, "WORLD_SIZE": place.world_size, "LOCAL_RANK": place.local_rank,
        "LOCAL_WORLD_SIZE": place.local_world_size, "MASTER_ADDR": place.master_addr, "MASTER_PORT": place.master_port,
    }  # fmt: skip
    os.environ.update({name: str(value) for name, value in values.items() if value is not None})


def find_master(place: Place) -> Place:
    """The place with an address of rank 0 that can be connected to. Not part of `discover`, which any rank may call at any time."""
    if place.is_one_node or place.launcher not in ("srun", "mpirun"):
        return place
    if not place.master_addr:
        chosen = os.environ.get("MASTER_PORT")
        address, port = _ask_rank_0(int(chosen) if chosen else None)
        place = replace(place, master_addr=address, master_port=port)
    return replace(place, master_addr=slurm_nodes.reachable(place.master_addr, pause_s=ASK_PAUSE_S * place.rank))


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
    return list(islice((node for node in slurm_nodes.hosts(places.step_nodes(env)) if node != env.get("SLURMD_NODENAME")), 1))


def leave() -> None:
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
