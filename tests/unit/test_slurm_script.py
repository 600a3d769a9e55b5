"""What a job is asked for, and the batch script that follows."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from relora_ds.errors import ConfigError
from relora_ds.slurm_script import TEMPLATES, Settings, describe, read_site, render, settings, template

ROOT = Path(__file__).resolve().parents[2]
GPUS: dict[str, Any] = {"gpus_per_node": "8"}


def script(**options: Any) -> str:
    return render(settings({}, {**GPUS, **options}), recipe="/runs/a/recipe.yaml", output="/runs/a/job.out", name="a")


def directives(text: str) -> dict[str, str]:
    words = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (word.partition("=") for word in words)}


# Settings


def test_options_stand_over_the_site_file() -> None:
    found = settings({"partition": "gpu", "account": "lm", "nodes": 4}, {**GPUS, "partition": "long"})
    assert (found.partition, found.account, found.nodes) == ("long", "lm", "4")


def test_a_site_file(tmp_path: Path) -> None:
    path = tmp_path / "slurm.yaml"
    assert read_site(path) == {}
    path.write_text("partition: gpu\nsetup: [module load cuda]\ngpus_per_node: 4\ntime: 24:00:00\nmem: 0\n")
    found = settings(read_site(path), {}, path)
    assert (found.partition, found.setup, found.num_gpus, found.ranks_per_node) == ("gpu", ["module load cuda"], 4, 4)
    assert (found.time, found.mem) == ("24:00:00", "0")
    path.write_text("- partition\n")
    with pytest.raises(ConfigError, match=r"must hold keys and values"):
        read_site(path)


@pytest.mark.parametrize(
    ("site", "options", "message"),
    [
        ({"partitoin": "gpu"}, {}, r"slurm.yaml.partitoin='gpu': unknown key; did you mean 'partition'\?"),
        ({"signal_before": "soon"}, {}, r"slurm.yaml.signal_before='soon'"),
        ({}, {}, r"--gpus-per-node=None: is required"),
        ({}, {"gpus_per_node": "0"}, r"--tasks-per-node=None: is required where there are no GPUs"),
        ({}, {"gpus_per_node": "a100"}, r"--gpus-per-node='a100'"),
        ({}, {**GPUS, "tasks_per_node": 9}, r"--tasks-per-node=9: more than the 8 GPU"),
        ({}, {**GPUS, "nodes": "4-2"}, r"--nodes='4-2': the range is the wrong way round; --nodes 2-4"),
        ({}, {**GPUS, "nodes": "0"}, r"--nodes='0'"),
        ({}, {**GPUS, "signal": "KILL"}, r"--signal='KILL'"),
        ({}, {**GPUS, "signal_before": 5}, r"--signal-before=5"),
        ({}, {**GPUS, "max_stalled": 0}, r"--max-stalled=0"),
        ({}, {**GPUS, "partition": "a\n#SBATCH --wrap=evil"}, r"--partition=.*must be one line"),
        ({}, {**GPUS, "setup": ["a\nb"]}, r"--setup=.*must be one line"),
        ({}, {**GPUS, "sbatch_args": ["evil.sh"]}, r"--sbatch-args='evil.sh': is no option of sbatch"),
    ],
)
def test_what_cannot_be_used_is_named(site: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(site, options, Path("slurm.yaml"))


def test_ranks_and_nodes() -> None:
    found = settings({}, {"gpus_per_node": "a100:4", "nodes": "2-16"})
    assert (found.node_range, found.num_gpus, found.ranks_per_node) == ((2, 16), 4, 4)
    assert describe(found) == "2-16 nodes × 4 ranks, by srun"
    assert settings({}, {"tasks_per_node": 3}).node_range == (1, 1)


# The script


def test_templates_are_the_scripts_that_submit_writes() -> None:
    """After a change of the renderer: write template(name) into the file."""
    assert {path.stem for path in (ROOT / "slurm").glob("*.sbatch")} == set(TEMPLATES)
    for name in TEMPLATES:
        assert (ROOT / "slurm" / f"{name}.sbatch").read_text(encoding="utf-8") == template(name), name


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "mpi"])
@pytest.mark.parametrize(
    "more", [{}, {"container": "apptainer exec --nv a.sif", "environment_file": "/home/me/my env", "mem": "0"}]
)
def test_it_is_shell(launcher: str, more: dict[str, Any]) -> None:
    result = subprocess.run(["bash", "-n"], input=script(launcher=launcher, **more), capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_directives() -> None:
    asked = directives(
        script(
            nodes="2-4", time="1-00:00", partition="gpu", account="lm", qos="high", constraint="a100&nvlink", exclude="node[1-3]",
            mem="512G", cpus_per_task=12, job_name="my job", sbatch_args=["--reservation=week"],
        )
    )  # fmt: skip
    assert asked == {
        "job-name": '"my job"', "nodes": "2-4", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "12", "mem": "512G",
        "time": "1-00:00", "partition": "gpu", "account": "lm", "qos": "high", "constraint": '"a100&nvlink"',
        "exclude": "node[1-3]", "output": "/runs/a/job.out", "open-mode": "append", "signal": "USR2@300", "requeue": "",
        "reservation": "week",
    }  # fmt: skip


def test_every_setting_can_be_an_option() -> None:
    from relora_ds.cli_slurm import HELP

    assert set(HELP) == set(Settings.model_fields)


def test_torchrun_is_one_task_a_node_with_the_cores_of_all_its_ranks() -> None:
    text = script(launcher="torchrun", cpus_per_task=12)
    assert "ntasks-per-node" not in directives(text) and directives(text)["cpus-per-task"] == "96"
    assert 'OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((SLURM_CPUS_PER_TASK / tasks_per_node))}"' in text


def test_mpirun_gets_the_signal_from_the_script() -> None:
    text = script(launcher="mpi", signal="USR1", signal_before=60)
    assert directives(text)["signal"] == "B:USR1@60"
    assert "trap 'kill -s USR1 \"$step\"' USR1" in text


def test_who_starts_the_job_again() -> None:
    assert "requeue" in directives(script())
    for requeue_by in ("dependency", "none"):
        text = script(requeue_by=requeue_by, max_stalled=5)
        assert "no-requeue" in directives(text) and f"--requeue-by {requeue_by} --max-stalled 5" in text


STAGE = """
python() {{ echo "python $*" >>calls; case "$*" in *" before "*) echo {nodes}; return {before};; esac; }}
srun() {{ echo "srun $*" >>calls; {srun}; }}
export SLURM_CPUS_PER_TASK=2
"""


def play(tmp_path: Path, *, nodes: int = 3, before: int = 0, srun: str = "return 75", **options: Any) -> list[str]:
    """The calls that the script makes when its programs are functions of the shell."""
    stage = STAGE.format(nodes=nodes, before=before, srun=srun)
    subprocess.run(["bash", "-c", stage + script(python="python", **options)], cwd=tmp_path, check=False, timeout=30)
    return (tmp_path / "calls").read_text().splitlines()


def test_the_step_uses_as_many_nodes_as_fit(tmp_path: Path) -> None:
    before, step, after = play(tmp_path)
    recipe = "/runs/a/recipe.yaml"
    assert before == f"python -m relora_ds.cli slurm before {recipe} --tasks-per-node 8 --requeue-by requeue"
    assert step == (
        "srun --nodes=3 --ntasks=24 --ntasks-per-node=8 --kill-on-bad-exit=1 --cpus-per-task=2 "
        f"python -m relora_ds.cli train {recipe}"
    )
    assert after == f"python -m relora_ds.cli slurm after {recipe} --code 75 --requeue-by requeue --max-stalled 3"


def test_no_step_where_the_recipe_cannot_run(tmp_path: Path) -> None:
    calls = play(tmp_path, before=2)
    assert len(calls) == 2 and "--code 2 " in calls[1]


def test_a_term_does_not_end_the_script_before_its_ranks(tmp_path: Path) -> None:
    """SLURM's TERM reaches the shell and the ranks at the same time."""
    calls = play(tmp_path, srun="kill -s TERM $$; sleep 0.5; echo left >>calls; return 75")
    assert calls[2] == "left" and "--code 75 " in calls[3]


def test_set_up_lines_come_first(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("NAME=value\n")
    text = play(
        tmp_path, setup=["echo module >>calls"], environment_file="env", srun='echo "$NAME" >>calls; bash -c "echo $NAME" >>calls'
    )
    assert text[0] == "module" and text[3:5] == ["value", "value"]
