"""The command line: what it accepts, and how it refuses: exit code 2, one line on stderr, no process group."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import pytest
import torch.distributed as dist

from relora_ds import __version__
from relora_ds.cli.main import main
from relora_ds.errors import AllError, ConfigError, RankError
from relora_ds.launch import launcher, libraries, process_group
from tests.unit.run.test_manifest import no_access

ROOT = Path(__file__).resolve().parents[3]
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "SLURM_STEP_ID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def started_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher, whatever runs the tests."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # main sets it where it is not set


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused; returns its one line."""

    def run(*arguments: str) -> str:
        capfd.readouterr()
        code: object = None
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        assert code == 2
        assert out == ""
        assert len(err.splitlines()) == 1, err
        assert err.startswith("relora-ds: error: ")
        assert not dist.is_initialized()
        return err.rstrip("\n")

    return run


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int]]:
    """What would have been started: (arguments, number of processes) of each spawn."""
    calls: list[tuple[list[str], int]] = []

    def spawn(arguments: Sequence[str], num_processes: int, stop_signal: str) -> int:
        calls.append((list(arguments), num_processes))
        return 0

    monkeypatch.setattr(launcher, "spawn", spawn)
    return calls


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("relora.rnak=16", "relora.rnak=16: unknown key; did you mean 'rank'?"),
        ("train.updates=many", "train.updates='many': input should be a valid integer"),
        ("optimizer.schedule=jaged", "optimizer.schedule='jaged': not one of the valid names; did you mean 'jagged'?"),
        ("relora.warm_start=20", "relora.warm_start=20: not shorter than the run of 20 updates"),
        (
            "relora.targets=qproj",
            "relora.targets='qproj': matches no linear layer or embedding of the model; did you mean 'q_proj'?",
        ),
        (
            "deepspeed.zero_optimization.stage=3",
            "deepspeed.zero_optimization.stage=3: ReLoRA runs on ZeRO stage 1 or 2; set it to 2",
        ),
    ],
)
def test_a_bad_recipe_is_one_line_and_code_2(refused: Refused, recipe: Path, override: str, message: str) -> None:
    assert refused("train", str(recipe), override, "--nproc", "2") == f"relora-ds: error: {message}"


def test_a_batch_that_does_not_divide_over_nproc(refused: Refused, recipe: Path) -> None:
    line = refused("train", str(recipe), "--nproc", "3")
    assert line.startswith("relora-ds: error: train.global_batch=8: ")


def test_a_recipe_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    assert refused("train", str(tmp_path / "none.yaml")).startswith("relora-ds: error: RECIPE=")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ConfigError("--nproc", 2, "one GPU"), ""),
        (AllError("--nproc=2: one GPU"), ""),
        (RankError(3, "node2", "--nproc=2: one GPU"), ""),
        (RankError(1, "node2", "--nproc=2: one GPU", speaker=1), "relora-ds: error: rank 1 on node2: --nproc=2: one GPU\n"),
    ],
    ids=["before the start", "all", "some", "this one"],
)
def test_rank_0_speaks_for_all_but_of_what_it_cannot_hear(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: ConfigError, told: str
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(process_group, "start", refuse)
    assert main(["train", str(recipe), "relora.rank=0"]) == 2
    assert capfd.readouterr().err == told


def test_a_command_that_no_launcher_starts_speaks_in_any_shell(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a pod, or of a job, whose variables say that it is rank 1."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "RECIPE='/nowhere'" in refused("slurm", "status", "/nowhere")


def test_a_command_that_is_told_of_a_launcher_finds_its_trace(refused: Refused, recipe: Path) -> None:
    assert "--under='srun': nothing in the environment says which rank this is" in refused(
        "train", str(recipe), "--under", "srun"
    )


@pytest.mark.parametrize("nproc", ["0", "-1"])
def test_nproc_must_be_positive(refused: Refused, recipe: Path, nproc: str) -> None:
    assert refused("train", str(recipe), f"--nproc={nproc}") == f"relora-ds: error: --nproc={nproc}: must be at least 1"


def test_nproc_must_be_a_number(refused: Refused, recipe: Path) -> None:
    assert "--nproc" in refused("train", str(recipe), "--nproc", "two")


@pytest.mark.parametrize("launcher", [{}, {"RANK": "0", "WORLD_SIZE": "2"}], ids=["alone", "torchrun"])
def test_profile_must_be_positive(
    refused: Refused, spawned: list, recipe: Path, monkeypatch: pytest.MonkeyPatch, launcher: dict[str, str]
) -> None:
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    assert refused("train", str(recipe), "--profile", "0") == "relora-ds: error: --profile=0: must be at least 1"
    assert spawned == []


def test_profile_reaches_the_ranks(spawned: list, recipe: Path) -> None:
    assert main(["train", str(recipe), "--nproc", "2", "--profile", "5", "run.seed=7"]) == 0
    assert spawned == [(["train", str(recipe), "run.seed=7", "--profile", "5"], 2)]


def test_nproc_is_refused_under_a_launcher(refused: Refused, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in refused("train", str(recipe), "--nproc", "2")


def test_flags_cannot_be_abbreviated(refused: Refused, spawned: list, recipe: Path) -> None:
    line = refused("train", str(recipe), "--npro=2")
    assert "--npro" in line
    assert "unknown option; did you mean '--nproc'?" in line
    assert spawned == []


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("train", "RECIPE", "--nprocs=2"), "did you mean '--nproc'?"),
        (("train", "RECIPE", "--quick"), "valid names: --allow-changed, --help, --nproc, --profile, --trust, --under"),
        (("plan", "RECIPE", "--vocab-sise=5", "--gpus", "1"), "did you mean '--vocab-size'?"),
        (("report", "RUN", "--outt=x"), "did you mean '--out'?"),
        (("spectrum", "RUN", "--al"), "did you mean '--all'?"),
        (("export", "RUN", "OUT", "--dty", "fp32"), "did you mean '--dtype'?"),
        (("eval", "RUN", "--max-token", "5"), "did you mean '--max-tokens'?"),
        (("prepare", "SOURCE", "OUT", "--vocab", "300"), "did you mean '--vocab-size'?"),
        (("slurm", "submit", "RECIPE", "--no-chek"), "did you mean '--no-check'?"),
        (("slurm", "logs", "RUN", "--line", "3"), "did you mean '--lines'?"),
    ],
    ids=str,
)
def test_unknown_options_are_refused_before_any_work(refused: Refused, arguments: tuple[str, ...], hint: str) -> None:
    option = next(word for word in arguments if word.startswith("--")).partition("=")[0]
    line = refused(*arguments)
    assert option in line
    assert f"unknown option; {hint}" in line


@pytest.mark.parametrize(
    "arguments", [(), ("trian", "RECIPE"), ("train",), ("export", "RUN", "OUT", "--dtype", "fp8")], ids=" ".join
)
def test_faults_of_the_command_line_have_the_same_form(refused: Refused, arguments: tuple[str, ...]) -> None:
    assert "--help)" in refused(*arguments)


@pytest.mark.parametrize("option", ["--local_rank=0", "--local-rank=0"])
def test_the_option_that_the_deepspeed_launcher_adds(refused: Refused, recipe: Path, option: str) -> None:
    assert "relora.rnak=8" in refused(option, "train", str(recipe), "relora.rnak=8")


def test_overrides_may_follow_options(spawned: list, recipe: Path) -> None:
    assert main(["train", str(recipe), "relora.rank=8", "--nproc", "2", "run.seed=7", "optimizer.lr=1e-4"]) == 0
    assert spawned == [(["train", str(recipe), "relora.rank=8", "run.seed=7", "optimizer.lr=1e-4"], 2)]


def test_overrides_that_follow_options_are_checked(refused: Refused, recipe: Path) -> None:
    assert "did you mean 'rank'?" in refused("train", str(recipe), "--nproc", "2", "relora.rnak=8")


@pytest.mark.parametrize("command", ["eval", "export"])
def test_a_folder_without_a_checkpoint(refused: Refused, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "guard_bf16", lambda: None)
    arguments = [command, str(tmp_path), *([str(tmp_path / "out")] if command == "export" else [])]
    assert refused(*arguments).startswith(f"relora-ds: error: RUN_DIR={str(tmp_path)!r}: holds no complete checkpoint")


def test_the_package_is_a_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["relora_ds", "--version"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("relora_ds", run_name="__main__")
    assert end.value.code == 0 and capsys.readouterr().out.startswith("relora-ds ")


def test_no_command_waits_for_torch_to_be_known() -> None:
    """Parsing, help and refusals are there at once; a child, since this process has imported all that there is."""
    asked = "import sys, relora_ds, relora_ds; sys.exit(any(name in sys.modules for name in ('torch', 'deepspeed')))"
    assert subprocess.run([sys.executable, "-c", asked], check=False).returncode == 0


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"relora-ds {__version__}\n"


def test_a_bad_recipe_as_users_meet_it(recipe: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "relora_ds", "train", str(recipe), "relora.rnak=8", "--nproc", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "relora-ds: error: relora.rnak=8: unknown key; did you mean 'rank'?\n"


PATH_ARGUMENTS = [
    ("prepare", "$UNSET/a", "out"),
    ("prepare", "a", "$UNSET/out"),
    ("prepare", "a", "out", "--tokenizer", "$UNSET"),
    ("train", "$UNSET/r.yaml"),
    ("eval", "$UNSET"),
    ("eval", "run", "--data", "$UNSET"),
    ("export", "$UNSET", "out"),
    ("export", "run", "$UNSET"),
    ("checkpoints", "$UNSET"),
    ("report", "run", "$UNSET"),
    ("report", "run", "--out", "$UNSET"),
    ("spectrum", "$UNSET"),
    ("spectrum", "run", "--out", "$UNSET"),
    ("traffic", "$UNSET"),
    ("traffic", "r.yaml", "--out", "$UNSET"),
    ("plan", "$UNSET", "--gpus", "1"),
    ("slurm", "submit", "$UNSET"),
    ("slurm", "submit", "r.yaml", "--site", "$UNSET"),
    ("slurm", "submit", "r.yaml", "--tasks-per-node", "1", "--environment-file", "$UNSET"),
    ("slurm", "submit", "r.yaml", "--tasks-per-node", "1", "--python", "$UNSET"),
    ("slurm", "status", "$UNSET"),
    ("slurm", "logs", "$UNSET"),
    ("slurm", "cancel", "$UNSET"),
    ("slurm", "before", "$UNSET", "--tasks-per-node", "1"),
]


@pytest.mark.parametrize("arguments", PATH_ARGUMENTS, ids=" ".join)
def test_every_argument_that_is_a_path_is_filled_in(
    refused: Refused, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UNSET", raising=False)
    assert "the environment variable UNSET is not set, or empty" in refused(*arguments)


def test_home_is_filled_in_on_the_command_line(
    recipe: Path, tmp_path: Path, spawned: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And in the batch script; nothing is made in a folder that is called ~."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe.rename(tmp_path / "home" / "r.yaml")
    assert main(["train", "~/r.yaml", "run.dir=~/runs/x", "--nproc", "2"]) == 0
    assert spawned[0][0][1] == str(tmp_path / "home" / "r.yaml")
    assert main(["slurm", "submit", "~/r.yaml", "run.dir=~/runs/x", "--tasks-per-node", "1", "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert f"recipe={tmp_path}/home/runs/x/slurm/recipe.yaml" in script and "~" not in script
    assert not (tmp_path / "~").exists()


def test_a_folder_that_cannot_be_read_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").touch()
    import relora_ds.checkpoint.listing  # noqa: F401  # as another user this process could not

    with no_access(run):
        assert main(["checkpoints", str(run)]) == 1
    assert capfd.readouterr().err == f"relora-ds: error: {run / 'config.yaml'}: Permission denied\n"


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """As head: Python would print a traceback, and complain once more at its end."""
    reads, writes = os.pipe()
    os.close(reads)
    script = "from relora_ds.cli import main; main.main = lambda: print('x' * 100_000) or print('y'); main.entry_point()"
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, check=False, timeout=120, cwd=ROOT)
    os.close(writes)
    assert (ended.returncode, ended.stderr) == (1, "")
