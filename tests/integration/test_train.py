"""relora-ds train under every launcher that runs here, killed, stopped and resumed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from relora_ds.supervision import faults
from tests.integration.conftest import command, read_log, relora, start, wait_for_update, write_recipe

Recipe = Callable[..., Path]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, token_folder: Path) -> Path:
    """The folder of an uninterrupted run with two processes."""
    folder = tmp_path_factory.mktemp("whole")
    path = write_recipe(folder, token_folder, "run")
    done = relora("train", path, "--nproc", 2, TORCH_EXTENSIONS_DIR=str(folder / "extensions"))
    (folder / "told").write_text(done.stderr)
    return folder / "run"


def metrics(run_dir: Path) -> list[dict]:
    return read_log(run_dir / "metrics.jsonl")


def test_every_launcher_trains_the_same(recipe: Recipe, tmp_path: Path, whole: Path) -> None:
    """Our own, torchrun and the deepspeed launcher: the same losses to the last digit; and none of them compiles anything."""
    assert not (whole.parent / "extensions").exists(), "DeepSpeed compiled an extension at start-up"
    assert [record["update"] for record in metrics(whole) if "loss" in record] == list(range(1, 31))
    binaries = Path(sys.executable).parent
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "relora_ds"]
    deepspeed = [sys.executable, binaries / "deepspeed", "--num_gpus", 2, "--module", "relora_ds"]
    for name, launcher in (("torchrun", torchrun), ("deepspeed", deepspeed)):
        command([*launcher, "train", recipe(name)])
        assert metrics(tmp_path / name) == metrics(whole), name


def test_the_parameters_of_each_phase_are_told(whole: Path) -> None:
    told = (whole.parent / "told").read_text()
    sizes = re.findall(r"([\d,]+) of ([\d,]+) parameters trainable in phase '(\w+)'", told)
    (all_full, full, first), (trained, everything, second) = sizes
    assert (first, second) == ("full", "lora")
    numbers = [int(number.replace(",", "")) for number in (all_full, full, trained, everything)]
    assert numbers[0] == numbers[1] < numbers[3] and numbers[2] < numbers[3]
    assert re.search(r"lora 30/30  loss \S+  lr \S+  lora_lr \S+  \S+ tokens/s  sent", told)


def kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the launcher and all ranks, at once, as a node that dies."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=10)


def kill_launcher(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the launcher alone, as from the out-of-memory killer: the ranks go with it, also one that hangs."""
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    ranks[1].suspend()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5  # at once; some time on a busy machine
    while time.monotonic() < deadline and any(map(is_alive, ranks)):
        time.sleep(0.02)
    survivors = [rank for rank in ranks if is_alive(rank)]
    for rank in survivors:
        rank.kill()
    assert not survivors


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_sigkill_and_resume(recipe: Recipe, tmp_path: Path, whole: Path) -> None:
    """Killed in the full-rank phase and again after a restart: run again at once, it ends with the uninterrupted run's losses."""
    path = recipe("killed")
    for update, kill in ((5, kill_tree), (17, kill_launcher)):
        process = start("train", path, "--nproc", 2)
        wait_for_update(tmp_path / "killed", update, process)
        kill(process)
    told = relora("train", path, "--nproc", 2).stderr
    assert "taking over" in told and "resuming from" in told
    assert metrics(tmp_path / "killed") == metrics(whole)
    assert read_log(tmp_path / "killed" / "restarts.jsonl") == read_log(whole / "restarts.jsonl")


def test_sigterm_writes_a_checkpoint_and_exits_75(recipe: Recipe, tmp_path: Path, whole: Path) -> None:
    path = recipe("stopped", train={"checkpoint_every": None})
    process = start("train", path, "--nproc", 2)
    wait_for_update(tmp_path / "stopped", 2, process)  # early: the signal must find the run still going
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "a checkpoint is written" in told
    relora("train", path, "--nproc", 2)
    assert metrics(tmp_path / "stopped") == metrics(whole)


def test_a_dead_rank_takes_the_job_down(recipe: Recipe, tmp_path: Path) -> None:
    """One rank dies: the launcher ends the other, within seconds, and no process stays behind."""
    process = start("train", recipe("orphan", train={"updates": 100_000}), "--nproc", 2)
    wait_for_update(tmp_path / "orphan", 3, process)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    ranks[1].kill()
    began = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert time.monotonic() - began < 40
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)


def test_a_stopped_rank_ends_the_job_and_is_named(recipe: Recipe, tmp_path: Path, whole: Path) -> None:
    """A process that is stopped hangs the job: it ends by itself, says where, leaves no process and goes on when run again."""
    path, run_dir = recipe("hung", train={"hang_timeout": 3.0}), tmp_path / "hung"
    process = start("train", path, "--nproc", 2)
    wait_for_update(run_dir, 12, process)
    ranks = {psutil.Process(child.pid).environ()["RANK"]: child for child in psutil.Process(process.pid).children()}
    ranks["1"].suspend()
    began = time.monotonic()
    try:
        _, told = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        kill_tree(process)
        raise
    assert process.returncode == 1
    assert time.monotonic() - began < 3 + 5 + 20 + 10, "the limit, the wait for the other's stacks, the launcher's, and some"
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks.values())
    (line,) = [line for line in told.splitlines() if "nothing moved" in line]
    assert f"rank 1 on {socket.gethostname()} wrote no stacks" in line
    (folder,) = (run_dir / "stacks").iterdir()
    assert line.endswith(f"stacks: {folder}")
    (written,) = folder.iterdir()
    assert written.name == "rank_00000.txt" and "training/loop.py" in written.read_text()
    (fault,) = faults.read(run_dir)
    assert (fault["kind"], fault["rank"], fault["host"]) == ("hang", 1, socket.gethostname())
    assert fault["update"] >= 12
    relora("train", path, "--nproc", 2)
    assert metrics(run_dir) == metrics(whole)
    assert [record["update"] for record in read_log(run_dir / "ranks.jsonl")] == [20, 30]
    assert faults.read(run_dir) == [fault], "a run that ends in order has no fault"


def test_bf16_goes_on_where_its_matmul_traps(recipe: Recipe, tmp_path: Path) -> None:
    """On a CPU that traps on AMX the run says what it did; on any other it just runs."""
    path = recipe("bf16", deepspeed="ds_configs/zero2_bf16.json", train={"updates": 12})
    result = relora("train", path, "--nproc", 2)
    assert metrics(tmp_path / "bf16")[-2]["update"] == 12
    probe = "import torch; a = torch.ones(64, 64, dtype=torch.bfloat16); torch.nn.functional.linear(a, a)"
    died = subprocess.run([sys.executable, "-c", probe], env=dict(os.environ), capture_output=True).returncode
    assert ("bf16 products trap on this CPU" in result.stderr) == (died == -signal.SIGILL)


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
    assert len(list((tmp_path / "run" / "plots").glob("*.png"))) == 3
    again = relora("train", path, "--nproc", 2)
    assert "resuming from" in again.stderr and metrics(tmp_path / "run")[-1] == last, "nothing is left to do"
