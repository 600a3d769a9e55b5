"""What ``relora-ds slurm`` writes, says and refuses; SLURM itself is in tests/cluster/test_slurm_jobs.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from relora_ds.cli.main import main
from relora_ds.config import Config, load, parse
from relora_ds.errors import ConfigError
from relora_ds.run.folder import RunFolder
from relora_ds.run.lock import RunLock
from relora_ds.slurm import client as slurm_client
from relora_ds.slurm import commands as slurm
from relora_ds.slurm import sbatch_environment as slurm_environment
from relora_ds.slurm.client import Job, SlurmError
from relora_ds.slurm.events import Events
from relora_ds.slurm.script import settings as job_settings
from relora_ds.slurm.script import template

ROOT = Path(__file__).resolve().parents[3]
RUNNING = Job(17, "a", "RUNNING", "node[1-2]", 1, 60.0, 3600.0, "", "")
FOUND = job_settings({}, {"tasks_per_node": 2, "nodes": "2"})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What SLURM was asked to do; it does all of it."""
    made: list[str] = []

    def call(*words: object, **_: object) -> str:
        made.append(" ".join(map(str, words)))
        return "17\n"

    monkeypatch.setattr(slurm_client, "call", call)
    monkeypatch.setattr(slurm_client, "job", lambda *_, **__: None)
    return made


# Submit


def test_what_a_job_needs_of_this_moment_is_kept(config: Config, run: RunFolder, calls: list[str], tmp_path: Path) -> None:
    deepspeed = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    text = slurm.script(config, FOUND, recipe_name="demo", workdir=tmp_path)
    job, output = slurm.submit(config, FOUND, deepspeed, text, workdir=tmp_path)
    assert (job, output) == (17, run.slurm / "job.out")
    assert calls == ["sbatch --test-only", f"sbatch --parsable {run.slurm}/job.sbatch"]
    kept = load(run.slurm / "recipe.yaml", [])
    assert kept.deepspeed == str(run.slurm / "deepspeed.json") and json.loads(Path(kept.deepspeed).read_text()) == deepspeed
    assert kept.model_copy(update={"deepspeed": config.deepspeed}) == config
    commit = json.loads((run.slurm / "commit.json").read_text())
    assert commit["relora_ds"] and commit["workdir"] is None
    if (Path(slurm.__file__).parents[2] / ".git").exists():
        assert len(commit["package"].partition("-")[0]) == 40
    assert (run.slurm / "job.sbatch").read_text() == text
    assert f"recipe={run.slurm}/recipe.yaml\npython={sys.executable}\n" in text
    assert f"#SBATCH --chdir={tmp_path}\n" in text and f"#SBATCH --output={run.slurm}/job.out\n" in text
    assert Events(run).of("submitted")[0]["settings"] == {"tasks_per_node": 2, "nodes": "2"}


def test_a_relative_run_folder_is_found_from_anywhere(settings: dict[str, Any], tmp_path: Path) -> None:
    config = parse({**settings, "run": {"dir": "runs/a 100%", "seed": 1}})
    text = slurm.script(config, FOUND, recipe_name="a", workdir=tmp_path)
    assert f'#SBATCH --output="{tmp_path}/runs/a 100%%/slurm/job.out"\n' in text
    assert f"recipe='{tmp_path}/runs/a 100%/slurm/recipe.yaml'\n" in text


def test_set_up_lines_that_are_no_shell_are_named(calls: list[str], config: Config, tmp_path: Path) -> None:
    found = job_settings({}, {"tasks_per_node": 2, "setup": ["if true"]})
    with pytest.raises(ConfigError, match=r"--setup=\['if true'\]: .*syntax error"):
        slurm.submit(config, found, {}, slurm.script(config, found, recipe_name="a", workdir=tmp_path), workdir=tmp_path)
    assert calls == []


@pytest.mark.parametrize(
    ("complaint", "key"),
    [
        ("invalid partition specified: x", "--partition='x'"),
        ("Invalid account or account/partition combination specified", "--account=None"),
        ("Invalid qos specification", "--qos=None"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "--time=None"),
        ("Requested node configuration is not available", "--nodes='9'"),
        ("Invalid feature specification", "--constraint=None"),
        ("Invalid node name specified", "--exclude=None"),
        ("Invalid generic resource (gres) specification", "--gpus-per-node=None"),
        ("something else", "sbatch=None"),
    ],
)
def test_slurms_complaint_comes_with_the_option(complaint: str, key: str) -> None:
    found = job_settings({}, {"tasks_per_node": 2, "partition": "x", "nodes": "9"})
    with pytest.raises(ConfigError, match=f"^{key}: SLURM refuses the job: ") as error, slurm.refused_by_sbatch(found):
        raise SlurmError(complaint)
    assert complaint in str(error.value)


def test_one_job_at_a_time(config: Config, run: RunFolder, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run.path.mkdir(parents=True)
    Events(run).add("submitted", job=17)
    slurm.refuse_second(run)  # SLURM has forgotten it
    monkeypatch.setattr(slurm_client, "job", lambda *_, **__: replace(RUNNING, state="COMPLETED"))
    slurm.refuse_second(run)
    monkeypatch.setattr(slurm_client, "job", lambda *_, **__: RUNNING)
    with pytest.raises(ConfigError, match=r"job 17 \(RUNNING\) is there for it; relora-ds slurm cancel"):
        slurm.refuse_second(run)
    monkeypatch.setattr(slurm_client, "job", lambda *_, **__: None)
    with RunLock(run.path), pytest.raises(ConfigError, match="in use by process"):
        slurm.refuse_second(run)


HOSTILE = {
    "SLURM_JOB_ID": "9", "SLURM_RESTART_COUNT": "2", "SLURM_PROCID": "3", "SLURM_STEP_ID": "4294967290", "SLURM_LOCALID": "1",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_MEM_PER_CPU": "100", "SLURM_TRES_PER_TASK": "cpu:1", "SLURM_EXPORT_ENV": "NONE",
    "SLURMD_NODENAME": "login", "SRUN_DEBUG": "3", "SLURM_CLUSTERS": "alex", "SBATCH_ACCOUNT": "default", "SBATCH_TIMELIMIT": "1",
    "SBATCH_GRES": "gpu:1", "SBATCH_NO_REQUEUE": "1", "SBATCH_SIGNAL": "INT@1", "SBATCH_OPEN_MODE": "truncate", "SBATCH_WAIT": "1",
    "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "there", "MASTER_PORT": "1",
    "GROUP_RANK": "0", "ROLE_RANK": "0", "TORCHELASTIC_RUN_ID": "none", "OMPI_COMM_WORLD_RANK": "1", "PMI_RANK": "1", 
    "PMIX_RANK": "1", "MPI_LOCALRANKID": "1",
    "PALS_RANKID": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "0", "ROCR_VISIBLE_DEVICES": "0",
}  # fmt: skip
MEANT = {
    "SLURM_CONF": "/etc/slurm.conf",
    "SBATCH_RESERVATION": "week",
    "NCCL_DEBUG": "WARN",
    "WANDB_API_KEY": "k",
    "RANKING": "9",
}


def test_a_job_gets_nothing_that_was_not_meant_for_it(recipe: Path, tmp_path: Path) -> None:
    """Neither of the caller's own place, as inside a job, nor of what the libraries leave while the recipe is checked."""
    programs = tmp_path / "programs"
    programs.mkdir()
    sbatch = programs / "sbatch"
    sbatch.write_text(f'#!/bin/bash\necho "$*" >>{tmp_path}/calls\nenv -0 >{tmp_path}/environment\necho "17;alex"\n')
    sbatch.chmod(0o755)
    own = {name: value for name, value in os.environ.items() if name not in HOSTILE}
    meant = {**own, **MEANT, "PATH": f"{programs}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    words = ["slurm", "submit", recipe, "--gpus-per-node", "2", "--account", "mine", "--time", "60", "train.micro_batch=1"]
    done = subprocess.run(
        [sys.executable, "-m", "relora_ds", *map(str, words)], env={**meant, **HOSTILE}, capture_output=True, text=True,
        timeout=120, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    entries = (tmp_path / "environment").read_text().split("\0")
    got = dict(entry.partition("=")[::2] for entry in entries if entry)
    by_bash = ("_", "SHLVL", "PWD", "OLDPWD")
    assert {name: value for name, value in got.items() if name not in by_bash} == {
        name: value for name, value in meant.items() if name not in by_bash
    }
    folder = tmp_path / "run" / "slurm"
    assert (tmp_path / "calls").read_text().splitlines() == [
        "--test-only --clusters=alex", f"--parsable --clusters=alex {folder}/job.sbatch",
    ]  # fmt: skip
    assert "SBATCH_ACCOUNT='default' of the environment gives way" in done.stderr
    assert "SBATCH_RESERVATION='week' of the environment counts" in done.stderr
    assert Events(RunFolder(tmp_path / "run")).cluster(17) == "alex"


def test_the_check_can_be_left_to_the_job(recipe: Path, home: Path, tmp_path: Path) -> None:
    """A login node may be too small for torch."""
    words = ["slurm", "submit", str(recipe), "--tasks-per-node", "3", "--dry-run"]
    assert main(words) == 2, "8 samples do not divide over 3 ranks"
    without_torch = "import sys; sys.modules['torch'] = sys.modules['deepspeed'] = None; from relora_ds.cli.main import main; "
    without_torch += "sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", without_torch, *words, "--no-check"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "#SBATCH --ntasks-per-node=3\n" in done.stdout, done.stderr


def test_an_environment_file_that_a_shell_reads_otherwise_is_refused_at_submit(
    recipe: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "env").write_text("RUN_NAME=my run\n")
    words = ["slurm", "submit", str(recipe), "--tasks-per-node", "1", "--no-check", "--dry-run"]
    assert main([*words, "--environment-file", str(tmp_path / "env")]) == 2
    assert capsys.readouterr().err.startswith("relora-ds: error: --environment-file='RUN_NAME': line 1 of")


@pytest.mark.parametrize(
    ("complaint", "is_refused"),
    [
        ("allocation failure: Requested node configuration is not available", False),
        ("allocation failure: Required node not available (down, drained or reserved)", False),
        ("allocation failure: Required partition not available (inactive or drain)", False),
        ("allocation failure: Requested nodes are busy", False),
        ("allocation failure: Invalid account or account/partition combination specified", True),
        ("allocation failure: Requested time limit is invalid (missing or exceeds some limit)", True),
    ],
)
def test_what_only_cannot_start_now_is_submitted(
    complaint: str, is_refused: bool, config: Config, calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise SlurmError(complaint)

    monkeypatch.setattr(slurm_client, "test", refuse)
    said: list[str] = []
    text = slurm.script(config, FOUND, recipe_name="demo", workdir=tmp_path)
    if is_refused:
        with pytest.raises(ConfigError, match="SLURM refuses the job"):
            slurm.submit(config, FOUND, {}, text, workdir=tmp_path, say=said.append)
        assert calls == [] and not Path(config.run.dir).exists()
    else:
        assert slurm.submit(config, FOUND, {}, text, workdir=tmp_path, say=said.append)[0] == 17
        assert said == [f"submitted, but it has to wait: {complaint} (nodes may be down, drained or reserved just now)"]
        assert Path(config.run.dir).exists()


@pytest.mark.parametrize(("nodes", "is_refused"), [("2-9", False), ("4", False), ("5-9", True)])
def test_more_nodes_than_there_are_is_refused(
    nodes: str, is_refused: bool, config: Config, calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM says the same of nodes that are drained, and would queue both."""

    def refuse(*_: object, **__: object) -> None:
        raise SlurmError("Requested node configuration is not available")

    asked: list[str | None] = []
    monkeypatch.setattr(slurm_client, "test", refuse)
    monkeypatch.setattr(slurm_client, "most_nodes", lambda partition: asked.append(partition) or 4)
    found = job_settings({}, {"tasks_per_node": 2, "nodes": nodes})
    text = slurm.script(config, found, recipe_name="demo", workdir=tmp_path)
    words: dict[str, Any] = {"workdir": tmp_path, "environment": {"SBATCH_PARTITION": "small"}, "say": lambda _: None}
    if is_refused:
        with pytest.raises(ConfigError, match=f"--nodes='{nodes}': SLURM refuses the job"):
            slurm.submit(config, found, {}, text, **words)
    else:
        slurm.submit(config, found, {}, text, **words)
    assert asked == ["small"]
    elsewhere = job_settings({}, {"tasks_per_node": 2, "nodes": nodes, "sbatch_args": ["-pbig"]})
    assert not slurm.needs_more_nodes(elsewhere, slurm_environment.for_sbatch({}, text))


@pytest.mark.parametrize("is_new", [True, False])
def test_a_refused_job_leaves_nothing_behind(
    is_new: bool, config: Config, run: RunFolder, calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot start now may never start: sbatch knows, and says so in its only line."""

    def refuse(*_: object, **__: object) -> None:
        raise SlurmError("Requested node configuration is not available")

    monkeypatch.setattr(slurm_client, "test", refuse)
    monkeypatch.setattr(slurm_client, "submit", refuse)
    if not is_new:
        run.path.mkdir(parents=True)
    said: list[str] = []
    text = slurm.script(config, FOUND, recipe_name="demo", workdir=tmp_path)
    with pytest.raises(ConfigError, match="--nodes='2': SLURM refuses the job: Requested node configuration is not available"):
        slurm.submit(config, FOUND, {}, text, workdir=tmp_path, say=said.append)
    assert said == [] and run.path.exists() is not is_new


# Status and logs


def test_status_before_there_is_a_job(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"no SLURM job is known of it; relora-ds slurm submit"):
        list(slurm.status(config))


def test_status(config: Config, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events(run)
    events.add("submitted", job=17)
    for restart in range(2):
        events.add("started", job=17, attempt=f"17.{restart}", update=0, nodes=["node1"], log="", offset=0)
    events.add("ended", job=17, attempt="17.0", code=None, update=4, suspects=["node2"], decision="vanished")
    record = {"phase": "lora", "loss": 3.5, "tokens_per_s": 64.0, "restarts": 1}
    run.metrics.write_text("".join(json.dumps({"update": update, **record}) + "\n" for update in range(1, 11)))
    monkeypatch.setattr(slurm_client, "job", lambda *_, **__: RUNNING)
    job, starts, ended, progress, newest = slurm.status(config)
    assert job == "job 17 (a): RUNNING on node[1-2], running for 0:01:00, 1:00:00 left of its time limit"
    assert starts == "starts: 2, requeues: 1"
    assert ended.endswith("17.0 ended without a word at update 4 (vanished), first failed: node2")
    numbers = "update 10 of 20 (50.0%), phase lora, loss 3.5000, 64 tokens/s, ReLoRA restarts 1, ETA 0:00:20"
    assert progress == f"{run.path}: {numbers}"
    assert newest == "newest checkpoint: update 0"


def test_status_of_a_job_that_waits_or_is_forgotten(config: Config, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    Events(run).add("submitted", job=17)
    waiting = replace(RUNNING, state="PENDING", nodes="", seconds_used=None, seconds_left=None, reason="Resources")
    monkeypatch.setattr(slurm_client, "job", lambda *_, **__: waiting)
    assert list(slurm.status(config)) == ["job 17 (a): PENDING, reason: Resources", f"{run.path}: no update yet"]
    monkeypatch.setattr(slurm_client, "job", lambda *_, **__: None)
    assert next(iter(slurm.status(config))) == "job 17: SLURM does not know it any more"


def test_logs(config: Config, run: RunFolder, tmp_path: Path) -> None:
    events = Events(run)
    events.add("submitted", job=17)
    with pytest.raises(ConfigError, match="job 17 has written nothing yet"):
        slurm.log_file(config)
    (run.slurm / "job.out").write_text("a\n")
    assert slurm.log_file(config) == run.slurm / "job.out"
    by_hand = tmp_path / "relora-17.out"
    by_hand.write_text("b\n")
    events.add("started", job=17, attempt="17.0", update=0, nodes=[], log=str(by_hand), offset=0)
    assert slurm.log_file(config) == by_hand


def test_the_end_of_a_file_and_what_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "POLL_S", 0.01)
    path, seen, over = tmp_path / "out", [], threading.Event()
    path.write_text("".join(f"line {n}\n" for n in range(100)))
    slurm.tail(path, 2, seen.append)
    assert seen == ["line 98\nline 99\n"]

    def write() -> None:
        time.sleep(0.1)
        with path.open("a") as file:
            file.write("line 100\n")
        over.set()

    seen.clear()
    threading.Thread(target=write).start()
    slurm.tail(path, 1, seen.append, over.is_set)
    assert seen == ["line 99\n", "line 100\n"]


# Cancel


def test_a_copy_of_a_run_knows_nothing_of_the_originals_job(
    config: Config, run: RunFolder, calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Going back to an earlier checkpoint is done in a copy: its `cancel` ended the job of the original."""
    Events(run).add("submitted", job=17, cluster="")
    Events(run).add("started", job=17, attempt="17.0", update=0, nodes=["node1"], log="", offset=0)
    Events(run).add("successor", job=18, of=17)
    shutil.copytree(run.path, tmp_path / "copy")
    monkeypatch.setattr(slurm_client, "job", lambda *_, **__: RUNNING)
    slurm.refuse_second(RunFolder(tmp_path / "copy"))
    copied = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(tmp_path / "copy")})})
    with pytest.raises(ConfigError, match="no SLURM job is known of it"):
        slurm.cancel(copied, wait_s=0, stop_signal="USR2", say=print)
    assert calls == [] and Events(run).newest_job() == 18
    Events(RunFolder(tmp_path / "copy")).add("submitted", job=19, cluster="")
    assert Events(RunFolder(tmp_path / "copy")).newest_job() == 19
    run.path.rename(tmp_path / "moved")
    assert Events(RunFolder(tmp_path / "moved")).newest_job() == 18


def test_cancel_asks_for_a_checkpoint_first(
    config: Config, run: RunFolder, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Events(run).add("submitted", job=17)
    monkeypatch.setattr(slurm_client, "job", lambda *_, **__: RUNNING)
    answers = iter([RUNNING, replace(RUNNING, state="FAILED")])
    monkeypatch.setattr(slurm_client, "shown", lambda *_, **__: next(answers))
    monkeypatch.setattr(slurm, "POLL_S", 0.01)
    said: list[str] = []
    slurm.cancel(config, wait_s=5, stop_signal="USR2", say=said.append)
    assert calls == ["scancel --signal=USR2 17"], "it ended by itself"
    assert Events(run).of("cancelled", [17])
    slurm.cancel(config, wait_s=0, stop_signal="USR2", say=said.append)
    assert calls[1:] == ["scancel 17"]
    monkeypatch.setattr(slurm_client, "job", lambda *_, **__: None)
    slurm.cancel(config, wait_s=5, stop_signal="USR2", say=said.append)
    assert said[-1] == "job 17 is over already" and len(calls) == 2


@pytest.mark.parametrize(("launcher", "whom"), [("mpi", " --batch"), ("srun", ""), ("torchrun", "")])
def test_cancel_asks_whom_the_launcher_listens_to(
    launcher: str, whom: str, config: Config, run: RunFolder, calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mpirun is no task of SLURM's: the batch script hands it the signal."""
    Events(run).add("started", job=17, attempt="17.0", update=0, nodes=["node1"], log="", offset=0)
    script = tmp_path / "by_hand.sbatch"
    script.write_text(template({"srun": "multi_node_srun", "torchrun": "multi_node_torchrun", "mpi": "mpi"}[launcher]))
    monkeypatch.setattr(slurm_client, "job", lambda *_: RUNNING)
    monkeypatch.setattr(slurm, "POLL_S", 0.01)
    states = ("SIGNALING", "RUNNING", "FAILED")  # SLURM shows the first while a node has not yet answered
    answers = iter([replace(RUNNING, command=str(script)), *(replace(RUNNING, state=state) for state in states)])
    monkeypatch.setattr(slurm_client, "shown", lambda *_, **__: next(answers))
    slurm.cancel(config, wait_s=5, stop_signal="USR2", say=lambda _: None)
    assert calls == [f"scancel{whom} --signal=USR2 17"]


def test_a_job_and_the_successor_that_waits_for_it(
    config: Config, run: RunFolder, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    events = Events(run)
    events.add("submitted", job=17, cluster="alex")
    events.add("started", job=17, attempt="17.0", update=0, nodes=["node1"], log="", offset=0)
    events.add("successor", job=18, of=17, cluster="")
    states = {17: "RUNNING", 18: "PENDING"}
    monkeypatch.setattr(slurm_client, "job", lambda job, _: replace(RUNNING, id=job, state=states[job]))
    shown = list(slurm.status(config))
    assert shown[0].startswith("job 17 (a): RUNNING") and shown[2] == "job 18 resumes the run when it has ended"
    with pytest.raises(ConfigError, match=r"job 18 \(PENDING\) is there for it"):
        slurm.refuse_second(run)
    slurm.cancel(config, wait_s=0, stop_signal="USR2", say=lambda _: None)
    assert calls == ["scancel --clusters=alex 18", "scancel --clusters=alex 17"]
    assert slurm.known_job(run)[1] == 17
    events.add("successor", job=19, of=17)
    states[17], states[19] = "FAILED", "PENDING"
    assert slurm.known_job(run)[1] == 19, "its batch node died, and nobody could write an end"
