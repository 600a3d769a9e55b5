"""Distributed tests are real processes over gloo, kept in a pool per world size.

A process needs seconds to import torch and DeepSpeed, so one imports them and all others are forked from it. The processes of one
world size join a group at its first use and serve all tests of the run. A test calls ``run(world_size, function, *args)``: every rank
runs ``function(*args)`` and the results come back in a list, by rank. ``function`` must be importable (top level of a module);
results are pickled.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Client, Connection, Listener
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from relora_ds.launch import libraries, places, process_group

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 180.0
ISA = "ONEDNN_MAX_CPU_ISA"
PRELOADED = [
    "pytest", "relora_ds.training.loop", "transformers.models.llama.modeling_llama", "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.checkpoint.ds_to_universal",
]  # fmt: skip
"""What a first engine takes seconds to import; a module that another version lacks is left out."""
_pools: dict[int, Pool] = {}


@functools.cache
def safe_isa() -> dict[str, str]:
    """What bf16 products need on this CPU, found out once for all workers: each would have to start a process for it."""
    if ISA in os.environ:
        return {}
    libraries.guard_bf16()
    found = os.environ.pop(ISA, None)
    return {} if found is None else {ISA: found}


@functools.cache
def forked() -> ForkServerContext:
    """Makes processes of one that has imported everything, on one thread each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, __name__])
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when it is imported
    forkserver.ensure_running()
    os.environ.pop("OMP_NUM_THREADS")
    os.environ |= {} if before is None else {"OMP_NUM_THREADS": before}
    return context


class RankError(AssertionError):
    """A rank raised; holds its traceback."""


class Pool:
    """``world_size`` worker processes that have joined one gloo group."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.folder = tempfile.TemporaryDirectory(prefix="relora_pool_")
        self.listener = Listener(address=str(Path(self.folder.name) / "control"), family="AF_UNIX", backlog=world_size)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = []
        for rank in range(world_size):
            env = dict(
                safe_isa(),
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(world_size),
                LOCAL_WORLD_SIZE=str(world_size),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
            process = forked().Process(target=_serve, args=(str(self.listener.address), env))
            process.start()
            self.processes.append(process)
        self.connections: list[Connection] = [self.listener.accept() for _ in range(world_size)]
        by_rank = {connection.recv(): connection for connection in self.connections}
        self.connections = [by_rank[rank] for rank in range(world_size)]

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        job = pickle.dumps((function, args))
        for connection in self.connections:
            connection.send_bytes(job)
        answers = []
        for rank, connection in enumerate(self.connections):
            if not connection.poll(TIMEOUT_S):
                self.close()
                raise RankError(f"rank {rank} of {self.world_size} did not answer within {TIMEOUT_S:.0f} s")
            try:
                answers.append(pickle.loads(connection.recv_bytes()))
            except EOFError:
                self.close()
                raise RankError(f"rank {rank} of {self.world_size} died") from None
        failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        if failures:
            self.close()  # the other ranks may wait in a collective for ever: a fresh pool serves the next test
            raise RankError("\n".join(failures))
        return [result for _, result in answers]

    def close(self) -> None:
        _pools.pop(self.world_size, None)
        for process in self.processes:
            process.kill()
            process.join()
        for connection in self.connections:
            connection.close()
        with contextlib.suppress(FileNotFoundError):  # at exit the folder may be gone first
            self.listener.close()
        self.folder.cleanup()


def run(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Runs ``function(*args)`` on every rank of a gloo group of ``world_size`` processes; returns the results by rank."""
    if world_size not in _pools:
        _pools[world_size] = Pool(world_size)
    return _pools[world_size].run(function, *args)


@atexit.register
def close_all() -> None:
    for pool in list(_pools.values()):
        pool.close()


def _serve(address: str, environment: dict[str, str]) -> None:
    import torch

    os.environ |= environment
    gc.freeze()  # or every end of an engine looks through all that was imported
    torch.set_num_threads(1)
    place = places.discover()
    assert place is not None
    libraries.guard_bf16()
    process_group.start(place, timeout_s=TIMEOUT_S)
    connection = Client(address, family="AF_UNIX")
    connection.send(place.rank)
    while True:
        try:
            function, args = pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        try:
            answer: tuple[bool, Any] = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        try:
            # Plain pickle: Connection.send would share tensors through files of the sending process.
            connection.send_bytes(pickle.dumps(answer))
        except (BrokenPipeError, ConnectionResetError):
            return
