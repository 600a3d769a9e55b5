"""Which GPU is whose, without any: what SLURM, scripts and containers show to a rank."""

from __future__ import annotations

import pytest
import torch

from relora_ds.launch import devices
from relora_ds.launch.devices import Gpu
from tests.unit.launch.launchers import BATCHSPAWNER, CPUS_PER_TASK_23_11, GPUS_PER_TASK_22, GPUS_PER_TASK_23_11, PYTORCHJOB

A, B = Gpu("GPU-a", "0000:1b:00"), Gpu("GPU-b", "0000:43:00")


@pytest.mark.parametrize(
    ("local_rank", "num_visible", "number"),
    [
        (3, 8, 3),  # all of the node
        (3, 1, 0),  # its own alone: --gpus-per-task, a script around the command, an instance (MIG)
        (2, 2, 0),  # its share: --gpu-bind=closest
        (3, 2, 1),
    ],
)
def test_a_rank_drives_what_it_is_shown(local_rank: int, num_visible: int, number: int) -> None:
    assert devices.own(local_rank, num_visible) == number


@pytest.mark.parametrize("given", [GPUS_PER_TASK_22, GPUS_PER_TASK_23_11, CPUS_PER_TASK_23_11, BATCHSPAWNER])
def test_gpus_that_slurm_gave_and_pytorch_does_not_see(given: dict[str, str]) -> None:
    error = devices.missing(given, "gpu12", 0)
    assert error is not None
    assert str(error).startswith(
        f"SLURM_GPUS_ON_NODE={given['SLURM_GPUS_ON_NODE']!r}: SLURM gave gpu12 GPUs, but PyTorch sees none"
    )
    assert devices.missing(given, "gpu12", 1) is None


@pytest.mark.parametrize(
    "environment",
    [
        {},
        PYTORCHJOB,
        {"SLURM_GPUS_ON_NODE": "0"},
        {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": ""},  # the user wants CPUs
        {"SLURM_JOB_GPUS": "0,1", "CUDA_VISIBLE_DEVICES": "-1"},
        {"SLURM_JOB_GPUS": "0,1", "CUDA_VISIBLE_DEVICES": "NoDevFiles"},  # a step without GPUs
    ],
)
def test_no_gpus_are_missed_where_none_were_asked_for(environment: dict[str, str]) -> None:
    assert devices.missing(environment, "gpu12", 0) is None


def test_the_first_two_ranks_with_the_same_gpu() -> None:
    assert devices.shared([(0, "n1", A), (1, "n1", B), (2, "n2", A)]) == {}  # a GPU's name says nothing about other nodes'
    assert devices.shared([(0, "n1", A), (1, "n1", B), (2, "n1", A), (3, "n1", A)]) == {"n1": (0, 2, A, A)}


def test_instances_of_one_gpu_are_one_to_nccl() -> None:
    first, second = Gpu("MIG-1", "0000:1b:00"), Gpu("MIG-2", "0000:1b:00")
    assert devices.shared([(0, "n1", first), (1, "n1", second)]) == {"n1": (0, 1, first, second)}


def test_what_pytorch_does_not_say_is_not_the_same() -> None:
    assert devices.shared([(0, "n1", Gpu("", "")), (1, "n1", Gpu("", ""))]) == {}


def test_gpus_are_read_from_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        uuid, pci_domain_id, pci_bus_id, pci_device_id = "8932f937-d72c", 0, 27, 0

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda number: Properties if number == 0 else object())
    assert devices.visible() == [Gpu("8932f937-d72c", "00:1b:00"), Gpu("", "")]


def test_no_gpus_on_a_cpu() -> None:
    assert devices.visible() == []


@pytest.mark.parametrize(
    ("device", "world_size", "version", "is_bound"),
    [
        ("cuda:1", 2, "2.13.0", True),
        ("cuda:1", 1, "2.13.0", False),
        ("cpu", 2, "2.13.0+cpu", False),
        ("cuda:1", 2, "2.7.0+cu126", False),
        ("cuda:1", 2, "2.7.1", True),
    ],
)
def test_nccl_is_bound_to_the_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str, world_size: int, version: str, is_bound: bool
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    found = devices.bound(torch.device(device), world_size)
    assert found == ({"device_id": torch.device("cuda:1")} if is_bound else {})
