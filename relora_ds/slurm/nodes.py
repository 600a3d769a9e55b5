"""SLURM's nodes: lists of names and counts as SLURM writes them, the nodes of a job, and the address of a node."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator, Sequence

from relora_ds.comm.network import is_loopback, resolve
from relora_ds.errors import ConfigError
from relora_ds.slurm.client import SlurmError, call

FIRST_PORT, NUM_PORTS = 20000, 10000
"""Below 32768, where Linux begins to give ports to whoever asks for any."""


def hosts(nodelist: str) -> Iterator[str]:
    """The hosts of a node list, in order: ``gpu[01-02,7],rack[1-2]n3`` -> ``gpu01, gpu02, gpu7, rack1n3, rack2n3``."""
    for group in re.findall(r"(?:\[[^\]]*\]|[^,\[])+", nodelist):
        words = re.split(r"\[([^\]]*)\]", group)  # plain text and the inside of brackets in turn
        choices = [_numbers(word) if i % 2 else (word,) for i, word in enumerate(words)]
        yield from map("".join, itertools.product(*choices))


def _numbers(ranges: str) -> list[str]:
    """``08-10,12`` -> ``08, 09, 10, 12``: as wide as the first number of each range is."""
    numbers = []
    for item in ranges.split(","):
        first, _, last = item.partition("-")
        numbers += [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]
    return numbers


def first_host(nodelist: str) -> str:
    """The first host of a node list: ``node[03-05,9],login`` -> ``node03``.

    Raises:
        ConfigError: there is none.
    """
    host = next(hosts(nodelist), "")
    if not host:
        raise ConfigError("SLURM_STEP_NODELIST", nodelist, "names no node", "set MASTER_ADDR")
    return host


def tasks_of_nodes(counts: str) -> list[int]:
    """The tasks of each node: ``4(x2),2`` -> ``[4, 4, 2]``."""
    return [int(tasks) for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts) for _ in range(int(times or 1))]


def port_of(job_id: int, step_id: int, restart: int = 0) -> int:
    """The port on which a step's rank 0 listens: all ranks find the same, and neighbouring jobs, steps and requeues find others."""
    # 6181 and 2389 are primes, about NUM_PORTS / 1.618 and that / 2.588: the first steps and requeues of a job lie far apart, with
    # room for those of the next jobs. A port that another program of the node has taken must not be met again by each requeue.
    return FIRST_PORT + (job_id + 6181 * step_id + 2389 * restart) % NUM_PORTS


def hostfile(nodelist: Sequence[str], slots: int) -> str:
    """DeepSpeed's list of nodes and their GPUs: ``node1 slots=8``, one a line."""
    return "".join(f"{node} slots={slots}\n" for node in nodelist)


def nodes_of_job(job_id: int | str) -> list[str]:
    """The nodes of a running job.

    Raises:
        ConfigError: SLURM does not know it, or has not given it nodes yet.
    """
    nodes = list(hosts(_ask("squeue", "--noheader", "--format=%N", f"--jobs={job_id}").strip()))
    if not nodes:
        raise ConfigError("job", job_id, "SLURM names no nodes for it", "name a job that runs")
    return nodes


def reachable(node: str, pause_s: float = 0.0) -> str:
    """A name or address of ``node`` that this machine can connect to, asked of SLURM where the name alone is of no use.

    A name may be unknown here, or stand for 127.0.1.1 in the node's own hosts file.

    Args:
        node: its name.
        pause_s: to wait before SLURM is asked, so that many ranks do not ask at once.

    Raises:
        ConfigError: neither the name nor SLURM's address of the node can be resolved.
    """
    own = resolve(node)
    if own and not is_loopback(own):
        return node
    time.sleep(pause_s)
    found = re.search(r"\bNodeAddr=(\S+)", _ask("scontrol", "--oneliner", "show", "node", node))
    if found and (address := resolve(found[1])) and not (own and is_loopback(address)):
        return found[1]
    if own:  # this machine itself, by all that is known
        return node
    raise ConfigError("MASTER_ADDR", node, "this name does not resolve, and SLURM gives no address for it", "set MASTER_ADDR")


def _ask(*command: str) -> str:
    """What a SLURM program prints; nothing if it is not installed, fails or does not answer."""
    try:
        return call(*command)
    except (ConfigError, SlurmError):
        return ""
