"""Which GPU is whose: PURE where it decides, so that no GPU is needed to try it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from relora_ds.errors import ConfigError

SHOWN_GPUS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
GRANTED_GPUS = ("SLURM_GPUS_ON_NODE", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
"""What SLURM says of the GPUs that it gave: a number, or their numbers."""
NONE_SHOWN = ("", "-1", "NoDevFiles")
"""Values of SHOWN_GPUS that hide all GPUs: the user's, or SLURM's for a step without."""


@dataclass(frozen=True)
class Gpu:
    """What tells a GPU from others: empty where this PyTorch does not say.

    Attributes:
        uuid: of the GPU, or of the instance (MIG) of one.
        bus: its PCI address, which instances of one GPU share.
    """

    uuid: str
    bus: str

    def is_same_as(self, other: Gpu) -> bool:
        """Whether both are one card: that is what NCCL refuses, instances of one card included."""
        return (self.uuid != "" and self.uuid == other.uuid) or (self.bus != "" and self.bus == other.bus)


def visible() -> list[Gpu]:
    """The GPUs that this process is shown, in the order of their numbers."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        address = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
        bus = "" if None in address else ":".join(f"{number:02x}" for number in address if number is not None)
        found.append(Gpu(str(getattr(properties, "uuid", "")), bus))
    return found


def own(local_rank: int, num_visible: int) -> int:
    """The number of a rank's GPU among those that it is shown.

    Shown all of its node, the one with its local rank; shown one alone, that one; shown a share that some ranks have in common
    (``--gpu-bind=closest``), they take turns. That no two ranks drive the same is seen when they meet.
    """
    return local_rank % num_visible


def missing(env: Mapping[str, str], host: str, num_visible: int) -> ConfigError | None:
    """What is wrong where SLURM gave GPUs and PyTorch sees none: training would take a hundred times as long, without a word."""
    granted = next((name for name in GRANTED_GPUS if env.get(name, "0") not in ("", "0")), None)
    if num_visible or granted is None or any(env.get(name) in NONE_SHOWN for name in SHOWN_GPUS):
        return None
    import torch

    build = torch.version.cuda or torch.version.hip or "CPUs"
    return ConfigError(
        granted, env[granted], f"SLURM gave {host} GPUs, but PyTorch sees none; its build {torch.__version__} is for {build}",
        "a container needs --nv (or --rocm), the node a working driver; to train on CPUs there, set CUDA_VISIBLE_DEVICES=-1",
    )  # fmt: skip


def shared(gpus: Sequence[tuple[int, Hashable, Gpu]]) -> dict[Hashable, tuple[int, int, Gpu, Gpu]]:
    """The first two ranks of each node that drive the same GPU, with what each says of it.

    Args:
        gpus: (rank, node, its GPU) of all ranks.
    """
    found: dict[Hashable, tuple[int, int, Gpu, Gpu]] = {}
    before: dict[Hashable, list[tuple[int, Gpu]]] = {}
    for rank, node, gpu in gpus:
        for other, its in before.setdefault(node, []):
            if gpu.is_same_as(its):
                found.setdefault(node, (other, rank, its, gpu))
        before[node].append((rank, gpu))
    return found


def bound(device: Any, world_size: int) -> dict[str, Any]:
    """The GPU that NCCL is bound to from the start, where DeepSpeed would bind it: not alone (there is no one to reach), and not with
    versions of torch that hang upon it (pytorch/pytorch#153960)."""
    import torch
    from packaging.version import parse

    hangs = parse("2.6.0") < parse(torch.__version__) < parse("2.7.1")
    return {} if device.type == "cpu" or world_size == 1 or hangs else {"device_id": device}
