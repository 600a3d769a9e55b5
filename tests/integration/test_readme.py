"""README's script as it stands there, by the launchers that it names, and the way from its checkpoint to a model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from relora_ds.cli import main as cli
from relora_ds.comm.network import free_port
from tests.command_line import ROOT, environment

BIN = Path(sys.executable).parent
TWO_CPUS = {
    "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port"],
    "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port"],
}


def run_sample(folder: Path, launcher: list[str]) -> str:
    """What the sample says on stderr. An MPI that cannot be loaded stands in its way: nobody is to ask for one."""
    found = re.search(r"^## Your own DeepSpeed script\n+```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S | re.M)
    assert found is not None
    (folder / "script.py").write_text(found[1])
    (folder / "ds_configs").symlink_to(ROOT / "ds_configs")
    (folder / "no" / "mpi4py").mkdir(parents=True)
    (folder / "no" / "mpi4py" / "__init__.py").write_text('raise RuntimeError("cannot load MPI library")')
    path = f"{ROOT}:{folder / 'no'}"
    words = [*launcher, "script.py"]
    result = subprocess.run(
        [str(BIN / words[0]), *words[1:]],
        env=environment(PYTHONPATH=path),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "MPI" not in result.stdout + result.stderr
    return result.stderr


@pytest.mark.long
def test_alone(tmp_path: Path) -> None:
    told = run_sample(tmp_path, ["python"])
    restarts = [line for line in told.splitlines() if line.startswith("[relora-ds] ")]
    assert [line.partition(":")[0] for line in restarts] == ["[relora-ds] update 16", "[relora-ds] update 32"]
    assert len(told.splitlines()) < 10, told
    runs = tmp_path / "runs"
    model = AutoModelForCausalLM.from_pretrained(runs / "script_model", dtype="auto")
    assert model.dtype == torch.bfloat16 and not any("lora" in name for name, _ in model.named_parameters())
    assert cli.main(["export", str(runs / "script"), str(tmp_path / "exported")]) == 0
    live, stored = (load_file(place / "model.safetensors") for place in (runs / "script_model", tmp_path / "exported"))
    assert live.keys() == stored.keys() and all(torch.equal(live[name], stored[name]) for name in live)


@pytest.mark.long
@pytest.mark.parametrize("launcher", TWO_CPUS)
def test_two_processes(launcher: str, tmp_path: Path) -> None:
    told = run_sample(tmp_path, [*TWO_CPUS[launcher], str(free_port())])
    assert [line.partition(", ")[0] for line in told.splitlines() if "restart" in line] == ["[relora-ds] update 16: restart 1"]
    assert (tmp_path / "runs" / "script_model" / "model.safetensors").is_file()
    assert len(list((tmp_path / "runs" / "script" / "global_step20").glob("*_optim_states.pt"))) == 2
