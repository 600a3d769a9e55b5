"""Records what SLURM tells the processes of jobs of many shapes, into tests/unit/data/slurm_environments.json.

    python -m benchmarks.slurm_environments                              the SLURM that is installed
    TEST_SLURM=/tmp/slurm-24.11 python -m benchmarks.slurm_environments  another one: tests/cluster/other_slurm.sh

The file is {version: {shape: {task: variables}}}. A task is a rank, or ``batch``, the script that started
the ranks, or the ``shell`` that a user asked for. The nodes are
namespaces of this machine with two GPUs each that are none (tests/cluster/cluster.py). What is another in every recording, such
as folders and ports, is left out.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from tests.cluster.cluster import PATH as SYSTEM_PATH
from tests.cluster.cluster import Cluster

RECORD = Path(__file__).resolve().parents[1] / "tests" / "unit" / "data" / "slurm_environments.json"
KEPT = re.compile(r"(SLURM|PMI|CUDA_|ROCR_|HIP_|ZE_|GPU_DEVICE|OMPI_COMM_|OMPI_UNIVERSE_)")
PASSING = (
    "CONF .*_DIR SRUN_COMM_PORT STEP_LAUNCHER_PORT .*_HOST .*ADDR .*_TIME .*USER .*_UID .*_GID .*_GROUP .*_PID WORKING_CLUSTER "
    "UMASK PRIO_.* TOPOLOGY_.*"
)
LEFT_OUT = re.compile(rf"SLURMD?_({'|'.join(PASSING.split())})|PMIX?_(?!RANK|SIZE).*")
TELL = "/usr/bin/env -0 >{folder}/${{OMPI_COMM_WORLD_RANK:-$SLURM_PROCID}}"

SHAPES = {
    "no_gpus": ("--ntasks-per-node=2", "srun"),
    "uneven": ("--ntasks=3", "srun --distribution=block"),
    "cyclic": ("--ntasks-per-node=2", "srun --distribution=cyclic"),
    "fewer_nodes": ("--ntasks-per-node=2", "srun --nodes=1 --ntasks=2"),
    "cpus_per_task": ("--ntasks-per-node=2 --cpus-per-task=2", "srun --cpus-per-task=2"),
    "export_none": ("--ntasks-per-node=2 --export=NONE", "srun"),
    "pmi2": ("--ntasks-per-node=2", "srun --mpi=pmi2"),
    "gpus_per_node": ("--ntasks-per-node=2 --gpus-per-node=2", "srun"),
    "gres": ("--ntasks-per-node=2 --gres=gpu:2", "srun"),
    "gpus": ("--ntasks-per-node=2 --gpus=4", "srun"),
    "gpus_per_task": ("--ntasks-per-node=2 --gpus-per-task=1", "srun"),
    "gpus_per_task_unbound": ("--ntasks-per-node=2 --gpus-per-task=1", "srun --gpu-bind=none"),
    "srun_gpus_per_task": ("--ntasks-per-node=2 --gpus-per-node=2", "srun --gpus-per-task=1"),
    "tres_per_task": ("--ntasks-per-node=2 --tres-per-task=gres/gpu:1", "srun"),
    "ntasks_per_gpu": ("--gpus=4 --ntasks-per-gpu=1", "srun"),
    "gpu_bind_single": ("--ntasks-per-node=2 --gpus-per-node=2", "srun --gpu-bind=single:1"),
    "gpu_bind_map": ("--ntasks-per-node=2 --gpus-per-node=2", "srun --gpu-bind=map_gpu:1,0"),
    "one_task_a_node": ("--ntasks-per-node=1 --gpus-per-node=2", "srun"),
    "one_task": ("--nodes=1 --ntasks=1 --gpus-per-node=2", "srun"),
    "mpirun": ("--ntasks-per-node=2 --gpus-per-node=2", "mpirun --allow-run-as-root --map-by ppr:2:node"),
}
"""What sbatch is asked for, on two nodes where it says nothing else, and what starts the tasks. A SLURM may refuse one."""
IN_A_SHELL = {
    "salloc": "salloc --quiet --nodes=1 --gpus-per-node=2 {command}",
    "srun_pty": "script --quiet --return --command 'srun --nodes=1 --gpus-per-node=2 --pty {command}' /dev/null",
}
"""What a user types to get a shell."""


def batch(cluster: Cluster, folder: Path, options: str, start: str) -> dict[str, dict[str, str]]:
    """The environments of a batch script and of its tasks; none where this SLURM does not take the options."""
    folder.mkdir()
    script = folder.with_suffix(".sbatch")
    script.write_text(f"#!/bin/bash\nenv -0 >{folder}/batch\n{start} /bin/bash -c '{TELL.format(folder=folder)}'\n")
    try:
        job = cluster.sbatch(script, "--nodes=2", *options.split(), f"--output={folder}.out")
    except RuntimeError as refused:
        print(refused)
        return {}
    if cluster.wait(job, ("COMPLETED", "FAILED"))["state"] != "COMPLETED":
        print(folder.with_suffix(".out").read_text())
        return {}
    return environments(folder)


def in_a_shell(cluster: Cluster, folder: Path, typed: str) -> dict[str, dict[str, str]]:
    folder.mkdir()
    script = folder.with_suffix(".sh")
    script.write_text(f"#!/bin/bash\nenv -0 >{folder}/shell\n")
    script.chmod(0o755)
    cluster.run("ctl", "bash", "-c", typed.format(command=script), env={"PATH": SYSTEM_PATH})
    return environments(folder)


def environments(folder: Path) -> dict[str, dict[str, str]]:
    found = {}
    for path in sorted(folder.iterdir()):
        pairs = (pair.split("=", 1) for pair in path.read_text().split("\0") if pair)
        found[path.name] = {name: value for name, value in pairs if KEPT.match(name) and not LEFT_OUT.fullmatch(name)}
    return found


def main() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="e_", dir="/tmp") as name,
        Cluster(Path(name) / "c", 2) as cluster,
    ):
        version = cluster.run("ctl", "sinfo", "--version").stdout.split()[1]
        shapes = {shape: batch(cluster, Path(name) / shape, *how) for shape, how in SHAPES.items()}
        shapes |= {shape: in_a_shell(cluster, Path(name) / shape, typed) for shape, typed in IN_A_SHELL.items()}
    for shape, tasks in shapes.items():
        print(version, shape, *tasks)
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    known[version] = {shape: tasks for shape, tasks in shapes.items() if tasks}
    RECORD.write_text(in_lines(known))


def in_lines(content: Any, depth: int = 3) -> str:
    """JSON, a line for each task."""
    if not depth:
        return json.dumps(content, sort_keys=True)
    lines = (f"{json.dumps(key)}: {in_lines(value, depth - 1)}" for key, value in sorted(content.items()))
    return "{\n" + ",\n".join(lines) + "\n}" + "\n" * (depth == 3)


if __name__ == "__main__":
    main()
