"""What torch, oneDNN and DeepSpeed are told of this machine before they look for themselves."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import subprocess
import sys
import warnings
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

from relora_ds.launch import devices, launcher

SAFE_ISA = "AVX512_CORE_FP16"
"""The newest instruction set of oneDNN without AMX."""


def quiet_libraries() -> None:
    """Leaves the screen to this program: DeepSpeed, torch and transformers tell of themselves only what went wrong.

    Before DeepSpeed is imported: it warns on the standard output unless it is told that there is only a CPU.
    """
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    forget_cpu()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler would write a line at each start and stop
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\..*")


def forget_cpu() -> None:
    """Drops DS_ACCELERATOR=cpu where CUDA is, left over from a machine that had none: DeepSpeed would believe it."""
    import torch

    if os.environ.get("DS_ACCELERATOR") == "cpu" and torch.cuda.is_available():
        del os.environ["DS_ACCELERATOR"]


def naming_gpu(args: Any = None) -> Any:
    """DeepSpeed's ``args``, made to name this rank's GPU where its number is not its local rank, which DeepSpeed would take."""
    import torch

    local, num_visible = os.environ.get("LOCAL_RANK"), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not num_visible or not local or int(local) < num_visible or hasattr(args, "device_rank"):
        return args
    args = SimpleNamespace() if args is None else args
    args.device_rank = devices.own(int(local), num_visible)
    return args


def skip_muon_compilation() -> None:
    """Imports DeepSpeed's Muon, which every engine of its looks at, without making torch.compile ready for it: over a second less.

    A recipe trains with Adam, so nobody calls what stays uncompiled; torch.compile is made ready later where blocks are compiled.
    """
    switch = "TORCHDYNAMO_DISABLE"  # torch reads it at each use of torch.compile
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    with suppress(ImportError):  # a DeepSpeed without Muon
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    del os.environ[switch]
    os.environ |= {} if before is None else {switch: before}


def skip_shared_memory_build() -> None:
    """Keeps DeepSpeed from compiling its shared-memory collective on CPU.

    It serves tensor-parallel inference only, is compiled at the first start, which takes long and needs a compiler, and a build that
    was killed leaves a lock on which every later start hangs.
    """
    import deepspeed

    builder = deepspeed.accelerator.get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None:
        deepspeed.ops.__compatible_ops__[builder.NAME] = False


def guard_bf16() -> str | None:
    """Makes bf16 matrix products safe on a CPU that advertises AMX but traps on it; returns what was done, to be told, or None.

    Some virtual machines do: oneDNN then picks an AMX kernel and the process dies of SIGILL. One product in a child process tells.
    Must run before the first bf16 product of this process, because oneDNN reads its variable once.
    """
    if "ONEDNN_MAX_CPU_ISA" in os.environ or not _cpu_has("amx_bf16"):
        return None
    probe = "import torch; a = torch.ones(64, 64, dtype=torch.bfloat16); torch.nn.functional.linear(a, a)"
    died = subprocess.run(launcher.tied([sys.executable, "-c", probe]), capture_output=True, check=False).returncode
    if died != -signal.SIGILL:
        return None
    os.environ["ONEDNN_MAX_CPU_ISA"] = SAFE_ISA
    return f"bf16 products trap on this CPU (SIGILL in an AMX kernel); going on with ONEDNN_MAX_CPU_ISA={SAFE_ISA}"


def _cpu_has(flag: str) -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return any(line.startswith("flags") and f" {flag} " in f"{line.strip()} " for line in file)
    except OSError:
        return False
