"""Guards around what libraries do on a CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from relora_ds.launch import libraries

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch, clean: None) -> list[list[str]]:
    """The commands that `guard_bf16` runs, on a CPU that advertises AMX and dies of it."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=-signal.SIGILL)

    monkeypatch.setattr(libraries.subprocess, "run", run)
    monkeypatch.setattr(libraries, "_cpu_has", lambda flag: flag == "amx_bf16")
    return commands


def test_guard_bf16_where_amx_traps(probes: list[list[str]]) -> None:
    message = libraries.guard_bf16()
    assert message is not None
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == libraries.SAFE_ISA
    assert f"ONEDNN_MAX_CPU_ISA={libraries.SAFE_ISA}" in message
    assert len(probes) == 1
    assert "bfloat16" in probes[0][-1]
    assert libraries.guard_bf16() is None  # the variable is set now
    assert len(probes) == 1


def test_guard_bf16_leaves_a_setting_of_the_user(probes: list[list[str]]) -> None:
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
    assert libraries.guard_bf16() is None
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert probes == []


def test_guard_bf16_without_amx(probes: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "_cpu_has", lambda flag: False)
    assert libraries.guard_bf16() is None
    assert "ONEDNN_MAX_CPU_ISA" not in os.environ
    assert probes == []


@pytest.mark.usefixtures("probes")
@pytest.mark.parametrize("code", [0, 1, -signal.SIGKILL])
def test_guard_bf16_where_the_probe_does_not_trap(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(libraries.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=code))
    assert libraries.guard_bf16() is None
    assert "ONEDNN_MAX_CPU_ISA" not in os.environ


STARTS_FASTER = """
import os, sys
import torch
from relora_ds.launch import libraries
os.environ["TORCHDYNAMO_DISABLE"] = "0"
libraries.skip_muon_compilation()
assert "deepspeed.runtime.zero.muon.original_muon" in sys.modules and "functorch.compile" not in sys.modules
assert os.environ.pop("TORCHDYNAMO_DISABLE") == "0"
libraries.skip_muon_compilation()
assert "TORCHDYNAMO_DISABLE" not in os.environ
counted = []
compiled = torch.compile(lambda x: x + 1, backend=lambda graph, _: counted.append(1) or graph.forward)
assert compiled(torch.ones(1)).item() == 2.0 and counted == [1]
"""


@pytest.mark.long
def test_muon_is_not_compiled_and_the_rest_still_is() -> None:
    done = subprocess.run([sys.executable, "-c", STARTS_FASTER], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
