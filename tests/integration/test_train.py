"""relora-ds train under every launcher that runs here, killed, stopped and resumed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.command_line import command, read_log, relora, start, wait_for_update

Recipe = Callable[..., Path]


def metrics(run_dir: Path) -> list[dict]:
    return read_log(run_dir / "metrics.jsonl")


@pytest.mark.long
def test_every_launcher_trains_the_same(recipe: Recipe, tmp_path: Path, whole: Path) -> None:
    """Our own, torchrun (with the profiler on) and the deepspeed launcher: the same losses to the last digit; and none of them
    compiles anything."""
    assert not (whole.parent / "extensions").exists(), "DeepSpeed compiled an extension at start-up"
    assert [record["update"] for record in metrics(whole) if "loss" in record] == list(range(1, 31))
    binaries = Path(sys.executable).parent
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "relora_ds"]
    deepspeed = [sys.executable, binaries / "deepspeed", "--num_gpus", 2, "--module", "relora_ds"]
    for name, launcher in (("torchrun", torchrun), ("deepspeed", deepspeed)):
        command([*launcher, "train", recipe(name), *["--profile", 2] * (name == "torchrun")])
        assert metrics(tmp_path / name) == metrics(whole), name
    assert sorted(path.name for path in (tmp_path / "torchrun" / "profile").iterdir()) == [
        "update_0000003.json.gz", "update_0000004.json.gz", "updates_0000003_0000004.md",
    ]  # fmt: skip


@pytest.mark.long
def test_the_parameters_of_each_phase_are_told(whole: Path) -> None:
    told = (whole.parent / "told").read_text()
    sizes = re.findall(r"([\d,]+) of ([\d,]+) parameters trainable in phase '(\w+)'", told)
    (all_full, full, first), (trained, everything, second) = sizes
    assert (first, second) == ("full", "lora")
    numbers = [int(number.replace(",", "")) for number in (all_full, full, trained, everything)]
    assert numbers[0] == numbers[1] < numbers[3] and numbers[2] < numbers[3]
    assert re.search(r"lora 30/30  loss \S+  lr \S+  lora_lr \S+  \S+ tokens/s  sent", told)


def wandb_steps(file: Path) -> tuple[str, list[int]]:
    """The run id and the steps of the history records in a .wandb file; each tells the bytes of its update."""
    wandb = Path(sys.executable).parent / "wandb"
    records = [json.loads(line) for line in command([wandb, "leet", "inspect", "--json", file]).stdout.splitlines()]
    assert all("train/sent_bytes" in json.dumps(record) for record in records if "train/loss" in json.dumps(record))
    run_id = next(record["run"]["run_id"] for record in records if record["type"] == "run")
    return run_id, sorted({record["history"]["step"]["num"] for record in records if record["type"] == "history"})


@pytest.mark.long
def test_sigterm_writes_a_checkpoint_and_exits_75(recipe: Recipe, tmp_path: Path, whole: Path) -> None:
    """And goes on from there, also on wandb: the real one, offline, without a key or a question, with one id."""
    path = recipe("stopped", train={"checkpoint_every": None}, wandb={"mode": "auto"})
    keyless = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_SILENT": "true"}
    process = start("train", path, "--nproc", 2, **keyless)
    wait_for_update(tmp_path / "stopped", 2, process)  # early: the signal must find the run still going
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "a checkpoint is written" in told
    relora("train", path, "--nproc", 2, **keyless)
    assert metrics(tmp_path / "stopped") == metrics(whole)
    files = sorted((tmp_path / "stopped" / "wandb").glob("offline-run-*/*.wandb"))
    (first_id, first), (second_id, second) = map(wandb_steps, files)
    assert first_id == second_id == (tmp_path / "stopped" / "wandb_id").read_text()
    assert first + second == list(range(1, 31)) and first and second


@pytest.mark.long
def test_bf16_goes_on_where_its_matmul_traps(recipe: Recipe, tmp_path: Path) -> None:
    """On a CPU that traps on AMX the run says what it did; on any other it just runs."""
    path = recipe("bf16", deepspeed="ds_configs/zero2_bf16.json", train={"updates": 12})
    result = relora("train", path, "--nproc", 2)
    assert metrics(tmp_path / "bf16")[-2]["update"] == 12
    probe = "import torch; a = torch.ones(64, 64, dtype=torch.bfloat16); torch.nn.functional.linear(a, a)"
    died = subprocess.run([sys.executable, "-c", probe], env=dict(os.environ), capture_output=True).returncode
    assert ("bf16 products trap on this CPU" in result.stderr) == (died == -signal.SIGILL)


@pytest.mark.long
def test_a_precision_that_trains_nan_is_refused_or_noticed(recipe: Recipe, tmp_path: Path) -> None:
    """ "auto" once made a bf16 module that DeepSpeed took for fp32: nothing was skipped, and checkpoints of NaN were written."""
    diverging = ["optimizer.lr=1e20", "optimizer.grad_clip=0", "train.max_skipped=2", "relora.warm_start=0"]
    path = recipe("nan", deepspeed={"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 2}})
    refused = relora("train", path, *diverging, expect=2)
    assert refused.stderr.splitlines()[-1].startswith("relora-ds: error: deepspeed.bf16.enabled='auto': says nothing here")
    assert not (tmp_path / "nan").exists()
    deepspeed = {"bf16": {"enabled": "true"}, "zero_optimization": {"stage": 2, "stage3_max_live_parameters": 5}}
    path = recipe("nan", deepspeed=deepspeed)
    noticed = relora("train", path, *diverging, "--nproc", 2, expect=1)
    assert "2 updates in a row had a non-finite gradient" in noticed.stderr
    (line,) = [line for line in noticed.stderr.splitlines() if "do nothing under ZeRO stage 1 or 2" in line]
    assert line.endswith("zero_optimization.stage3_max_live_parameters")
    used = json.loads((tmp_path / "nan" / "deepspeed.json").read_text())
    assert (used["bf16"]["enabled"], used["zero_optimization"]) == (True, {"stage": 2})


@pytest.fixture
def shared_with_a_group() -> Iterator[None]:
    """A umask as in a project folder."""
    before = os.umask(0o002)
    yield
    os.umask(before)


@pytest.mark.long
@pytest.mark.usefixtures("shared_with_a_group")
def test_from_text_to_report(recipe: Recipe, tmp_path: Path) -> None:
    """The commands one after the other, as a user types them; eval and the exported model agree with the run's own evaluation.
    Whatever they write has the mode that the umask gives."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "Line {i} of the story says that {i} comes after {i - 1}."}}\n' for i in range(300)))
    relora("prepare", text, tmp_path / "tokens", "--vocab-size", 300, "--holdout", 0.1)
    path = recipe("run", data={"path": str(tmp_path / "tokens")})
    relora("train", path, "--nproc", 2)
    last = metrics(tmp_path / "run")[-1]
    (start,) = json.loads((tmp_path / "run" / "traffic.json").read_text())["starts"]
    (node,) = start["nodes"]
    assert (start["first_update"], start["last_update"]) == (1, 30)
    assert node["sent_bytes"] > node["counted_bytes"] > 30 * start["wire_bytes_per_update"] * 2 > 0, (
        "both ranks' bytes, restarts beside"
    )
    told = relora("eval", tmp_path / "run").stdout
    match = re.search(r"perplexity ([\d.]+) over", told)
    assert match and float(match[1]) == pytest.approx(last["eval_perplexity"], rel=1e-4)
    relora("export", tmp_path / "run", tmp_path / "exported", "--dtype", "fp32")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in (tmp_path / "exported").iterdir()}
    relora("export", tmp_path / "run", tmp_path / "adapter", "--adapter")
    relora("report", tmp_path / "run")
    written = [path for name in ("tokens", "run", "exported", "adapter") for path in (tmp_path / name).rglob("*")]
    assert len([path for path in written if path.suffix == ".safetensors"]) >= 2 + 1 + 2, (
        "two ranks' base, the export, the adapter"
    )
    assert [path for path in written if path.stat().st_mode & 0o777 != (0o775 if path.is_dir() else 0o664)] == []
    page = (tmp_path / "run" / "report.md").read_text()
    assert "restart" in page and "## Traffic of run" in page
    pictures = ["gradient_norm", "learning_rate", "loss", "merged_change", "perplexity", "restarts", "speed"]
    assert sorted(path.stem for path in (tmp_path / "run" / "plots").glob("*.png")) == pictures
    assert "Recipe of run" in (tmp_path / "run" / "report.html").read_text()
    again = relora("train", path, "--nproc", 2)
    assert "resuming from" in again.stderr and metrics(tmp_path / "run")[-1] == last, "nothing is left to do"
