"""What a job is asked for, and the batch script that follows."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from relora_ds.errors import ConfigError
from relora_ds.slurm.script import (
    TEMPLATES,
    Settings,
    check_environment_file,
    check_signal,
    describe,
    doubts,
    read_site,
    render,
    seconds,
    settings,
    template,
)

ROOT = Path(__file__).resolve().parents[3]
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


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("30", 1800), ("5:30", 330), ("1:00:00", 3600), ("2-00", 172800), ("1-1:30", 91800), ("0-0:0:5", 5), ("0", None),
        ("UNLIMITED", None), ("", None), ("1:2:3:4", None),
    ],
)  # fmt: skip
def test_time_limits_as_sbatch_reads_them(limit: str, expected: int | None) -> None:
    assert seconds(limit) == expected


def test_a_signal_of_ones_own_may_come_when_it_wants() -> None:
    assert settings({}, {**GPUS, "time": "2", "sbatch_args": ["--signal=USR2@1"]}).time == "2"


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
        ({}, {**GPUS, "time": "5"}, r"--signal-before=300: --time=5 is 300 s: the ranks would be asked to stop as they start"),
        ({}, {**GPUS, "partition": "a\n#SBATCH --wrap=evil"}, r"--partition=.*must be one line"),
        ({}, {**GPUS, "setup": ["a\nb"]}, r"--setup=.*must be one line"),
        ({}, {**GPUS, "sbatch_args": ["--array=1-4%1"]}, r"--sbatch-args='--array=1-4%1': a run is one job, not an array"),
        ({}, {**GPUS, "sbatch_args": ["-a1-4"]}, r"--sbatch-args='-a1-4': a run is one job, not an array"),
        ({}, {**GPUS, "sbatch_args": [":"]}, r"--sbatch-args=':': jobs of several components are not served"),
        (
            {},
            {**GPUS, "srun_args": ["--het-group=0,1"]},
            r"--srun-args='--het-group=0,1': jobs of several components are not served",
        ),
        ({}, {**GPUS, "gpu_request": "gpus"}, r"--gpu-request='gpus'"),
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


@pytest.mark.parametrize(
    ("request_by", "asked"), [("gpus-per-node", {"gpus-per-node": "a100:4"}), ("gres", {"gres": "gpu:a100:4"}), ("none", {})]
)
def test_how_gpus_are_asked_for(request_by: str, asked: dict[str, str]) -> None:
    found = settings({}, {"gpus_per_node": "a100:4", "gpu_request": request_by})
    assert (found.num_gpus, found.ranks_per_node) == (4, 4)
    got = directives(render(found, recipe="r", output="o"))
    assert {key: value for key, value in got.items() if key in ("gpus-per-node", "gres")} == asked
    assert got["ntasks-per-node"] == "4"
    without = directives(render(settings({}, {"tasks_per_node": 2, "gpu_request": request_by}), recipe="r", output="o"))
    assert not {"gpus-per-node", "gres"} & set(without)


@pytest.mark.parametrize("options", [{"cpus_per_task": 8}, {"sbatch_args": ["--cpus-per-gpu=8"]}, {"sbatch_args": ["-c8"]}])
def test_gpus_without_cores_are_doubted(options: dict[str, Any]) -> None:
    (doubt,) = doubts(settings({}, GPUS))
    assert doubt.startswith("without --cpus-per-task SLURM gives each rank one core")
    assert doubts(settings({}, {**GPUS, **options})) == doubts(settings({}, {"tasks_per_node": 2})) == []


def test_a_signal_that_mpirun_keeps_is_refused() -> None:
    for name in ("TERM", "INT", "HUP"):
        check_signal(settings({}, {**GPUS, "signal": name}))
        with pytest.raises(ConfigError, match=f"--signal='{name}': mpirun ends the ranks upon it"):
            check_signal(settings({}, {**GPUS, "launcher": "mpi", "signal": name}))


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "mpi"])
def test_a_container_has_an_interpreter_of_its_own(launcher: str) -> None:
    """The one that submits is a path that the image need not have."""
    lines = script(launcher=launcher, container="apptainer exec --nv a.sif", python="/venv/bin/python").splitlines()
    assert "container_python=python" in lines and "python=/venv/bin/python" in lines
    (ranks,) = (line for line in lines if "apptainer" in line and "slurm before" not in line)
    assert ranks.strip().startswith('apptainer exec --nv a.sif "$container_python" -m relora_ds ')
    around = [line for line in lines if "slurm before" in line or "slurm after" in line]
    assert len(around) == 2 and all('"$python" -m relora_ds slurm ' in line for line in around)
    assert " --probe 'apptainer exec --nv a.sif python -m relora_ds --version'" in around[0] and "container" not in around[1]


def test_an_image_may_be_named_to_srun() -> None:
    text = script(container_python="/opt/conda/bin/python", srun_args=["--container-image=/a.sqsh"])
    assert "container_python=/opt/conda/bin/python\n" in text and '"$container_python" -m relora_ds train' in text
    assert "container_python" not in script()


def test_every_setting_can_be_an_option() -> None:
    from relora_ds.cli.slurm import HELP

    assert set(HELP) == set(Settings.model_fields)


def test_torchrun_is_one_task_a_node_with_the_cores_of_all_its_ranks() -> None:
    text = script(launcher="torchrun", cpus_per_task=12)
    assert "ntasks-per-node" not in directives(text) and directives(text)["cpus-per-task"] == "96"
    assert 'OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-$tasks_per_node} / tasks_per_node))}"' in text


def test_mpirun_gets_the_signal_from_the_script() -> None:
    text = script(launcher="mpi", signal="USR1", signal_before=60)
    assert directives(text)["signal"] == "B:USR1@60"
    lines = text.splitlines()
    assert lines.index("trap : TERM USR1") < next(n for n, line in enumerate(lines) if " slurm before " in line)
    start = next(n for n, line in enumerate(lines) if line.startswith("    mpirun "))
    assert lines[start - 1] == "    trap 'kill -s USR1 \"$!\"' USR1 TERM", "there before it can be asked for"


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


def play(
    tmp_path: Path, *, nodes: int = 3, before: int = 0, srun: str = "return 75", stage: str = STAGE, **options: Any
) -> list[str]:
    """The calls that the script makes when its programs are functions of the shell."""
    stage = stage.format(nodes=nodes, before=before, srun=srun)
    subprocess.run(["bash", "-c", stage + script(python="python", **options)], cwd=tmp_path, check=False, timeout=30)
    return (tmp_path / "calls").read_text().splitlines()


def test_the_step_uses_as_many_nodes_as_fit(tmp_path: Path) -> None:
    before, step, after = play(tmp_path)
    recipe = "/runs/a/recipe.yaml"
    assert before == f"python -m relora_ds slurm before {recipe} --tasks-per-node 8 --requeue-by requeue"
    assert step == (
        "srun --nodes=3 --ntasks=24 --ntasks-per-node=8 --kill-on-bad-exit=1 --cpus-per-task=2 "
        f"python -m relora_ds train {recipe} --under srun"
    )
    assert after == f"python -m relora_ds slurm after {recipe} --code 75 --requeue-by requeue --max-stalled 3"


@pytest.mark.parametrize("left_behind", ["SLURM_RESTART_COUNT=2", "X=1"])
def test_the_ranks_get_what_is_exported_and_the_restart_count_of_slurm(left_behind: str, tmp_path: Path) -> None:
    """After sbatch --export=NONE SLURM leaves SLURM_EXPORT_ENV=NONE behind, which srun obeys; and the count may be another job's."""
    stage = STAGE.replace("echo {nodes}", "echo {nodes} 0") + f"export SLURM_EXPORT_ENV=NONE {left_behind}\n"
    text = play(tmp_path, stage=stage, srun="bash -c 'echo $SLURM_EXPORT_ENV $SLURM_RESTART_COUNT >>calls'")
    assert text[2] == "ALL 0"


@pytest.mark.parametrize(("cores", "threads"), [("16", "2"), ("", "1")])
def test_threads_of_torchruns_ranks(cores: str, threads: str, tmp_path: Path) -> None:
    stage = STAGE + ("unset SLURM_CPUS_PER_TASK" if not cores else f"SLURM_CPUS_PER_TASK={cores}") + "\n"
    assert play(tmp_path, stage=stage, launcher="torchrun", srun="echo $OMP_NUM_THREADS >>calls")[2] == threads


@pytest.mark.parametrize("name", ["TERM", "USR2"])
def test_mpirun_hears_of_a_warning_and_of_a_preemption(name: str, tmp_path: Path) -> None:
    """SLURM's signals reach the script alone, or it and mpirun's daemons; TERM would have mpirun end the ranks."""
    mpirun = tmp_path / "mpirun"
    mpirun.write_text(
        "#!/bin/bash\ntrap 'echo TERM >>calls' TERM\ntrap 'echo USR2 >>calls; exit 75' USR2\n"
        f"kill -s {name} $PPID\nfor i in {{1..100}}; do sleep 0.05; done\n"
    )
    mpirun.chmod(0o755)
    calls = play(tmp_path, stage=STAGE + f"PATH={tmp_path}:$PATH\n", launcher="mpi")
    assert calls[1] == "USR2" and "--code 75 " in calls[2]


def test_a_set_up_line_that_fails_ends_the_job_and_is_named(tmp_path: Path) -> None:
    lines = ["if true; then", "  (exit 0)", "fi", "# a comment", "echo begun >>calls", "(exit 3)", "echo never >>calls"]
    stage = STAGE.format(nodes=3, before=0, srun=":") + script(python="python", setup=lines)
    done = subprocess.run(["bash", "-c", stage], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stderr) == (3, "[relora-ds] error: this set-up line ended with code 3: (exit 3)\n")
    assert (tmp_path / "calls").read_text() == "begun\n"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("NAME=my run", r"goes on with 'run' after its value; write NAME='VALUE' for a value as it stands; what"),
        ("NAME=it's", r"has a quote that stays open"),
        ("KEY=abc$def", r"holds \$def, which a shell fills in, and which is not set"),
        ('KEY="abc${def}"', r"holds \$\{def\}, which"),
        ("KEY=abc$$", r"holds \$\$"),
        ("KEY=a;b", r"goes on with ';'"),
        ("module load cuda", r"is not NAME=VALUE"),
    ],
)
def test_a_line_of_the_environment_file_that_a_shell_reads_otherwise(line: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "env").write_text(f"# a comment\nA=1\n{line}\n")
    found = settings({}, {**GPUS, "environment_file": str(tmp_path / "env")})
    with pytest.raises(ConfigError, match=rf"^--environment-file=.*: line 3 of {re.escape(str(tmp_path))}/env {problem}"):
        check_environment_file(found, ["HOME"])


def test_an_environment_file_that_a_shell_reads_as_it_says(tmp_path: Path) -> None:
    lines = [
        "", "# it's a comment", "A=1 # another", "export B='my run, $x and \"y\"'", 'C="two words"', "D=$HOME/hf:${A}", "E=", "F=a#b",
        r"G=\$x", "H='it'\"'\"'s'", "I=--x=1,y/z:@%+",
        "J=/tmp/$SLURM_JOB_ID:${NONE:-none}",
    ]  # fmt: skip
    (tmp_path / "env").write_text("\n".join(lines))
    check_environment_file(settings({}, {**GPUS, "environment_file": str(tmp_path / "env")}), ["HOME"])
    values = "$A|$B|$C|$D|$E|$F|$G|$H|$I|$J"
    text = play(tmp_path, stage=STAGE + "HOME=/h SLURM_JOB_ID=17\n", environment_file="env", srun=f'echo "{values}" >>calls')
    assert text[2] == """1|my run, $x and "y"|two words|/h/hf:1||a#b|$x|it's|--x=1,y/z:@%+|/tmp/17:none"""


def test_an_environment_file_that_is_not_there_ends_the_job(tmp_path: Path) -> None:
    stage = STAGE.format(nodes=3, before=0, srun=":") + script(python="python", environment_file="env")
    done = subprocess.run(["bash", "-c", stage], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1 and "this set-up line ended with code 1: source ./env" in done.stderr
    assert not (tmp_path / "calls").exists()


def test_module_is_found_where_the_shell_is_no_login_shell() -> None:
    for line in ("module load cuda", "ml cuda"):
        text = script(setup=["cd /", line])
        assert text.index("type module >/dev/null 2>&1 || source /etc/profile") < text.index("cd /")
    assert "/etc/profile" not in script(setup=["source venv/bin/activate", "# module load cuda"])


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


# Sites, as docs/slurm.md has them

SITES: dict[str, tuple[list[str], list[str]]] = {
    "GPUs by `--gpus-per-node`": (["#SBATCH --gpus-per-node=a100:8"], ["--gres"]),
    "GPUs by `--gres`": (["#SBATCH --gres=gpu:4", "#SBATCH --ntasks-per-node=4"], ["--gpus-per-node"]),
    "Whole nodes, no word about GPUs": (["#SBATCH --exclusive", "#SBATCH --ntasks-per-node=4"], ["--gpus-per-node", "--gres"]),
    "One GPU shown to each task": (
        [" --gpus-per-task=1 --gpu-bind=closest \\", "tasks_per_node=8"],
        ["--gpus-per-node", "--gres"],
    ),
    "Apptainer": (['pytorch.sif "$container_python" -m relora_ds train', "container_python=python3"], []),
    "Pyxis": ([" --container-image=/project/me/pytorch.sqsh ", '\n        "$container_python" -m relora_ds train'], []),
    "`--export=NONE`": (
        ["#SBATCH --export=NONE", "export SLURM_EXPORT_ENV=ALL", "source /etc/profile", "module load python cuda"],
        [],
    ),
    "Compute nodes without internet": (["\nexport HF_HUB_OFFLINE=1\n"], []),
    "Cray EX, with `MpiDefault=cray_shasta`": (["\nexport NCCL_SOCKET_IFNAME=hsn\n", "#SBATCH --gpus-per-node=8"], []),
    "Requeue forbidden": (["#SBATCH --no-requeue", "--requeue-by dependency"], ["#SBATCH --requeue"]),
}
"""What is in the script of each, and what is not."""


def documented_sites() -> dict[str, str]:
    """The site files under the headings of docs/slurm.md."""
    sections = (
        (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8").split("\n## Sites\n")[1].split("\n## ")[0].split("\n### ")[1:]
    )
    blocks = {section.partition("\n")[0]: re.findall(r"^    (.*\n)", section, re.MULTILINE) for section in sections}
    return {name: "".join(lines) for name, lines in blocks.items()}


def test_the_documented_sites_are_those_tested() -> None:
    assert list(documented_sites()) == list(SITES)


@pytest.mark.parametrize("name", SITES)
def test_a_documented_site_gives_a_job_script(name: str, tmp_path: Path) -> None:
    path = tmp_path / "slurm.yaml"
    path.write_text(documented_sites()[name])
    assert 1 < len(path.read_text().splitlines()) <= 10
    found = settings(read_site(path), {"nodes": "2"}, path)
    text = render(found, recipe="/runs/a/recipe.yaml", output="/runs/a/job.out", name="a")
    present, absent = SITES[name]
    for words in present:
        assert words in text
    for words in absent:
        assert words not in text
    assert found.num_gpus and doubts(found) == []
    assert directives(text)["time"] == found.time and directives(text)["account"] == "my-project"
    result = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
