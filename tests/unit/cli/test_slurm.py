"""``relora-ds slurm``: options, and what batch scripts call."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from relora_ds.cli import slurm as cli_slurm
from relora_ds.cli.main import main
from relora_ds.launch import places, process_group
from relora_ds.launch import torchrun_agent as slurm_agent
from relora_ds.run.folder import RunFolder
from relora_ds.slurm import client as slurm_client
from relora_ds.slurm.events import Events
from tests.unit.slurm.test_commands import RUNNING

ROOT = Path(__file__).resolve().parents[3]


def test_dry_run_takes_site_file_and_options(
    recipe: Path, home: Path, run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    site = home / ".config" / "relora-ds" / "slurm.yaml"
    site.parent.mkdir(parents=True)
    site.write_text("partition: gpu\naccount: lm\ntasks_per_node: 2\nsignal: USR1\n")
    words = ["slurm", "submit", str(recipe), "train.micro_batch=1", "--nodes", "2-4", "--partition", "long", "--dry-run"]
    assert main(words) == 0
    text = capsys.readouterr().out
    for line in ("--partition=long", "--account=lm", "--nodes=2-4", "--signal=USR1@300", "--job-name=recipe"):
        assert f"#SBATCH {line}\n" in text
    assert not run.path.exists()


def test_the_recipes_own_signal_is_asked_for(recipe: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["slurm", "submit", str(recipe), "--tasks-per-node", "1", "train.stop_signal=HUP", "--dry-run"]) == 0
    assert "#SBATCH --signal=HUP@300\n" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a login node has no GPU")
@pytest.mark.parametrize(("gpus", "code"), [("1", 0), ("0", 2)])
def test_a_login_node_does_not_judge_what_needs_a_gpu(gpus: str, code: int, recipe: Path, home: Path) -> None:
    words = ["--tasks-per-node", "1", "--gpus-per-node", gpus, "model.attention=flash_attention_2", "--dry-run"]
    assert main(["slurm", "submit", str(recipe), *words]) == code


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "mpi"])
def test_what_the_user_insists_on_reaches_the_ranks(
    launcher: str, recipe: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--tasks-per-node", "1", "--launcher", launcher, "--allow-changed", "relora", "--trust", "--dry-run"]
    assert main(["slurm", "submit", str(recipe), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    insisting = [line for line in lines if "--allow-changed relora --trust" in line]
    assert len(insisting) == 2 and "slurm before" in insisting[0]
    assert ("slurm torchrun" if launcher == "torchrun" else "train") in insisting[1]


def test_a_run_is_named_by_its_folder_or_its_recipe(recipe: Path, run: RunFolder) -> None:
    assert cli_slurm.read_place(recipe).run.dir == str(run.path)
    run.slurm.mkdir(parents=True)
    (run.slurm / "recipe.yaml").write_text(recipe.read_text().replace("seed: 1", "seed: 7"))
    assert cli_slurm.read_place(run.path).run.seed == 7
    moved = run.path.rename(run.path.with_name("moved"))
    assert cli_slurm.read_place(moved).run.dir == str(moved)


def test_torchruns_agent_of_a_node(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], str]] = []
    place = places.Place(1, 4, 0, 1, "node1", 20123, "srun")
    monkeypatch.setattr(places, "discover", lambda: place)
    monkeypatch.setattr(process_group, "find_master", lambda place: replace(place, master_addr="10.0.0.1"))
    monkeypatch.setattr(slurm_agent, "run_agent", lambda words, signal: started.append((words, signal)) or 1)
    assert main(["slurm", "torchrun", str(recipe), "--tasks-per-node", "8"]) == 1
    words = [
        "--nnodes=4", "--node-rank=1", "--nproc-per-node=8", "--master-addr=10.0.0.1", "--master-port=20123", "--module",
        "relora_ds", "train", str(recipe),
    ]  # fmt: skip
    assert started == [(words, "USR2")]


def test_a_signal_of_the_recipe_that_mpirun_keeps_is_refused(
    recipe: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["slurm", "submit", str(recipe), "--tasks-per-node", "1", "--launcher", "mpi", "train.stop_signal=HUP", "--dry-run"]
    assert main(words) == 2
    assert "--signal='HUP': mpirun ends the ranks upon it" in capsys.readouterr().err


def test_gpus_without_cores_are_told_of(recipe: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["slurm", "submit", str(recipe), "--gpus-per-node", "1", "--dry-run"]
    assert main(words) == 0 and "[relora-ds] without --cpus-per-task SLURM gives each rank one core" in capsys.readouterr().err
    assert main([*words, "--cpus-per-task", "8"]) == 0 and capsys.readouterr().err == ""


def test_before_says_nodes_and_restarts(
    recipe: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The count of SLURM, not one that another job left in the environment."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    monkeypatch.setattr(slurm_client, "shown", lambda *_, **__: replace(RUNNING, restarts=0))
    words = ["slurm", "before", str(recipe), "--tasks-per-node", "2"]
    assert main(words) == 0 and capsys.readouterr().out == "2 0\n"
    assert Events(run).of("started")[0]["attempt"] == "17.0"
    monkeypatch.setattr(slurm_client, "shown", lambda *_, **__: replace(RUNNING, restarts=1))
    monkeypatch.setattr(cli_slurm.libraries, "quiet_libraries", lambda: pytest.fail("torch is imported"))
    assert main(words) == 0 and capsys.readouterr().out == "2 1\n", "as many nodes again: nothing is checked"
    monkeypatch.setenv("SLURM_HET_SIZE", "2")
    assert main(words) == 2
    assert "SLURM_HET_SIZE='2': jobs of several components are not served" in capsys.readouterr().err
    monkeypatch.delenv("SLURM_HET_SIZE")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    assert main(words) == 2 and "SLURM_ARRAY_TASK_ID='0': a run is one job, not an array" in capsys.readouterr().err


@pytest.fixture
def deaf_for_now() -> Iterator[None]:
    """The end of a start ignores TERM, which this process, and what it starts, must not do for good."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("deaf_for_now")
def test_the_end_of_a_start_waits_for_a_file_system_that_is_away(
    recipe: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the ranks died of would else end the job for good."""
    run.path.mkdir()
    Events(run).add("started", job=17, attempt="17.0", update=0, nodes=["node1"], log="", offset=0)
    asked: list[tuple[str, ...]] = []
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node1")
    monkeypatch.setattr(slurm_client, "shown", lambda *_, **__: replace(RUNNING, restarts=0))
    monkeypatch.setattr(slurm_client, "insist", lambda *words, **_: asked.append(tuple(map(str, words))))
    monkeypatch.setattr(cli_slurm, "AWAY_PAUSE_S", 0.05)
    away = recipe.rename(f"{recipe}.away")
    timer = threading.Timer(0.3, lambda: away.rename(recipe))
    timer.start()
    assert main(["slurm", "after", str(recipe), "--code", "1"]) == 1
    timer.join()
    assert asked == [("scontrol", "requeue", "17")]
    assert f"waiting up to 300 s for {recipe}, which is away" in capsys.readouterr().err


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_node_that_does_not_see_the_recipe_is_left_by_a_later_start(
    restarts: int, recipe: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first start is told that the recipe is not there; an earlier start had it, so the node misses a mount."""
    asked: list[tuple[str, ...]] = []
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    monkeypatch.setenv("SLURMD_NODENAME", "node1")
    monkeypatch.setattr(slurm_client, "shown", lambda *_, **__: replace(RUNNING, restarts=restarts))
    monkeypatch.setattr(slurm_client, "insist", lambda *words, **_: asked.append(tuple(map(str, words))))
    code = main(["slurm", "before", str(recipe) + ".away", "--tasks-per-node", "2"])
    said = capsys.readouterr()
    assert said.out == ""
    if restarts:
        assert code == 75 and "node1 does not see the recipe: the job starts again without" in said.err
        assert asked == [("scontrol", "requeue", "17"), ("scontrol", "update", "JobId=17", "ExcNodeList=node1")]
    else:
        assert code == 2 and ".away" in said.err and asked == []


@pytest.mark.parametrize("image_has_it", [False, True])
def test_a_container_without_relora_ds_is_told_before_its_ranks(
    image_has_it: bool, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, at the first start; a later one, on another node, is not the place to find a setting wrong for good."""
    image = tmp_path / "image"
    image.write_text("#!/bin/bash\necho asked >>asked\n" + ("exec true" if image_has_it else 'echo "FATAL: no $1" >&2; exit 255'))
    image.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node1")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.setattr(slurm_client, "shown", lambda *_, **__: RUNNING)
    command = f"{image} python -m relora_ds --version"
    words = ["slurm", "before", str(recipe), "--tasks-per-node", "2", "--probe", command]
    codes = [main(words), main(words)]
    said = capsys.readouterr()
    if image_has_it:
        assert codes == [0, 0] and said.out == "1 0\n1 0\n" and (tmp_path / "asked").read_text() == "asked\n"
    else:
        assert codes == [2, 2] and said.out == ""
        assert f"--container='{command}': relora_ds does not start in it: FATAL: no python; install relora_ds in" in said.err


@pytest.mark.parametrize("words", [["before", "--tasks-per-node", "1"], ["after", "--code", "0"]])
def test_what_batch_scripts_call_is_for_jobs_alone(
    words: list[str], recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(cli_slurm.signal, "signal", lambda *_: None)
    assert main(["slurm", words[0], str(recipe), *words[1:]]) == 2
    assert "SLURM_JOB_ID=None: this is not inside a SLURM job" in capsys.readouterr().err


def test_hostfile_of_this_allocation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli_slurm, "allocation", lambda: "node[1-2,7]")
    assert main(["slurm", "hostfile", "--slots", "8"]) == 0
    assert capsys.readouterr().out == "node1 slots=8\nnode2 slots=8\nnode7 slots=8\n"
    monkeypatch.setattr(cli_slurm, "allocation", lambda: None)
    assert main(["slurm", "hostfile", "--slots", "8"]) == 2
