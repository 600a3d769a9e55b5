"""What each of several runs at once gets of this machine. PURE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from relora_ds.errors import ConfigError


def shares(
    jobs: int, nproc: int | None, *, cores: int, gpus: Sequence[str], environment: Mapping[str, str]
) -> list[dict[str, str]]:
    """For each of ``jobs`` places, the variables that a run in it gets beside those of this process.

    A run alone gets none: the launcher gives its processes all cores, and each a GPU. Of several each gets as many GPUs as it has
    processes, and its share of the cores, unless OMP_NUM_THREADS says otherwise.

    Args:
        jobs: runs at once.
        nproc: processes of each; None: not said.
        cores: that this process may use.
        gpus: that it sees, as CUDA_VISIBLE_DEVICES names them.
        environment: of this process.

    Raises:
        ConfigError: there are not so many GPUs.
    """
    if jobs == 1:
        return [{}]
    if gpus and nproc is None:
        raise ConfigError("nproc", None, "is required where several runs share the GPUs", "write it into the sweep's file")
    processes = nproc or 1
    if gpus and jobs * processes > len(gpus):
        problem = f"so many runs of {processes} process(es) need {jobs * processes} GPUs, and there are {len(gpus)}"
        raise ConfigError("--jobs", jobs, problem, f"use at most {len(gpus) // processes}")
    found = []
    for place in range(jobs):
        own = {} if environment.get("OMP_NUM_THREADS") else {"OMP_NUM_THREADS": str(max(1, cores // (jobs * processes)))}
        if gpus:
            own["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[place * processes : (place + 1) * processes])
        found.append(own)
    return found
